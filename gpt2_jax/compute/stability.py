"""Which updates are refused, decided on the device inside the compiled step: what is not finite, and outliers.

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
from jax import lax

from gpt2_jax import jax_compat
from gpt2_jax.buffer.layout import PlacedTensor
from gpt2_jax.ops.cpu import library as custom_calls

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


def squared_norms(grads_N: jax.Array, tensors: Sequence[PlacedTensor], *, custom_call: bool = False) -> jax.Array:
    """The sum of squares of each tensor's gradient, (S,) float32: not finite where the gradient is not.

    With `custom_call` (on the CPU) all threads add up, in float64.
    """
    if custom_call:
        custom_calls.load()
        return jax_compat.ffi_call(
            custom_calls.SUMS_OF_SQUARES,
            jax.ShapeDtypeStruct((len(tensors),), jnp.float32),
            grads_N,
            spans=np.array([(tensor.offset, tensor.stop) for tensor in tensors], dtype=np.int64).reshape(-1),
            num_threads=np.int64(custom_calls.num_threads()),
        )
    return jnp.stack([jnp.sum(jnp.square(lax.slice(grads_N, (tensor.offset,), (tensor.stop,)))) for tensor in tensors])
