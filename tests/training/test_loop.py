"""The loop around a step that is a Python function: what happens when, and what is left when something ends the run."""

from __future__ import annotations

import errno
import os
import re
import shlex
import signal
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from gpt2_jax.commands.command_line import parse_command_line
from gpt2_jax.compute.step import create_state
from gpt2_jax.config import RunConfig
from gpt2_jax.data.batches import open_data
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc import checkpoint_set
from gpt2_jax.llmc.rounding import RoundingStream
from gpt2_jax.report.display import Figures
from gpt2_jax.report.log import RunLog
from gpt2_jax.training import checkpoint, events, loop, summary
from gpt2_jax.training import evaluation as evaluation_of_runs
from gpt2_jax.training.interrupts import StopRequest
from gpt2_jax.training.loop import train_loop
from gpt2_jax.training.run_record import Averages
from gpt2_jax.training.run_state import Run, StepClock
from tests.conftest import TINY, change, plan_of
from tests.training.fake_step import FakeStep


@dataclass
class Recorder:
    """A display that keeps what it is told."""

    happened: list[str]
    lines: list[str] = field(default_factory=list)

    def line(self, text: str) -> None:
        self.lines.append(text)

    def step(self, figures: Figures) -> None:
        self.happened.append(f"read {figures.step}")

    def recall(self, losses) -> None:
        self.lines.append(f"recalled {len(losses)} losses")

    @contextmanager
    def counted(self, what: str, total: int):
        yield lambda: None

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


@pytest.fixture
def fake_run(config, tiny_params, tmp_path):
    """A function that makes a run of `config` with changes, whose step is fake."""

    def make(*, at: int = 0, ready: bool = False, losses: dict[int, float] | None = None, **sections) -> Run:
        changed: RunConfig = change(config, **sections)
        plan, folder = plan_of(TINY), Path(changed.run.out_dir)
        folder.mkdir(exist_ok=True)
        happened = []
        return Run(
            config=changed,
            plan=plan,
            data=open_data(changed, TINY),
            steps=changed.run.steps,
            folder=folder,
            display=Recorder(happened),
            log=RunLog(folder / "log.jsonl", changed.tokens_per_step),
            computed_by="a test",
            peak_flops=None,
            compiled=FakeStep(happened, losses or {}, ready, calls=at),
            loss_function=lambda *_: np.float32(2.5),
            token_loss_function=lambda params, x, y: np.zeros(x.shape, np.float32),
            state=create_state(plan, tiny_params),
            step=at,
            rounding=RoundingStream(num_tensors=16),
            clock=StepClock(changed.tokens_per_step, Averages()),
        )

    return make


@pytest.fixture
def noted(monkeypatch):
    """Let the events only be noted."""

    def note(run: Run) -> Run:
        for name in ("save", "validate", "answer_questions", "sample"):
            event = lambda run, name=name: run.display.happened.append(f"{name} {run.step}")  # noqa: E731
            monkeypatch.setattr(events, name, event)
        monkeypatch.setattr(loop, "save", events.save)
        monkeypatch.setattr(summary, "plot_loss", lambda *_, **__: None)
        return run

    return note


EVERY_SECOND = {"validate_every": 2, "sample_every": 2}


def happenings(run: Run, request: StopRequest | None = None) -> list[str]:
    train_loop(run, request or StopRequest())
    return run.display.happened


def test_events_come_in_their_order_at_the_start_between_steps_and_at_the_end(fake_run, noted, hellaswag):
    run = fake_run(run={"steps": 3, "checkpoint_every": 2}, evaluation={**EVERY_SECOND, "hellaswag": hellaswag})
    assert happenings(noted(run)) == [
        *("validate 0", "sample 0", "step 1", "step 2", "read 1", "read 2"),
        *("save 2", "validate 2", "answer_questions 2", "sample 2"),
        *("step 3", "read 3", "save 3", "validate 3", "answer_questions 3", "sample 3"),
    ]


def test_a_resumed_run_begins_with_its_next_step(fake_run, noted):
    run = fake_run(at=2, run={"steps": 3, "checkpoint_every": 2}, evaluation=EVERY_SECOND)
    for event in ("validation", "sample"):
        run.log.write(event, 2, loss=3.0)
    assert happenings(noted(run))[:2] == ["step 3", "read 3"]


