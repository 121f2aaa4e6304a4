"""Which updates are refused: those that are not finite, and outliers. Decided on the device, inside the compiled step.

llm.c's outlier detector (llmc/outlier_detector.h): the z-score of a step's loss and gradient norm among the last 128,
the step's own included, nan until 128 are there. llm.c keeps running sums in float64; here each score is computed anew
from the window in float32, which no device lacks.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from gpt2_jax.buffer.layout import ParameterLayout

WINDOW = 128
WATCHED = ("loss", "gradient_norm")  # the rows of the windows


@struct.dataclass
class Verdict:
    """On one step's update."""

    applies: jax.Array  # bool: it is finite and no outlier
    is_finite: jax.Array  # bool: loss and gradient norm are
    z_scores: jax.Array  # (2,) float32, of WATCHED


def empty_windows() -> np.ndarray:
    """Windows (2, 128) float32 of a fresh run: nan where no value is yet, the newest value last."""
    return np.full((len(WATCHED), WINDOW), np.nan, dtype=np.float32)


def not_finite(
    step: int, loss: float, norm: float, squared_norms: np.ndarray, layout: ParameterLayout, batches: Sequence[str]
) -> str:
    """The first line of the error for a step that is not finite: expected and found, the tensors and the batches to look at."""
    names = [tensor.name for tensor, value in zip(layout.tensors, squared_norms, strict=True) if not np.isfinite(value)]
    tensors = "all tensors" if len(names) == len(layout.tensors) else ", ".join(names) or "no single tensor"
    return (
        f"step {step}: expected a finite loss and gradient, found a loss of {loss} and a gradient norm of {norm}, not finite "
        f"in {tensors}, for the batch of {'; '.join(batches[:8])}{' ...' if len(batches) > 8 else ''}"
    )


def judge(
    loss: jax.Array, gradient_norm: jax.Array, windows: jax.Array, *, max_loss_z: float, max_gradient_z: float
) -> tuple[Verdict, jax.Array]:
    """The verdict on a step, and the windows with its values; values that are not finite leave them as they were.

    An update is an outlier if a z-score exceeds its threshold; a threshold of 0 is none.
    """
    values = jnp.stack([loss, gradient_norm])
    is_finite = jnp.isfinite(values).all()
    oldest = windows[:, 0]
    moved = jnp.concatenate([windows[:, 1:], values[:, None]], axis=1)
    mean = jnp.mean(moved, axis=1)
    deviation = jnp.sqrt(jnp.mean(jnp.square(moved - mean[:, None]), axis=1))
    scores = jnp.where(deviation == 0, 0.0, (values - mean) / deviation)
    # llm.c scores a value only if it pushes another one out of a full window.
    z_scores = jnp.where(jnp.isnan(oldest), jnp.nan, scores)
    thresholds = np.array([threshold or np.inf for threshold in (max_loss_z, max_gradient_z)], dtype=np.float32)
    applies = is_finite & ~(z_scores > thresholds).any()
    return Verdict(applies, is_finite, z_scores), jnp.where(is_finite, moved, windows)
