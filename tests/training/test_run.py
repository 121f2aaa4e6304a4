"""Whole runs of a tiny model: what they leave behind, how they go on, and what they refuse."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from gpt2_jax import files
from gpt2_jax.commands.command_line import parse, parse_command_line
from gpt2_jax.commands.generate import Arguments as GenerateArguments
from gpt2_jax.compute import memory
from gpt2_jax.compute.plan import Plan
from gpt2_jax.config import load_config, saved_config_path
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc import checkpoint_set
from gpt2_jax.llmc.loader import TokenLoader
from gpt2_jax.llmc.model_file import read_model_config, read_model_file, write_model_file
from gpt2_jax.llmc.rounding import RoundingStream, rounded_to_nearest
from gpt2_jax.llmc.token_shard import write_token_shard
from gpt2_jax.models.initialize import initialize_parameters
from gpt2_jax.ops.cpu import library as custom_calls
from gpt2_jax.report.log import RunLog
from gpt2_jax.training import checkpoint, summary
from gpt2_jax.training import run as trainer
from gpt2_jax.training.run import prepare, train
from gpt2_jax.training.run_lock import locked
from gpt2_jax.training.run_record import read_run_record
from tests.conftest import CPU, TINY, available, change
from tests.training.fake_step import FakeStep

NEITHER = {"validate_every": 0, "sample_every": 0}


@pytest.fixture
def without_step(monkeypatch) -> list[Plan]:
    """Nothing is compiled: the step returns the state as it is. The plans that a step was to be compiled for."""
    plans: list[Plan] = []
    monkeypatch.setattr(trainer, "compile_step", lambda plan, *_, **__: plans.append(plan) or FakeStep())
    return plans


@pytest.fixture(autouse=True)
def without_picture(request, monkeypatch):
    """Drawing takes as long as a short run; one test is of the picture."""
    if "picture" not in request.function.__name__:
        monkeypatch.setattr(summary, "plot_loss", lambda *_, **__: None)


def test_a_run_leaves_checkpoint_log_settings_and_picture(config, hellaswag, capsys):
    config = change(config, evaluation={"hellaswag": hellaswag})
    folder = train(change(config, run={"verbose": True}), "tiny", CPU)
    assert {path.name for path in folder.iterdir()} == {
        *("model_00000008.bin", "state_00000008_00000.bin", "run_00000008.json", "DONE_00000008"),
        *("config.toml", "log.jsonl", "main.log", "loss.png"),
    }
    log = RunLog(folder / "log.jsonl")
    losses = {event: [(row["step"], row["loss"]) for row in log.records(event)] for event in ("train", "validation")}
    assert [step for step, _ in losses["train"]] == list(range(1, 9))
    assert [step for step, _ in losses["validation"]] == [0, 4, 8]
    assert [row["step"] for row in log.records("sample")] == [0, 4, 8]
    assert [(row["step"], row["total"]) for row in log.records("hellaswag")] == [(4, 11), (8, 11)]
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
    assert re.search(r"  memory +0.00 GB \(0.00 parameters, .*\) in a step\n", output)
    assert re.search(r"compiled in [\d.]+ s\n", output)
    assert load_config(saved_config_path(folder)) == config
    assert re.search(r"peak memory: \d+\.\d\d GB of the process\n", output)
    commands = re.findall(r"^(talk to it|go on|fine-tune it): +python scripts/(.*)$", output, re.MULTILINE)
    assert [what for what, _ in commands] == ["talk to it", "go on", "fine-tune it"]
    words = {what: shlex.split(command)[1:] for what, command in commands}
    assert parse(GenerateArguments, "", words["talk to it"]).checkpoint == str(folder)
    goes_on, fine_tunes = (parse_command_line(words[what], "").settings for what in ("go on", "fine-tune it"))
    assert (goes_on.run.resume, goes_on.run.steps, goes_on.data) == (True, 16, config.data)
    shards = {"train": config.data.train, "validation": config.data.validation}
    prepared = prepare(change(fine_tunes, data=shards, run={"steps": 1}), "x", CPU)
    assert prepared.config.model.init == str(folder / "model_00000008.bin")


def test_a_set_that_a_killed_process_had_set_aside_is_gone_on_from(config, without_step, capsys):
    """It was killed while it saved the step again: the old files had given their names up, not all of the new ones had them."""
    folder = train(change(config, run={"steps": 2}), "tiny", CPU)
    model = (folder / "model_00000002.bin").read_bytes()
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    for name in ("DONE_00000002", "model_00000002.bin", "state_00000002_00000.bin", "run_00000002.json"):
        os.replace(folder / name, folder / f".{name}.{files._host_in_a_name(socket.gethostname())}.{gone.pid}.old")
    (folder / "model_00000002.bin").write_bytes(b"the new one")
    (folder / ".lock").write_text(f"{socket.gethostname()} {gone.pid}\n")
    capsys.readouterr()
    train(change(config, run={"steps": 3, "resume": True}), "tiny", CPU)
    assert "which is gone: taken over" in capsys.readouterr().out
    assert (folder / "model_00000002.bin").read_bytes() == model
    assert checkpoint_set.complete_steps(folder) == [2, 3]


def test_resuming_a_run_that_still_trains_is_refused_before_it_compiles(config, without_step, capsys):
    folder = train(change(config, run={"steps": 1}), "tiny", CPU)
    capsys.readouterr()
    with locked(folder), pytest.raises(Gpt2JaxError, match="expected a run folder that no other process trains in"):
        train(change(config, run={"steps": 2, "resume": True}), "tiny", CPU)
    assert "compiling" not in capsys.readouterr().out


@pytest.mark.parametrize("variant", ["outlier skip", "bfloat16", "no masters"])
def test_a_run_resumed_twice_equals_a_straight_one_to_the_bit(config, variant, tmp_path):
    """With shuffling, accumulation and the outlier skip on: after the window is full most updates are refused. An epoch ends
    at step 31."""
    config = change(
        config,
        data={"total_batch_size": 64},
        optimizer={"skip_loss_z": 0.5, "skip_gradient_z": 0.5},
        compute={"dtype": "float32" if variant == "outlier skip" else "bfloat16"},
        run={"steps": 150, "checkpoint_every": 70},
        evaluation={"sample_every": 50, "validate_every": 50},
    )
    config = change(config, optimizer={"master_weights": variant != "no masters"})
    straight = train(change(config, run={"out_dir": str(tmp_path / "straight")}), "tiny", CPU)
    folder = train(config, "tiny", CPU)
    for lost in ((140, 150), (150,)):  # so that the second resumption begins where the first has saved
        for path in [path for step in lost for path in folder.glob(f"*{step:08d}*")]:
            path.unlink()
        train(change(config, run={"resume": True}), "tiny", CPU)
    for name in ("model_00000150.bin", "state_00000150_00000.bin"):
        assert (folder / name).read_bytes() == (straight / name).read_bytes()
    logs = [RunLog(path / "log.jsonl") for path in (straight, folder)]
    keys = {"train": ("loss", "norm", "lr", "loss_z", "norm_z", "applied"), "validation": ("loss",), "sample": ("text",)}
    for event in keys:
        rows = [[[row[key] for key in ("step", *keys[event])] for row in log.records(event)] for log in logs]
        assert rows[0] == rows[1]
    applied = [row["applied"] for row in logs[0].records("train")]
    assert not all(applied)
    # The samples were those of models that had learned something, so they tell the models apart.
    assert len({row["text"] for row in logs[0].records("sample")}) > 1
    saved = checkpoint.load_checkpoint(folder, 150)
    rounds = variant == "no masters"  # then the parameters are bfloat16's, and move by llm.c's noise
    assert np.array_equal(saved.params, rounded_to_nearest(saved.params)) == rounds
    stream = RoundingStream()
    for is_applied in applied:
        stream.step_done(2, applied=is_applied)
    assert saved.rounding == stream
    windows = [read_run_record(path / "run_00000150.json").windows for path in (straight, folder)]
    np.testing.assert_array_equal(windows[0]["loss"], windows[1]["loss"])
    assert read_model_config(folder / "model_00000150.bin") == TINY


def test_a_bfloat16_run_begins_with_bfloat16s_values_as_llmcs_does(config, without_step):
    config = change(config, evaluation=NEITHER, run={"steps": 1}, compute={"dtype": "bfloat16"})
    saved = checkpoint.load_checkpoint(train(config, "tiny", CPU), 1)
    np.testing.assert_array_equal(saved.params, rounded_to_nearest(initialize_parameters(TINY)))


def test_overfitting_takes_the_first_validation_batch_every_time(config, tiny_shards):
    config = change(config, data={"overfit_one_batch": True}, run={"steps": 30}, evaluation={"sample_every": 0})
    folder = train(config, "tiny", CPU)
    losses = [row["loss"] for row in RunLog(folder / "log.jsonl").records("train")]
    assert losses[-1] < losses[0] - 2
    loader = TokenLoader(tiny_shards[1], 2, 16, vocab_size=203)
    loader.next_batch()
    assert checkpoint.load_checkpoint(folder, 30).loader == loader.state()


def test_questions_longer_than_a_sequence_are_refused(config, hellaswag):
    config = change(config, evaluation={"hellaswag": hellaswag}, data={"sequence_length": 5})
    with pytest.raises(Gpt2JaxError, match=r"hellaswag.bin: expected questions below 5 tokens"):
        train(config, "tiny", CPU)


def test_a_finished_run_has_nothing_to_resume_and_is_left_as_it_is(config, without_step, capsys):
    """Its config.toml once was written anew, with other settings than those that it was trained with."""
    folder = train(change(config, run={"steps": 1}, evaluation=NEITHER), "tiny", CPU)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    assert train(change(config, run={"steps": 1, "resume": True}), "tiny", CPU) == folder
    assert "is at step 1 of 1; a larger --steps goes on" in capsys.readouterr().out
    with pytest.raises(Gpt2JaxError, match=r"holds a run(.|\n)*--resume --out-dir"):
        train(config, "tiny", CPU)
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before


@pytest.mark.parametrize("matmul", available(["xla", "threaded"]))
def test_saving_does_not_keep_the_steps_from_reusing_the_states_memory(config, monkeypatch, matmul):
    """An array on the host that shares a buffer's memory and outlives the saving would cost a copy at each step."""
    places: list[set[int]] = []

    def watched(*arguments, compile_step=trainer.compile_step, **options):
        compiled = compile_step(*arguments, **options)

        def step(state, *batch):
            buffers = (state.params, state.optimizer.m, state.optimizer.v)
            places.append({buffer.unsafe_buffer_pointer() for buffer in buffers})
            state, metrics = compiled(state, *batch)
            assert all(buffer.is_deleted() for buffer in buffers)
            return state, metrics

        step.memory_analysis = compiled.memory_analysis
        return step

    monkeypatch.setattr(trainer, "compile_step", watched)
    sections = {"evaluation": {"validate_every": 1, "sample_every": 0}, "compute": {"matmul": matmul}}
    train(change(config, run={"steps": 4, "checkpoint_every": 1}, **sections), "tiny", CPU)
    # What XLA first hands on may be other memory than that of the state that was made.
    assert places[1] == places[2] == places[3]