def test_a_resumed_run_makes_up_for_what_its_step_was_due_for(fake_run, noted, hellaswag):
    """A run that stopped at a step had not come to these, or had given them up."""
    run = fake_run(at=2, run={"steps": 3, "checkpoint_every": 2}, evaluation={**EVERY_SECOND, "hellaswag": hellaswag})
    run.log.write("validation", 2, loss=3.0)
    assert happenings(noted(run))[:3] == ["answer_questions 2", "sample 2", "step 3"]


def test_a_resumed_run_whose_log_cannot_be_read_takes_its_step_for_done(fake_run, noted):
    run = fake_run(at=2, run={"steps": 3}, evaluation=EVERY_SECOND)
    run.log.path.mkdir()
    assert happenings(noted(run))[0] == "step 3"


@pytest.mark.parametrize("event", ["validate", "answer questions", "sample"])
def test_a_stop_during_an_event_gives_it_up_and_saves_its_step(fake_run, hellaswag, monkeypatch, event):
    """And a resumed run has the log of a straight one."""
    evaluation = {**EVERY_SECOND, "validation_batches": 3, "sample_tokens": 3, "hellaswag": hellaswag}
    straight = fake_run(run={"steps": 4, "out_dir": str(fake_run().folder / "straight")}, evaluation=evaluation)
    train_loop(straight, StopRequest())

    run, request = fake_run(run={"steps": 4}, evaluation=evaluation), StopRequest()

    def interrupted(function):
        def call(*arguments, **options):
            if run.step == 2:
                request.signal = signal.SIGTERM
            return function(*arguments, **options)

        return call

    function = {"validate": "validation_loss", "answer questions": "num_right_answers", "sample": "generate"}[event]
    with monkeypatch.context() as patch:
        patch.setattr(evaluation_of_runs, function, interrupted(getattr(evaluation_of_runs, function)))
        with pytest.raises(SystemExit) as ended:
            train_loop(run, request)
    assert ended.value.code == 143
    assert f"given up, as the run is to stop: {event}" in run.display.text
    assert run.compiled.calls == 2
    assert "stopped by SIGTERM after step 2 of 4; the newest checkpoint is of step 2" in run.display.text

    train_loop(fake_run(at=2, run={"steps": 4}, evaluation=evaluation), StopRequest())
    assert run.log.main_path.read_bytes() == straight.log.main_path.read_bytes()
    for name in ("train", "validation", "hellaswag", "sample"):
        steps = [[record["step"] for record in one.log.records(name)] for one in (run, straight)]
        assert steps[0] == steps[1]


def test_a_stop_that_could_not_save_says_so_with_its_status(fake_run, monkeypatch):
    def full(*_):
        raise Gpt2JaxError("model.bin: No space left on device")

    monkeypatch.setattr(checkpoint, "save_checkpoint", full)
    run = fake_run(evaluation={"validate_every": 0, "sample_every": 0})
    for request, status in ((StopRequest(1e-9), 1), (StopRequest(), 143)):
        request.signal = signal.SIGTERM if status == 143 else None
        run.step = 1
        with pytest.raises(SystemExit) as ended:
            train_loop(run, request)
        assert ended.value.code == status
    assert "the run goes on" not in run.display.text


def test_a_run_resumed_with_fewer_steps_reports_none_of_the_later_ones(fake_run):
    every = {"validate_every": 4, "sample_every": 0}
    train_loop(fake_run(evaluation=every), StopRequest())
    run = fake_run(at=4, run={"steps": 6}, evaluation=every)
    train_loop(run, StopRequest())
    assert [row["step"] for row in run.log.records("train")] == [1, 2, 3, 4, 5, 6]
    assert list(run.log.finite_values("validation", "loss")) == [0, 4, 6]
    assert [row["step"] for row in run.log.records("resume")] == [4]
    assert run.log.path.read_text().count('"event": "train"') == 8 + 2  # no line was lost


def test_metrics_are_read_one_step_late_and_all_before_an_event(fake_run, noted):
    run = fake_run(run={"steps": 5, "checkpoint_every": 3}, evaluation={"validate_every": 0, "sample_every": 0})
    assert happenings(noted(run)) == [
        *("step 1", "step 2", "read 1", "step 3", "read 2", "read 3", "save 3"),
        *("step 4", "step 5", "read 4", "read 5", "save 5"),
    ]


