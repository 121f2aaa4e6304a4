"""Which updates are refused, decided on the device inside the compiled step: what is not finite, and outliers.

llm.c's outlier detector (llmc/outlier_detector.h): the z-score of a step's loss and gradient norm among the last 128,
the step's own included, nan until 128 are there. llm.c keeps running sums in float64; here each score is computed anew
from the window in float32, which no device lacks.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

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


def judge(
    loss: jax.Array, gradient_norm: jax.Array, windows: jax.Array, *, max_loss_z: float, max_gradient_z: float
) -> tuple[Verdict, jax.Array]:
    """The verdict on a step, and the windows with its values; what is not finite leaves them as they were.

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