def test_the_step_is_compiled_before_weights_are_made(config, monkeypatch):
    """So a run that does not fit is refused before it has read or written anything."""
    order = []
    for name in ("compile_step", "load_weights", "open_folder"):
        real = getattr(trainer, name)
        noted = lambda *arguments, real=real, name=name, **options: order.append(name) or real(*arguments, **options)  # noqa: E731
        monkeypatch.setattr(trainer, name, noted)
    config = change(config, run={"steps": 1}, evaluation=NEITHER)
    train(config, "tiny", CPU)
    assert order == ["compile_step", "load_weights", "open_folder"]

    order.clear()
    monkeypatch.setattr(memory, "device_limit", lambda: 1000)
    with pytest.raises(Gpt2JaxError, match=r"memory: expected room for .* in a step, found 0.00 GB on the device"):
        train(change(config, run={"out_dir": config.run.out_dir + "-2"}), "tiny", CPU)
    assert order == ["compile_step"]
    assert not Path(config.run.out_dir + "-2").exists()


def test_fine_tuning_starts_from_a_files_weights_and_a_fresh_optimizer(config, without_step, tiny_params, tmp_path):
    path = tmp_path / "mine.bin"
    write_model_file(path, TINY, tiny_params)
    no_sizes = dict.fromkeys(dataclasses.asdict(TINY))
    config = change(config, model={"init": str(path), **no_sizes}, evaluation=NEITHER, run={"steps": 1})
    saved = checkpoint.load_checkpoint(train(config, "tiny", CPU), 1)
    np.testing.assert_array_equal(saved.params, tiny_params)
    assert not saved.m.any()
    assert not saved.v.any()