def test_metrics_that_are_there_are_read_at_once(fake_run, noted):
    """Otherwise the last line would be late by what the next batch takes to be read."""
    run = fake_run(ready=True, run={"steps": 3}, evaluation={"validate_every": 0, "sample_every": 0})
    assert happenings(noted(run)) == ["step 1", "read 1", "step 2", "read 2", "step 3", "read 3", "save 3"]


def test_seeds_wait_for_the_verdict_on_the_step_before(fake_run, noted):
    """Which come next depends on it: an update that was refused draws the embedding's alone."""
    sections = {"compute": {"dtype": "bfloat16"}, "optimizer": {"master_weights": False, "nonfinite": "skip"}}
    run = fake_run(losses={1: np.nan}, run={"steps": 3}, evaluation={"validate_every": 0, "sample_every": 0}, **sections)
    assert happenings(noted(run))[:4] == ["step 1", "read 1", "step 2", "read 2"]
    stream = RoundingStream(num_tensors=16)
    for (seeds,), applied in zip(run.compiled.seeds, (False, True, True), strict=True):
        np.testing.assert_array_equal(seeds, stream.next_seeds(1))
        stream.step_done(1, applied=applied)


@pytest.mark.parametrize("at", [0, 1])
def test_a_signal_before_the_first_step_ends_without_one(fake_run, noted, at):
    run, request = noted(fake_run(at=at, evaluation={"validate_every": 0, "sample_every": 0})), StopRequest()
    request.signal = signal.SIGINT
    with pytest.raises(SystemExit) as ended:
        train_loop(run, request)
    assert ended.value.code == 130
    assert run.display.happened == []


def test_a_stopped_run_saves_and_does_nothing_else(fake_run, noted, hellaswag):
    """Also at a step that is due for all of it: who asks for an end does not wait for a validation."""
    run = noted(fake_run(run={"steps": 5}, evaluation={**EVERY_SECOND, "hellaswag": hellaswag}))
    request, compiled = StopRequest(), run.compiled

    def interrupted(*arguments):
        if compiled.calls == 1:
            request.signal = signal.SIGTERM
        return compiled(*arguments)

    run.compiled = interrupted
    with pytest.raises(SystemExit) as ended:
        train_loop(run, request)
    assert ended.value.code == 143
    assert run.display.happened[2:] == ["step 1", "step 2", "read 1", "read 2", "save 2"]
    assert "stopped by SIGTERM after step 2 of 5; there is no checkpoint yet" in run.display.text


def test_a_signal_in_the_last_step_lets_the_run_end(fake_run, noted):
    run, request = noted(fake_run(run={"steps": 1}, evaluation={"validate_every": 1, "sample_every": 0})), StopRequest()
    compiled = run.compiled

    def interrupted(*arguments):
        request.signal = signal.SIGTERM
        return compiled(*arguments)

    run.compiled = interrupted
    assert happenings(run, request) == ["validate 0", "step 1", "read 1", "save 1", "validate 1"]
    assert "run folder: " in run.display.text


def test_without_validation_no_questions_are_answered(fake_run, noted, hellaswag):
    """They once were, after the last step."""
    run = fake_run(run={"steps": 2}, evaluation={"validate_every": 0, "sample_every": 0, "hellaswag": hellaswag})
    assert [one for one in happenings(noted(run)) if not one.startswith(("step", "read"))] == ["save 2"]


def test_hellaswag_is_scored_at_every_validation_but_the_first(fake_run, hellaswag):
    run = fake_run(evaluation={"hellaswag": hellaswag, "validate_every": 4, "sample_every": 0})
    train_loop(run, StopRequest())
    rows = run.log.records("hellaswag")
    assert [(row["step"], row["total"]) for row in rows] == [(4, 11), (8, 11)]
    lines = (run.folder / "main.log").read_text().splitlines()
    assert [line.split()[0] + " " + line.split()[1].split(":")[0] for line in lines] == [
        *["s:0 tel", "s:0 trl", "s:1 trl", "s:2 trl", "s:3 trl", "s:4 tel", "s:4 eval"],
        *["s:4 trl", "s:5 trl", "s:6 trl", "s:7 trl", "s:8 tel", "s:8 eval"],
    ]
    assert f"s:8 eval:{rows[-1]['right'] / 11:.4f}" in lines
    assert f"HellaSwag at step 8: {rows[-1]['right']}/11 = " in run.display.text


