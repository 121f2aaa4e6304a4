"""The loop of a run: steps, and the events between them.

Metrics are read one step late, while the next step is computing, so that the device never waits for the display; where
a step has ended by the time that the call returns, they are read at once.
"""

from __future__ import annotations

import shlex

import numpy as np

from gpt2_jax.compute.step import arguments
from gpt2_jax.errors import Gpt2JaxError, as_typed
from gpt2_jax.jax_compat import is_ready
from gpt2_jax.training.events import before_first_step, events_of, happen
from gpt2_jax.training.interrupts import StopRequest
from gpt2_jax.training.profiling import end_profile
from gpt2_jax.training.reporting import StepInFlight, show_step
from gpt2_jax.training.run_state import Run
from gpt2_jax.training.saving import save
from gpt2_jax.training.summary import draw, summarize


def train_loop(run: Run, request: StopRequest) -> None:
    """Take the run from the step where it stands to its last one. SystemExit when it is stopped, Gpt2JaxError for a loss
    that is not finite; both after saving. However it ends, its losses are drawn."""
    run.stop = request
    try:
        _train(run)
    finally:
        end_profile(run)
        draw(run)


def _train(run: Run) -> None:
    events = events_of(run)
    if run.step > 0:
        run.log_event("resume")
    if run.step > 0 and run.group.is_first:
        run.attempt(lambda: run.display.recall([*run.log.finite_values("train", "loss").values()]))
    happen(run, before_first_step(run, events))
    if run.is_stopping:
        _stop(run)
    in_flight: StepInFlight | None = None
    batch = run.data.next_batch() if run.step < run.steps else None
    run.clock.restart()
    while batch is not None:
        behind_state = arguments(run.plan, batch.x_ABT, batch.y_ABT, run.wishes, _seeds(run))
        run.state, metrics = run.compiled(run.state, *behind_state)
        run.step += 1
        if in_flight is not None:
            _report(run, in_flight, StepInFlight(run.step, metrics, batch.places))
        in_flight = StepInFlight(run.step, metrics, batch.places)
        last = run.step == run.steps
        due = [event for event in events if event.is_due(run.step, last=last)]
        # Rounding needs seeds, and which come next depends on whether this update was applied. Several processes must read
        # a step's metrics at the same place, whoever is ready first.
        is_early = run.group.number == 1 and is_ready(metrics.loss)
        if due or run.is_stopping or run.config.rounds_parameters or is_early:
            _report(run, in_flight, None)
            in_flight = None
        happen(run, due)
        if in_flight is None and run.is_stopping:
            if not run.is_saved:
                save(run)
            _stop(run)
        if not last and run.has_lost_patience and any(event.logged_as == "validation" for event in due):
            run.display.line(_lost_patience(run))
            happen(run, [event for event in events if event.at_end and event not in due])
            last = True
        if due:
            run.clock.restart()
        batch = None if last else run.data.next_batch()
    summarize(run)


def _seeds(run: Run) -> tuple[np.ndarray, ...]:
    """The seeds that the next update rounds the parameters with, if it does."""
    if not run.config.rounds_parameters:
        return ()
    seeds = run.rounding.next_seeds(run.data.num_micro_batches)
    if run.plan.zero == 0:
        return (seeds,)
    return (np.stack([seeds, *(stream.next_seeds(run.data.num_micro_batches) for stream in run.other_roundings)]),)


def _report(run: Run, done: StepInFlight, later: StepInFlight | None) -> None:
    """Wait for a step's metrics, show and log them. A loss or gradient that is not finite ends the run, if it is to: the
    state, which has no such update, is saved first, with that of a later step that has begun."""
    problem = show_step(run, done)
    if problem is None:
        return
    if later is not None:
        show_step(run, later)
    save(run)
    folder = shlex.quote(str(run.folder))
    raise Gpt2JaxError(
        f"{problem}; no parameter was changed by it",
        f"python scripts/train.py --resume --out-dir {folder} --nonfinite skip   (or with a lower --learning-rate)",
    )


def _lost_patience(run: Run) -> str:
    evaluation = run.config.evaluation
    best = "" if run.best is None else f" below {run.best.loss:.6f}, that of step {run.best.step}"
    return (
        f"ended early after step {run.step} of {run.steps}: {evaluation.patience} validations in a row "
        f"have not brought the loss{best} (--patience)"
    )


def _stop(run: Run) -> None:
    """End the program as it was asked to, with the command that goes on."""
    newest = run.newest_checkpoint()
    run.display.line(f"stopped by {run.stop.reason} after step {run.step} of {run.steps}; {newest}")
    if "no checkpoint" not in newest:
        folder = shlex.quote(str(run.folder))
        run.display.line(as_typed(f"to go on:\npython scripts/train.py --resume --out-dir {folder}"))
    is_saved = run.is_saved
    run.stop.end_program(saved=run.step == 0 or is_saved)
