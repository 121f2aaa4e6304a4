"""The events between steps, in their order: saving, validating, answering questions, sampling, profiling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.training.evaluation import answer_questions, sample, validate
from gpt2_jax.training.interrupts import StoppedError
from gpt2_jax.training.profiling import is_time_to_profile, profile
from gpt2_jax.training.run_state import Run
from gpt2_jax.training.saving import is_time_to_save, save, save_by_time


@dataclass(frozen=True)
class Event:
    """Something that a run does every so many steps."""

    name: str
    every: int  # steps; 0: not by their number
    run: Callable[[Run], None]
    at_start: bool = False  # before the first step of a fresh run
    at_end: bool = True  # after the last step
    is_time: Callable[[], bool] = lambda: False  # asked after every step
    logged_as: str = ""  # the event of its records in the log

    def is_due(self, step: int, *, last: bool = False) -> bool:
        """Whether it happens after this step."""
        return (last and self.at_end) or (self.every > 0 and step % self.every == 0) or self.is_time()


def events_of(run: Run) -> list[Event]:
    """The events of a run, in the order in which they happen after a step."""
    evaluation = run.config.evaluation
    events = [
        Event("save", run.config.run.checkpoint_every, save),
        Event("save by time", 0, save_by_time, at_end=False, is_time=partial(is_time_to_save, run)),
    ]
    if run.data.validation is not None:
        events.append(Event("validate", evaluation.validate_every, validate, at_start=True, logged_as="validation"))
    if run.data.questions and evaluation.validate_every:
        events.append(Event("answer questions", evaluation.validate_every, answer_questions, logged_as="hellaswag"))
    if evaluation.sample_every:
        events.append(Event("sample", evaluation.sample_every, sample, at_start=True, logged_as="sample"))
    events.append(Event("profile", 0, profile, at_end=False, is_time=partial(is_time_to_profile, run)))
    return events


def before_first_step(run: Run, events: list[Event]) -> list[Event]:
    """The events that a fresh run begins with; of a resumed one those of its step that were given up or not come to."""
    if run.step == 0:
        return [event for event in events if event.at_start]
    due = [event for event in events if event.logged_as and event.is_due(run.step)]
    missing = run.group.broadcast(lambda: [event.name for event in due if not _is_logged(run, event)])
    return [event for event in due if event.name in missing]


def _is_logged(run: Run, event: Event) -> bool:
    """Whether the log has this event of the run's step; taken for granted where it cannot be read."""
    try:
        return any(record["step"] == run.step for record in run.log.records(event.logged_as))
    except Gpt2JaxError:
        return True


def happen(run: Run, events: list[Event]) -> None:
    """Let events happen, until the run is to stop: what they do then gives way to saving."""
    for event in events:
        try:
            run.give_way()
            event.run(run)
        except StoppedError:
            run.display.line(f"given up, as the run is to stop: {event.name}")