@pytest.mark.parametrize("ready", [False, True])
def test_a_loss_that_is_not_finite_saves_first_and_the_hint_goes_on(fake_run, ready, tiny_params):
    """Before the first --checkpoint-every there once was nothing to resume from."""
    run = fake_run(ready=ready, losses={2: np.nan}, evaluation={"validate_every": 0, "sample_every": 0})
    folder = run.folder.parent / "it's a run"
    run.folder.rename(folder)
    run.folder, run.log = folder, RunLog(folder / "log.jsonl")
    with pytest.raises(Gpt2JaxError) as raised:
        train_loop(run, StopRequest())
    assert raised.value.problem.startswith("step 2: expected a finite loss and gradient, found a loss of nan")
    # A step that had begun is done, and read too.
    step = 2 if ready else 3
    assert run.display.happened[-1] == f"read {step}"
    assert checkpoint_set.complete_steps(folder) == [step]
    np.testing.assert_array_equal(checkpoint.load_checkpoint(folder, step).params, tiny_params)

    command = shlex.split(raised.value.hint.partition("   (")[0])
    assert command[:2] == ["python", "scripts/train.py"]
    settings, *_ = parse_command_line(command[2:], "Train.")
    assert (settings.run.resume, settings.run.out_dir) == (True, str(folder))
    assert settings.optimizer.nonfinite == "skip"


def test_an_update_that_is_skipped_is_said_and_the_run_goes_on(fake_run):
    sections = {"optimizer": {"nonfinite": "skip"}, "evaluation": {"validate_every": 0, "sample_every": 0}}
    run = fake_run(losses={2: np.nan}, run={"steps": 4}, **sections)
    train_loop(run, StopRequest())
    assert run.display.text.count("update skipped: step 2: expected a finite loss") == 1
    assert [row["loss"] for row in run.log.records("train")] == [3.0, None, 3.0, 3.0]
    assert checkpoint_set.complete_steps(run.folder) == [4]


# Scripts read these: a key may be added, but not be renamed or taken away.
LOG_KEYS = {
    "train": [
        "event",
        "step",
        "time",
        "tokens",
        "loss",
        "norm",
        "lr",
        "loss_z",
        "norm_z",
        "applied",
        "seconds",
        "tokens_per_second",
    ],
    "validation": ["event", "step", "time", "tokens", "loss"],
    "hellaswag": ["event", "step", "time", "tokens", "right", "total", "accuracy"],
    "sample": ["event", "step", "time", "tokens", "text"],
}


def test_the_keys_of_the_log_are_frozen(fake_run, hellaswag):
    run = fake_run(run={"steps": 2}, evaluation={**EVERY_SECOND, "hellaswag": hellaswag, "sample_tokens": 1})
    train_loop(run, StopRequest())
    for event, keys in LOG_KEYS.items():
        assert [list(row) for row in run.log.records(event)][-1] == keys


def test_what_happens_between_steps_is_not_in_their_time(fake_run, monkeypatch):
    """A clock that only moves when a test says so: a step takes 1 s, saving an hour."""
    now = [0.0]
    monkeypatch.setattr("gpt2_jax.training.run_state.time.perf_counter", lambda: now[0])
    run = fake_run(ready=True, run={"steps": 4, "checkpoint_every": 1}, evaluation={"validate_every": 0, "sample_every": 0})
    compiled = run.compiled

    def in_a_second(*arguments):
        now[0] += 1
        return compiled(*arguments)

    def save_for_an_hour(run):
        now[0] += 3600

    run.compiled = in_a_second
    monkeypatch.setattr(events, "save", save_for_an_hour)
    train_loop(run, StopRequest())
    assert [row["seconds"] for row in run.log.records("train")] == [1.0] * 4
    assert run.clock.averages == Averages(3, 3.0, pytest.approx(1 - 0.95**3))
    assert "average: 1000.00 ms a step, 32 tok/s" in run.display.text


def test_a_step_that_looks_short_does_not_make_the_rate_explode(monkeypatch):
    """Rates were averaged once: one step of 1 us among steps of 1 s was a million tokens a second."""
    now = [0.0]
    monkeypatch.setattr("gpt2_jax.training.run_state.time.perf_counter", lambda: now[0])
    clock = StepClock(1000, Averages())
    for seconds in [5.0, *[1.0] * 50, 0.0]:
        now[0] += seconds
        clock.step_done()
    # Of the last 20 steps or so one took no time.
    assert 1000 < clock.smoothed_tokens_per_second < 1000 / 0.94
    assert clock.average_seconds == pytest.approx(50 / 51)