def test_a_missing_library_of_custom_calls_is_said_and_trains_through_xla(config, without_step, capsys, monkeypatch):
    def missing():
        raise NotImplementedError("it was not built")

    monkeypatch.setattr(custom_calls, "description", missing)
    train(change(config, run={"steps": 1}, evaluation=NEITHER), "tiny", CPU)
    assert re.search(r"not amx, threaded, simd, blocked, naive.*: it was not built", capsys.readouterr().out)
    assert {choice.name for choice in [getattr(without_step[0], seam) for seam in ("linear", "attention", "adamw")]} == {"xla"}


def test_an_epoch_is_the_default(config):
    assert prepare(change(config, run={"steps": 0}), "tiny", CPU).steps == 2000 // 32


def poisoned(config, tmp_path):
    """A run from weights of which one in the second layer's fcw is infinite."""
    params = initialize_parameters(TINY)
    TINY.layout.views(params)["lnfb"][3] = np.inf
    write_model_file(tmp_path / "poisoned.bin", TINY, params)
    no_sizes = dict.fromkeys(dataclasses.asdict(TINY))
    return change(
        config, model={"init": str(tmp_path / "poisoned.bin"), **no_sizes}, evaluation=NEITHER, data={"shuffle": False}
    )


def test_a_loss_that_is_not_finite_ends_the_run_with_a_checkpoint_to_go_on_from(config, tmp_path, tiny_shards, capsys):
    config = poisoned(config, tmp_path)
    with pytest.raises(Gpt2JaxError) as raised:
        train(config, "tiny", CPU)
    message, folder = str(raised.value), config.run.out_dir
    assert "step 1: expected a finite loss and gradient, found a loss of nan" in message
    assert "not finite in all tensors" in message
    assert f"for the batch of {tiny_shards[0]} at token 0" in message
    step = checkpoint_set.newest_step(folder)
    assert step in (1, 2)
    np.testing.assert_array_equal(
        checkpoint.load_checkpoint(folder, step).params, read_model_file(tmp_path / "poisoned.bin")[1]
    )
    command = shlex.split(raised.value.hint.partition("   (")[0])
    goes_on, name, *_ = parse_command_line(command[2:], "Train.")
    train(goes_on, name, CPU)
    assert checkpoint_set.newest_step(folder) == 8
    assert f"update skipped: step {step + 1}: expected a finite loss" in capsys.readouterr().out
    saved = checkpoint.load_checkpoint(folder, 8)
    np.testing.assert_array_equal(saved.params, read_model_file(tmp_path / "poisoned.bin")[1])
    assert not saved.m.any()
    assert [row["loss"] for row in RunLog(Path(folder) / "log.jsonl").records("train")] == [None] * 8
    # What llm.c would have drawn: the embedding's seed alone.
    stream = RoundingStream()
    for _ in range(8):
        stream.step_done(1, applied=False)
    assert saved.rounding == stream


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"sequence_length": 17}}, r"--sequence-length: expected at most the model's 16, found 17"),
        ({"data": {"train": "nowhere.bin"}}, r"nowhere.bin: .*\n.*prepare_data.py"),
        ({"run": {"out_dir": "x" * 300}}, r"x: expected to make the run folder, found: File name too long"),
        ({"run": {"out_dir": "a\0b"}}, r"expected to make the run folder, found: .*null"),
        ({"run": {"out_dir": "x" * 300, "resume": True}}, r"x: expected a run folder with a complete checkpoint"),
        ({"data": {"batch_size": 200}}, r"expected at least 3201 tokens for one batch"),
        ({"model": {"init": "nowhere.bin", **dict.fromkeys(dataclasses.asdict(TINY))}}, r"nowhere.bin: expected a model file"),
    ],
)
def test_what_can_be_refused_is_refused_before_anything_is_written(config, sections, message, tmp_path):
    with pytest.raises(Gpt2JaxError, match=message):
        train(change(config, **sections), "tiny", CPU)
    assert not (tmp_path / "run").exists()


