"""The picture of a run's loss."""

from __future__ import annotations

import os

from gpt2_jax.files import atomic_write
from gpt2_jax.report.log import RunLog


def plot_loss(log: RunLog, path: str | os.PathLike, *, baseline: float | None = None) -> None:
    """A PNG of the run's training and validation loss over its steps, with the unigram cross-entropy as a line;
    Gpt2JaxError when it cannot be written."""
    # A figure of its own canvas: no display, and none of pyplot's global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for event, style in (("train", {"linewidth": 1.0}), ("validation", {"marker": "o", "markersize": 4})):
        losses = log.finite_values(event, "loss")
        axes.plot(list(losses), list(losses.values()), label=event, **style)
    if baseline is not None:
        axes.axhline(baseline, color="gray", linestyle="--", label=f"unigram cross-entropy ({baseline:.2f})")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