def test_old_checkpoints_are_deleted(fake_run):
    sections = {"run": {"checkpoint_every": 2, "keep_checkpoints": 1, "major_checkpoint_every": 4}}
    run = fake_run(evaluation={"validate_every": 0, "sample_every": 0}, **sections)
    train_loop(run, StopRequest())
    assert checkpoint_set.complete_steps(run.folder) == [4, 8]


def test_a_full_disk_is_reported_and_the_run_goes_on(fake_run, monkeypatch):
    replace = os.replace
    full = {"state_00000004_00000.bin"}

    def sometimes_full(source, target):
        if Path(target).name in full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", sometimes_full)
    sections = {"run": {"checkpoint_every": 2}, "evaluation": {"validate_every": 0, "sample_every": 0}}
    run = fake_run(**sections)
    train_loop(run, StopRequest())
    said = r"NO checkpoint of step 4: .*No space left on device.*\n.*the newest checkpoint is of step 2"
    assert re.search(said, run.display.text)
    assert checkpoint_set.complete_steps(run.folder) == [2, 6, 8]

    full.add("model_00000009.bin")
    with pytest.raises(Gpt2JaxError, match=r"model_00000009.bin: .*No space left"):
        train_loop(fake_run(at=8, **change_steps(sections, 9)), StopRequest())
    assert checkpoint_set.newest_step(run.folder) == 8


def change_steps(sections, steps):
    return sections | {"run": sections["run"] | {"steps": steps}}


def test_a_log_that_cannot_be_written_is_said_once_and_the_run_goes_on(fake_run, monkeypatch):
    def refuse(*_, **__):
        raise Gpt2JaxError("log.jsonl: expected to append to the log, found: No space left on device")

    run = fake_run(evaluation={"sample_tokens": 1})
    monkeypatch.setattr(RunLog, "write", refuse)
    train_loop(run, StopRequest())
    assert run.display.text.count("log.jsonl: expected to append to the log, found: No space left on device") == 1
    assert checkpoint_set.newest_step(run.folder) == 8


def test_a_log_that_became_a_folder_does_not_end_the_run(fake_run):
    run = fake_run(evaluation={"sample_every": 0})
    run.log.path.mkdir()
    train_loop(run, StopRequest())
    assert "log.jsonl: expected a log, found a folder\nthe run goes on without it" in run.display.text
    assert f"run folder: {run.folder}" in run.display.text


def test_a_validation_loss_that_is_not_finite_is_no_crash(fake_run):
    run = fake_run(evaluation={"validate_every": 2, "sample_every": 0})
    run.loss_function, run.baseline = lambda *_: np.float32(np.nan), 4.0
    train_loop(run, StopRequest())
    assert "validation loss at step 8: nan" in run.display.text
    assert f"run folder: {run.folder}" in run.display.text


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (3.5, "below it: more than word frequencies"),
        (4.5, "not below it yet"),
        (5.5, "not below the run's first validation: the run made the model no better"),
        (5.0, "not below the run's first validation"),
    ],
)
def test_the_end_says_what_was_learned(fake_run, last, words):
    run = fake_run(run={"steps": 1}, evaluation={"validate_every": 1, "validation_batches": 1, "sample_every": 0})
    losses = iter([5.0, last])
    run.loss_function, run.baseline = lambda *_: np.float32(next(losses)), 4.0
    train_loop(run, StopRequest())
    assert f"validation loss 5.0000 -> {last:.4f}; unigram cross-entropy 4.0000: {words}" in run.display.text


def test_a_fine_tuning_that_made_a_good_model_worse_is_said_to_have(fake_run):
    run = fake_run(run={"steps": 2}, evaluation={"validate_every": 1, "validation_batches": 1, "sample_every": 0})
    losses = iter([3.5, 3.2, 3.6])
    run.loss_function, run.baseline = lambda *_: np.float32(next(losses)), 4.0
    train_loop(run, StopRequest())
    assert "validation loss 3.5000 -> 3.6000 (lowest at step 1: 3.2000)" in run.display.text
    assert "more than word frequencies" not in run.display.text
