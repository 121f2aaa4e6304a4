"""What is saved beside the regular checkpoints: by time, and of the lowest validation loss; and the picture on the way."""

from __future__ import annotations

import time

import numpy as np
import pytest

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc.checkpoint_set import complete_steps, set_paths
from gpt2_jax.training import checkpoint, summary
from gpt2_jax.training.interrupts import StopRequest
from gpt2_jax.training.loop import train_loop
from gpt2_jax.training.run_record import Best, read_run_record
from tests.training.test_loop import fake_run  # noqa: F401 (a fixture)

QUIET = {"validate_every": 0, "sample_every": 0}


@pytest.fixture
def minutes_a_step(monkeypatch):
    """A function that makes every step of a run take so many minutes on a clock of its own."""

    def make(run, minutes):
        now = [1000.0]
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        run.saved_at, compiled = now[0], run.compiled

        def step(*arguments):
            now[0] += 60 * minutes
            return compiled(*arguments)

        run.compiled = step
        return run

    return make


def saved_steps(run):
    return [int(line.split()[3].rstrip(":")) for line in run.display.lines if line.startswith("checkpoint of step ")]


def test_a_set_is_saved_every_ten_minutes_and_the_newest_of_these_is_kept(fake_run, minutes_a_step):  # noqa: F811
    run = minutes_a_step(fake_run(evaluation=QUIET, run={"steps": 9}), 4)
    train_loop(run, StopRequest())
    assert saved_steps(run) == [3, 6, 9]
    assert complete_steps(run.folder) == [9]


@pytest.mark.parametrize(
    ("settings", "saved", "left"),
    [
        ({"checkpoint_minutes": 0}, [8], [8]),
        ({"checkpoint_minutes": 8}, [2, 4, 6, 8], [8]),
        ({"checkpoint_minutes": 7, "checkpoint_every": 3}, [2, 3, 5, 6, 8], [3, 6, 8]),
        ({"checkpoint_minutes": 7, "checkpoint_every": 2}, [2, 4, 6, 8], [2, 4, 6, 8]),
        ({"checkpoint_minutes": 4, "checkpoint_every": 3, "keep_checkpoints": 1}, [1, 2, 3, 4, 5, 6, 7, 8], [6, 8]),
    ],
)
def test_saving_by_time_leaves_the_regular_sets_alone(fake_run, minutes_a_step, settings, saved, left):  # noqa: F811
    run = minutes_a_step(fake_run(evaluation=QUIET, run=settings), 4)
    train_loop(run, StopRequest())
    assert saved_steps(run) == saved
    assert complete_steps(run.folder) == left


def test_a_set_saved_by_time_is_known_as_one_after_a_resume(fake_run, minutes_a_step):  # noqa: F811
    run = minutes_a_step(fake_run(evaluation=QUIET, run={"checkpoint_minutes": 8}), 4)
    compiled = run.compiled
    run.compiled = lambda *arguments: {}["dead"] if run.step == 3 else compiled(*arguments)
    with pytest.raises(KeyError):
        train_loop(run, StopRequest())
    assert complete_steps(run.folder) == [2]
    assert read_run_record(set_paths(run.folder, 2)[2]).kept == "time"
    train_loop(fake_run(at=2, evaluation=QUIET), StopRequest())
    assert complete_steps(run.folder) == [8]


def test_a_failure_of_saving_by_time_costs_a_line(fake_run, minutes_a_step, monkeypatch):  # noqa: F811
    save = checkpoint.save_checkpoint

    def sometimes_full(folder, saved):
        if saved.step < 8:
            raise Gpt2JaxError("model.bin: No space left on device")
        return save(folder, saved)

    monkeypatch.setattr(checkpoint, "save_checkpoint", sometimes_full)
    run = minutes_a_step(fake_run(evaluation=QUIET), 4)
    train_loop(run, StopRequest())
    assert run.display.text.count("NO checkpoint of step") == 2  # steps 3 and 6: it waits ten minutes again
    assert complete_steps(run.folder) == [8]


VALIDATES = {"validate_every": 1, "validation_batches": 1, "sample_every": 0}


def with_losses(run, losses):
    given = iter(losses)
    run.loss_function = lambda *_: np.float32(next(given))
    return run