def allocate_too_much(*_, **__):
    return jax.numpy.zeros((1 << 42,), "float32")


@pytest.mark.parametrize("where", ["create_state", "compile_step", "step"])
def test_memory_that_is_not_there_is_an_error_with_what_would_need_less(config, monkeypatch, where):
    """A real failure of XLA's, before the first step or in it."""
    step = lambda *_: allocate_too_much()  # noqa: E731
    step.memory_analysis = lambda: None
    too_much = allocate_too_much if where != "step" else lambda *_, **__: step
    monkeypatch.setattr(trainer, "create_state" if where == "create_state" else "compile_step", too_much)
    config = change(config, data={"batch_size": 6, "total_batch_size": 192}, evaluation={"sample_every": 0})
    with pytest.raises(Gpt2JaxError) as raised:
        train(config, "tiny", dataclasses.replace(CPU, lacks=CPU.lacks - {"barriers"}))
    problem, hint = raised.value.problem, raised.value.hint
    assert re.match(r"memory: expected room for 0\.00 GB \(.* activations\) in a step, found: RESOURCE_EXHAUSTED: ", problem)
    assert hint.startswith("--batch-size 3 --total-batch-size 192   (as many tokens a step); or --recompute block; or ")
    change(config, data={"batch_size": 3}).validate()


