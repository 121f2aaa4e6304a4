"""Whole runs of a tiny model: what they leave behind, how they go on, and what they refuse."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from gpt2_jax import checkpoint, custom_calls
from gpt2_jax.backend import Backend
from gpt2_jax.config import RunConfig, load_config, saved_config_path
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc.model_file import read_model_file, write_model_file
from gpt2_jax.llmc.token_shard import write_token_shard
from gpt2_jax.report import RunLog
from gpt2_jax.trainer import train
from tests.conftest import TINY

CPU = Backend("cpu", "cpu", "test")


@pytest.fixture
def config(tiny_shards, tmp_path):
    base = RunConfig()
    return RunConfig(
        model=dataclasses.replace(base.model, init="d6", **dataclasses.asdict(TINY)),
        data=dataclasses.replace(base.data, train=tiny_shards[0], validation=tiny_shards[1], batch_size=2, sequence_length=16),
        optimizer=dataclasses.replace(base.optimizer, learning_rate=1e-2, weight_decay=0.1),
        evaluation=dataclasses.replace(
            base.evaluation, validate_every=4, validation_batches=-1, sample_every=4, sample_tokens=5
        ),
        run=dataclasses.replace(base.run, steps=8, out_dir=str(tmp_path / "run")),
    )


def change(config, **sections):
    """A copy with settings replaced: change(config, run={"steps": 3})."""
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    )


def test_a_run_leaves_checkpoint_log_settings_and_picture(config, capsys):
    folder = train(config, "tiny", CPU)
    assert {path.name for path in folder.iterdir()} == {
        *("model_00000008.bin", "state_00000008_00000.bin", "run_00000008.json", "DONE_00000008"),
        *("config.toml", "log.jsonl", "main.log", "loss.png"),
    }
    log = RunLog(folder / "log.jsonl")
    losses = {event: [(row["step"], row["loss"]) for row in log.records(event)] for event in ("train", "validation")}
    assert [step for step, _ in losses["train"]] == list(range(1, 9))
    assert [step for step, _ in losses["validation"]] == [0, 4, 8]
    assert [row["step"] for row in log.records("sample")] == [0, 4, 8]
    assert losses["validation"][-1][1] < losses["validation"][0][1]
    model, params = read_model_file(folder / "model_00000008.bin")
    assert model == TINY
    assert np.isfinite(params).all()

    output = capsys.readouterr().out
    steps = [line for line in output.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == [f"{step}/8" for step in range(1, 9)]
    assert "unigram cross-entropy of the validation tokens" in output
    assert "validating on 9 batches" in output
    assert f"validation loss at step 8: {losses['validation'][-1][1]:.6f}" in output


def test_a_resumed_run_equals_a_straight_one_to_the_bit(config, tmp_path):
    # Steps are given, so that the schedule is the same; the epoch ends at step 31 with two micro-batches a step.
    config = change(
        config, data={"total_batch_size": 64}, run={"steps": 40, "checkpoint_every": 25}, evaluation={"sample_every": 0}
    )
    straight = train(change(config, run={"out_dir": str(tmp_path / "straight")}), "tiny", CPU)
    folder = train(config, "tiny", CPU)
    for name in ("model_00000040.bin", "state_00000040_00000.bin", "DONE_00000040"):
        (folder / name).unlink()
    train(change(config, run={"resume": True}), "tiny", CPU)
    for name in ("model_00000040.bin", "state_00000040_00000.bin"):
        assert (folder / name).read_bytes() == (straight / name).read_bytes()
    rows = [[row["loss"] for row in RunLog(path / "log.jsonl").records("train")] for path in (straight, folder)]
    assert rows[0] == rows[1]


def test_a_finished_run_has_nothing_to_resume(config, capsys):
    folder = train(config, "tiny", CPU)
    before = (folder / "model_00000008.bin").stat().st_mtime_ns
    train(change(config, run={"resume": True}), "tiny", CPU)
    assert "nothing to do" in capsys.readouterr().out
    assert (folder / "model_00000008.bin").stat().st_mtime_ns == before


def test_a_folder_that_holds_a_run_is_refused_and_untouched(config):
    folder = train(config, "tiny", CPU)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(Gpt2JaxError, match=r"holds a run(.|\n)*--resume --out-dir"):
        train(config, "tiny", CPU)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_resuming_with_another_model_or_data_is_refused(config):
    train(config, "tiny", CPU)
    with pytest.raises(Gpt2JaxError, match=r"expected the run's data.batch_size = 2, found 3"):
        train(change(config, run={"resume": True}, data={"batch_size": 3}), "tiny", CPU)


def test_resuming_a_folder_without_a_complete_checkpoint_is_refused(config):
    folder = train(config, "tiny", CPU)
    (folder / "DONE_00000008").unlink()
    with pytest.raises(Gpt2JaxError, match="complete checkpoint"):
        train(change(config, run={"resume": True}), "tiny", CPU)


def test_the_saved_settings_are_the_runs(config):
    folder = train(config, "tiny", CPU)
    assert load_config(saved_config_path(folder)) == config


def test_fine_tuning_starts_from_a_files_weights_and_a_fresh_optimizer(config, tiny_params, tmp_path):
    path = tmp_path / "mine.bin"
    write_model_file(path, TINY, tiny_params)
    no_sizes = dict.fromkeys(dataclasses.asdict(TINY))
    config = change(config, model={"init": str(path), **no_sizes}, optimizer={"learning_rate": 0.0}, run={"steps": 1})
    folder = train(config, "tiny", CPU)
    saved = checkpoint.load_checkpoint(folder, 1)
    np.testing.assert_array_equal(saved.params, tiny_params)
    assert (saved.m != 0).any()


def test_a_missing_library_of_custom_calls_is_said_and_trains_through_xla(config, capsys, monkeypatch):
    def missing():
        raise NotImplementedError("it was not built")

    monkeypatch.setattr(custom_calls, "description", missing)
    train(change(config, run={"steps": 1}, evaluation={"validate_every": 0, "sample_every": 0}), "tiny", CPU)
    assert "not naive, blocked, simd, threaded: it was not built" in capsys.readouterr().out


def test_an_epoch_is_the_default(config):
    folder = train(change(config, run={"steps": 0}, evaluation={"validate_every": 0, "sample_every": 0}), "tiny", CPU)
    assert checkpoint.newest_step(folder) == 2000 // 32


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(config):
    config = change(config, optimizer={"learning_rate": 1e30}, evaluation={"validate_every": 0, "sample_every": 0})
    with pytest.raises(Gpt2JaxError, match=r"expected a finite loss"):
        train(config, "tiny", CPU)
    with pytest.raises(Gpt2JaxError, match="complete checkpoint"):
        checkpoint.newest_step(config.run.out_dir)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"sequence_length": 17}}, r"--sequence-length: expected at most the model's 16, found 17"),
        ({"data": {"train": "nowhere.bin"}}, r"nowhere.bin: .*\n.*prepare_data.py"),
        ({"data": {"batch_size": 200}}, r"expected at least 3201 tokens for one batch"),
        ({"model": {"init": "nowhere.bin", **dict.fromkeys(dataclasses.asdict(TINY))}}, r"nowhere.bin: expected a model file"),
    ],
)
def test_what_can_be_refused_is_refused_before_anything_is_written(config, sections, message, tmp_path):
    with pytest.raises(Gpt2JaxError, match=message):
        train(change(config, **sections), "tiny", CPU)
    assert not (tmp_path / "run").exists()


def test_a_token_beyond_the_vocabulary_is_named(config, tiny_shards):
    write_token_shard(tiny_shards[0], np.full(2000, TINY.vocab_size))
    with pytest.raises(Gpt2JaxError, match=r"tiny_train.bin: expected token ids below 203, found 203 at token \d+"):
        train(config, "tiny", CPU)
