"""The end of a run: the picture of its losses, and its last lines."""

from __future__ import annotations

from gpt2_jax.compute.memory import measured_peak
from gpt2_jax.machine import gigabytes
from gpt2_jax.report.plots import plot_loss
from gpt2_jax.training.run_state import Run


def summarize(run: Run) -> None:
    """Draw the losses; print averages, peak memory, and the last validation loss beside the first."""
    plot_path = run.folder / "loss.png"
    run.attempt(lambda: plot_loss(run.log, plot_path, baseline=run.baseline))
    seconds = run.clock.average_seconds
    run.display.line(f"average: {seconds * 1000:.2f} ms a step, {run.config.tokens_per_step / seconds:.0f} tok/s")
    peak, of = measured_peak()
    run.display.line(f"peak memory: {gigabytes(peak)} {of}")
    losses: list[float] = []
    run.attempt(lambda: losses.extend(run.log.finite_values("validation", "loss").values()))
    if run.baseline is not None and losses:
        verdict = "below it: more than word frequencies was learned" if losses[-1] < run.baseline else "not below it yet"
        run.display.line(
            f"validation loss {losses[0]:.4f} -> {losses[-1]:.4f}; unigram cross-entropy {run.baseline:.4f}: {verdict}"
        )
    run.display.line(f"loss curve: {plot_path}\nlog:        {run.log.path}\nrun folder: {run.folder}")