def test_other_failures_of_xlas_keep_their_traceback(config, without_step, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("INTERNAL: not RESOURCE_EXHAUSTED")

    monkeypatch.setattr(trainer, "create_state", fail)
    with pytest.raises(RuntimeError, match="INTERNAL"):
        train(config, "tiny", CPU)


@pytest.mark.parametrize(
    ("resume", "data"),
    [(False, {"train": "nowhere.bin"}), (False, {"validation": "nowhere.bin"}), (True, {"train": "nowhere.bin"})],
)
def test_a_mistyped_path_is_reported_before_weights_are_made_or_loaded(config, without_step, monkeypatch, resume, data):
    if resume:
        folder = train(change(config, run={"steps": 1}, evaluation={"sample_every": 0}), "tiny", CPU)
        saved_config_path(folder).unlink()  # as llm.c's, which does not say what the data were
    monkeypatch.setattr(trainer, "load_weights", lambda *_: pytest.fail("made the weights"))
    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda *_, **__: pytest.fail("loaded the checkpoint"))
    with pytest.raises(Gpt2JaxError, match=r"nowhere\.bin"):
        train(change(config, data=data, run={"resume": resume}), "tiny", CPU)


def test_a_token_beyond_the_vocabulary_is_named(config, without_step, tiny_shards):
    write_token_shard(tiny_shards[0], np.full(2000, TINY.vocab_size))
    with pytest.raises(Gpt2JaxError, match=r"tiny_train.bin: expected token ids below 203, found 203 at token \d+"):
        train(config, "tiny", CPU)
