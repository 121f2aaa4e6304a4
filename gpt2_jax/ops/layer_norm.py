"""LayerNorm as a plain function."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

LAYERNORM_EPSILON = 1e-5
_FLOAT32 = jnp.dtype(jnp.float32)


def layer_norm(x: jax.Array, gain_C: jax.Array, shift_C: jax.Array) -> jax.Array:
    """(x - mean) / sqrt(variance + 1e-5) * gain + shift over the channels, in float32, returned in x's dtype."""
    leading = (1,) * (x.ndim - 1)
    n, _ = normed(x)
    return (n * gain_C.reshape(*leading, -1) + shift_C.reshape(*leading, -1)).astype(x.dtype)


def normed(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(x - mean) / deviation, and 1 / deviation, float32."""
    x = x.astype(_FLOAT32)
    centered = x - jnp.mean(x, axis=-1, keepdims=True)
    rstd = lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + LAYERNORM_EPSILON)
    return centered * rstd, rstd
