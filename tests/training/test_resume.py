"""Going on with a run: of this project, of llm.c, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gpt2_jax.config import load_saved_config, saved_config_path
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc.loader import TokenLoader
from gpt2_jax.llmc.model_file import write_model_file
from gpt2_jax.llmc.rounding import rounded_to_nearest, stochastically_rounded
from gpt2_jax.llmc.state_file import ProcessState, TrainingState, write_state_files
from gpt2_jax.report.log import RunLog
from gpt2_jax.training import checkpoint
from gpt2_jax.training.run import train
from gpt2_jax.training.run_record import read_run_record
from tests.conftest import CPU, TINY, change


def test_a_set_without_its_record_resumes_with_an_empty_window(config, capsys):
    folder = train(config, "tiny", CPU)
    (folder / "run_00000008.json").unlink()
    train(change(config, run={"resume": True, "steps": 9}), "tiny", CPU)
    assert "the outlier window begins empty" in capsys.readouterr().out
    window = read_run_record(folder / "run_00000009.json").windows["loss"]
    assert np.isnan(window[:-1]).all()
    assert np.isfinite(window[-1])


def test_what_else_changes_the_bits_is_said(config, capsys):
    config = change(config, compute={"matmul": "xla"})
    train(config, "tiny", CPU)
    train(change(config, run={"resume": True, "steps": 9}), "tiny", CPU)
    assert "so far the run was computed by" not in capsys.readouterr().out
    in_bfloat16 = {"matmul": "xla", "dtype": "bfloat16"}
    train(change(config, run={"resume": True, "steps": 10}, compute=in_bfloat16), "tiny", CPU)
    text = " ".join(capsys.readouterr().out.split())
    assert "so far the run was computed by float32, xla in " in text
    assert "from here on by bfloat16, xla in " in text


def test_a_record_of_another_sequence_length_is_refused(config):
    folder = train(config, "tiny", CPU)
    saved_config_path(folder).unlink()
    with pytest.raises(Gpt2JaxError, match=r"expected the run's data.sequence_length = 16, found 8"):
        train(change(config, run={"resume": True, "steps": 9}, data={"sequence_length": 8, "total_batch_size": 0}), "tiny", CPU)


def test_a_bfloat16_run_of_llmcs_without_masters_goes_on_with_llmcs_own_bits(config, tiny_shards):
    """Those of the model file, which are not the master weights rounded to the nearest."""
    layout, folder = TINY.layout, Path(config.run.out_dir)
    folder.mkdir()
    params, m, v = np.abs(np.random.default_rng(0).normal(0, 0.02, (3, layout.num_parameters))).astype(np.float32)
    params[slice(*layout["wte"].padding_span)] = 0
    bits = stochastically_rounded(params, layout, np.arange(16, dtype=np.uint32))
    assert (bits != rounded_to_nearest(params)).any()
    write_model_file(folder / "model_00000005.bin", TINY, bits, "bfloat16")
    process = ProcessState(TokenLoader(tiny_shards[0], 2, 16, vocab_size=203, shuffle=True).state())
    write_state_files([folder / "state_00000005_00000.bin"], TrainingState(5, m, v, (process,), params), layout)
    (folder / "DONE_00000005").touch()
    config = change(config, optimizer={"learning_rate": 0.0, "master_weights": False}, compute={"dtype": "bfloat16"})
    train(change(config, run={"resume": True, "steps": 6}), "tiny", CPU)
    np.testing.assert_array_equal(checkpoint.load_checkpoint(folder, 6).params, bits)


def test_a_folder_of_llmcs_resumes(config, tiny_shards, capsys):
    """Of two processes with ZeRO: two states, no config.toml, no record."""
    layout, folder = TINY.layout, Path(config.run.out_dir)
    folder.mkdir()
    params, m, v = np.abs(np.random.default_rng(0).normal(0, 0.02, (3, layout.num_parameters))).astype(np.float32)
    params[slice(*layout["wte"].padding_span)] = 0
    write_model_file(folder / "model_00000005.bin", TINY, rounded_to_nearest(params), "bfloat16")
    processes = tuple(
        ProcessState(TokenLoader(tiny_shards[0], 2, 16, vocab_size=203, shuffle=True, process_rank=r, num_processes=2).state())
        for r in range(2)
    )
    states = [folder / f"state_00000005_0000{rank}.bin" for rank in range(2)]
    write_state_files(states, TrainingState(5, m, v, processes, params), layout, zero=True)
    (folder / "DONE_00000005").touch()
    train(change(config, run={"resume": True, "steps": 6}, optimizer={"learning_rate": 0.0}), "tiny", CPU)
    assert "the checkpoint is of several processes" in capsys.readouterr().out
    saved = checkpoint.load_checkpoint(folder, 6)
    np.testing.assert_array_equal(saved.params, params)
    loader = TokenLoader(tiny_shards[0], 2, 16, vocab_size=203, shuffle=True)
    loader.skip(6)
    assert saved.loader.sample_index == loader.state().sample_index == 6


def test_resuming_with_another_model_or_data_is_refused(config):
    train(config, "tiny", CPU)
    with pytest.raises(Gpt2JaxError, match=r"expected the run's data.shuffle = True, found False"):
        train(change(config, run={"resume": True}, data={"shuffle": False}), "tiny", CPU)


def test_a_resumed_run_may_have_another_batch_size_if_that_divides_its_step(config, capsys):
    """The same tokens in the same order: float32's roundings apart, the losses of a straight run."""
    ordered = change(config, data={"shuffle": False, "batch_size": 4}, evaluation={"validate_every": 0, "sample_every": 0})
    straight = train(change(ordered, run={"out_dir": config.run.out_dir + "-straight"}), "tiny", CPU)
    train(change(ordered, run={"steps": 4}), "tiny", CPU)
    with pytest.raises(Gpt2JaxError, match=r"share the run's 64 tokens of a step, found 1 x 3 x 16") as raised:
        train(change(ordered, run={"resume": True}, data={"batch_size": 3}), "tiny", CPU)
    assert raised.value.hint == "--devices 1 --batch-size 2"
    folder = train(change(ordered, run={"resume": True}, data={"batch_size": 2}), "tiny", CPU)
    assert "the checkpoint is of --batch-size 4" in capsys.readouterr().out
    expected, found = (list(RunLog(path / "log.jsonl").finite_values("train", "loss").values()) for path in (straight, folder))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert load_saved_config(folder).tokens_per_step == 64


def test_resuming_a_folder_without_a_complete_checkpoint_is_refused(config):
    folder = train(config, "tiny", CPU)
    (folder / "DONE_00000008").unlink()
    with pytest.raises(Gpt2JaxError, match="complete checkpoint"):
        train(change(config, run={"resume": True}), "tiny", CPU)


def test_resuming_with_another_seed_is_refused(config):
    train(config, "tiny", CPU)
    with pytest.raises(Gpt2JaxError, match=r"expected the run's run.seed = 42, found 7"):
        train(change(config, run={"resume": True, "seed": 7}), "tiny", CPU)