def test_the_set_of_the_lowest_validation_loss_is_kept(fake_run):  # noqa: F811
    settings = {"keep_best": True, "checkpoint_every": 2, "keep_checkpoints": 1}
    losses = [1.0, 5.0, 4.0, 3.0, 3.5, 3.5, np.nan, 3.25, 3.5]  # before the first step there is no set to keep
    run = with_losses(fake_run(evaluation=VALIDATES, run=settings), losses)
    train_loop(run, StopRequest())
    assert complete_steps(run.folder) == [3, 8]
    assert run.best == Best(3, 3.0)
    assert "lowest validation loss: 3.0000 at step 3, whose checkpoint is kept" in run.display.text
    assert checkpoint.load_checkpoint(run.folder, 8).record.best == Best(3, 3.0)

    run = with_losses(fake_run(at=8, evaluation=VALIDATES, run=settings | {"steps": 12}), [3.1, 2.5, 2.6, 2.7])
    run.best = Best(3, 3.0)
    train_loop(run, StopRequest())
    # Step 10's set was regular and became the best: the older best goes, and step 8's as --keep-checkpoints has it.
    assert complete_steps(run.folder) == [10, 12]
    assert read_run_record(set_paths(run.folder, 10)[2]).best == Best(10, 2.5)


def test_a_best_set_that_could_not_be_saved_leaves_the_best_before_it(fake_run, monkeypatch):  # noqa: F811
    save = checkpoint.save_checkpoint

    def sometimes_full(folder, saved):
        if saved.step == 5:
            raise Gpt2JaxError("model.bin: No space left on device")
        return save(folder, saved)

    monkeypatch.setattr(checkpoint, "save_checkpoint", sometimes_full)
    run = with_losses(fake_run(evaluation=VALIDATES, run={"keep_best": True}), [9.0, 8.0, 7.0, 3.0, 4.0, 2.0, 4.0, 4.0, 4.0])
    train_loop(run, StopRequest())
    assert complete_steps(run.folder) == [3, 8]
    assert run.best == Best(3, 3.0)


@pytest.mark.parametrize("failure", [MemoryError("no room for the rounded parameters"), OSError(5, "Input/output error")])
def test_a_failure_of_whatever_kind_costs_the_checkpoint(fake_run, monkeypatch, failure):  # noqa: F811
    save = checkpoint.save_checkpoint

    def fails(folder, saved):
        if saved.step < 8:
            raise failure
        return save(folder, saved)

    monkeypatch.setattr(checkpoint, "save_checkpoint", fails)
    run = fake_run(evaluation=QUIET, run={"checkpoint_every": 4})
    train_loop(run, StopRequest())
    assert f"NO checkpoint of step 4: {type(failure).__name__}: " in run.display.text
    assert complete_steps(run.folder) == [8]


def test_the_minutes_are_counted_from_the_end_of_a_save(fake_run, minutes_a_step, monkeypatch):  # noqa: F811
    """A slow disk, to which a save takes longer than the minutes between saves, would get nothing else done."""
    run = minutes_a_step(fake_run(evaluation=QUIET), 4)
    save, now = checkpoint.save_checkpoint, time.monotonic

    def slowly(folder, saved):
        monkeypatch.setattr(time, "monotonic", lambda before=time.monotonic: before() + 60 * 15)
        return save(folder, saved)

    monkeypatch.setattr(checkpoint, "save_checkpoint", slowly)
    train_loop(run, StopRequest())
    assert now is not time.monotonic
    assert saved_steps(run) == [3, 6, 8]


def test_without_keep_best_none_is_saved_for_its_loss(fake_run):  # noqa: F811
    run = with_losses(fake_run(evaluation=VALIDATES), [9.0 - step for step in range(9)])
    train_loop(run, StopRequest())
    assert complete_steps(run.folder) == [8]
    assert "lowest validation loss" not in run.display.text


def test_the_losses_are_drawn_at_validations_and_however_the_run_ends(fake_run, monkeypatch):  # noqa: F811
    drawn = []
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)  # so that drawing takes no time
    monkeypatch.setattr(summary, "plot_loss", lambda log, path, **_: drawn.append(len(log.records("validation"))))
    train_loop(fake_run(evaluation=VALIDATES | {"validate_every": 4}), StopRequest())
    assert drawn == [1, 2, 3, 3]
    drawn.clear()
    (run := fake_run()).log.path.unlink()
    run = fake_run(losses={2: float("nan")}, evaluation=QUIET)
    with pytest.raises(Gpt2JaxError, match="finite"):
        train_loop(run, StopRequest())
    assert drawn == [0]


def test_drawing_takes_at_most_a_twentieth_of_the_time_and_its_failure_costs_a_line(fake_run, monkeypatch):  # noqa: F811
    now, drawn = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def draw(*_, **__):
        drawn.append(now[0])
        now[0] += 1
        raise RuntimeError("no font")

    monkeypatch.setattr(summary, "plot_loss", draw)
    run = fake_run(evaluation=VALIDATES, run={"steps": 40, "checkpoint_minutes": 0})
    compiled = run.compiled

    def step(*arguments):
        now[0] += 1
        return compiled(*arguments)

    run.compiled = step
    train_loop(run, StopRequest())
    assert drawn == [0.0, 21.0, 42.0, 43.0]  # the last one at the end
    assert run.display.text.count("RuntimeError: no font\nthe run goes on without it") == 1
