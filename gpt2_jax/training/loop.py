"""The loop of a run: steps, and the events between them.

Metrics are read one step late, while the next step is computing, so that the device never waits for the display; where
a step has ended by the time that the call returns, they are read at once.
"""

from __future__ import annotations

import shlex
from typing import NamedTuple

import numpy as np

from gpt2_jax.compute.flops import flops_per_token
from gpt2_jax.compute.stability import not_finite
from gpt2_jax.compute.step import Metrics
from gpt2_jax.errors import Gpt2JaxError, as_typed
from gpt2_jax.jax_compat import is_ready
from gpt2_jax.llmc.loader import Place
from gpt2_jax.training.events import before_first_step, events_of, happen
from gpt2_jax.training.interrupts import StopRequest
from gpt2_jax.training.run_state import Run
from gpt2_jax.training.saving import save
from gpt2_jax.training.summary import draw, summarize


class _InFlight(NamedTuple):
    """A step whose metrics have not been read."""

    step: int
    metrics: Metrics
    places: list[Place]


def train_loop(run: Run, request: StopRequest) -> None:
    """Take the run from the step where it stands to its last one. SystemExit when it is stopped, Gpt2JaxError for a loss
    that is not finite; both after saving. However it ends, its losses are drawn."""
    run.stop = request
    try:
        _train(run)
    finally:
        draw(run)


def _train(run: Run) -> None:
    events = events_of(run)
    if run.step > 0:
        run.log_event("resume")
    happen(run, before_first_step(run, events))
    if run.is_stopping:
        _stop(run)
    in_flight: _InFlight | None = None
    batch = run.data.next_batch() if run.step < run.steps else None
    run.clock.restart()
    while batch is not None:
        run.state, metrics = run.compiled(run.state, batch.x_ABT, batch.y_ABT, *_seeds(run))
        run.step += 1
        if in_flight is not None:
            _report(run, in_flight, _InFlight(run.step, metrics, batch.places))
        in_flight = _InFlight(run.step, metrics, batch.places)
        last = run.step == run.steps
        due = [event for event in events if event.is_due(run.step, last=last)]
        # Rounding needs seeds, and which come next depends on whether this update was applied.
        if due or run.is_stopping or run.config.rounds_parameters or is_ready(metrics.loss):
            _report(run, in_flight, None)
            in_flight = None
        happen(run, due)
        if in_flight is None and run.is_stopping:
            if not run.is_saved:
                save(run)
            _stop(run)
        if due:
            run.clock.restart()
        batch = None if last else run.data.next_batch()
    summarize(run)


def _seeds(run: Run) -> tuple[np.ndarray, ...]:
    """The seeds that the next update rounds the parameters with, if it does."""
    return (run.rounding.next_seeds(run.data.num_micro_batches),) if run.config.rounds_parameters else ()


def _report(run: Run, done: _InFlight, later: _InFlight | None) -> None:
    """Wait for a step's metrics, show and log them. A loss or gradient that is not finite ends the run, if it is to: the
    state, which has no such update, is saved first, with that of a later step that has begun."""
    problem = _show(run, done)
    if problem is None:
        return
    if later is not None:
        _show(run, later)
    save(run)
    folder = shlex.quote(str(run.folder))
    raise Gpt2JaxError(
        f"{problem}; no parameter was changed by it",
        f"python scripts/train.py --resume --out-dir {folder} --nonfinite skip   (or with a lower --learning-rate)",
    )


def _show(run: Run, done: _InFlight) -> str | None:
    """Show and log one step; returns the reason for ending the run, if there is one."""
    config, metrics = run.config, done.metrics
    loss, norm, learning_rate = (float(value) for value in (metrics.loss, metrics.gradient_norm, metrics.learning_rate))
    loss_z, norm_z = np.asarray(metrics.verdict.z_scores).tolist()
    applied = bool(metrics.verdict.applies)
    seconds = run.clock.step_done()
    run.rounding.step_done(run.data.num_micro_batches, applied=applied)
    flops = flops_per_token(run.plan.config, config.data.sequence_length) * config.tokens_per_step
    run.display.step(
        done.step,
        run.steps,
        loss=loss,
        loss_z=loss_z,
        norm=norm,
        norm_z=norm_z,
        learning_rate=learning_rate,
        seconds=seconds,
        utilization=None if run.peak_flops is None else flops / seconds / run.peak_flops,
        tokens_per_second=run.clock.smoothed_tokens_per_second,
    )
    values = {"loss": loss, "norm": norm, "lr": learning_rate, "loss_z": loss_z, "norm_z": norm_z, "applied": applied}
    rates = {"seconds": seconds, "tokens_per_second": config.tokens_per_step / seconds}
    run.attempt(lambda: run.log.write("train", done.step, **values, **rates))
    if not metrics.verdict.is_finite:
        places = [f"{place.path} at token {place.token}" for place in done.places]
        problem = not_finite(done.step, loss, norm, np.asarray(metrics.squared_norms), run.plan.layout, places)
        if config.optimizer.nonfinite == "raise":
            return problem
        run.display.line(f"update skipped: {problem}")
    elif not applied:
        outlier = f"step {done.step} is an outlier, its loss {loss_z:+.2f}z, its gradient {norm_z:+.2f}z"
        run.display.line(f"update skipped: {outlier}")
    return None


def _stop(run: Run) -> None:
    """End the program as it was asked to, with the command that goes on."""
    newest = run.newest_checkpoint()
    run.display.line(f"stopped by {run.stop.reason} after step {run.step} of {run.steps}; {newest}")
    if "no checkpoint" not in newest:
        folder = shlex.quote(str(run.folder))
        run.display.line(as_typed(f"to go on:\npython scripts/train.py --resume --out-dir {folder}"))
    run.stop.end_program(saved=run.step == 0 or run.is_saved)
