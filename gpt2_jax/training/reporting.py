"""What a step's metrics are shown and logged as, and the problem in them that ends a run."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gpt2_jax.compute.flops import flops_per_token
from gpt2_jax.compute.stability import not_finite
from gpt2_jax.compute.step import Metrics
from gpt2_jax.llmc.loader import Place
from gpt2_jax.report.display import Figures
from gpt2_jax.training.run_state import Run


class StepInFlight(NamedTuple):
    """A step whose metrics have not been read."""

    step: int
    metrics: Metrics
    places: list[Place]


def show_step(run: Run, done: StepInFlight) -> str | None:
    """Show and log one step; returns the reason for ending the run, if there is one."""
    config, metrics = run.config, done.metrics
    loss, norm, learning_rate = (float(value) for value in (metrics.loss, metrics.gradient_norm, metrics.learning_rate))
    loss_z, norm_z = np.asarray(metrics.verdict.z_scores).tolist()
    applied = bool(metrics.verdict.applies)
    if metrics.wishes is not None:
        run.hear(metrics.wishes)
    run.group.progress += 1
    seconds = run.clock.step_done()
    for stream in (run.rounding, *run.other_roundings):
        stream.step_done(run.data.num_micro_batches, applied=applied)
    flops = flops_per_token(run.plan.config, config.data.sequence_length) * config.tokens_per_step
    run.display.step(
        Figures(
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
