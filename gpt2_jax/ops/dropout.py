"""Dropout: in training, elements become zero at random, and the others grow so that the mean stays.

Which elements those are is a function of the run's seed, the step, the micro-batch, the device, the layer and the place in
the layer, and of nothing else: nothing is kept for the backward pass, which computes it anew, and a resumed run drops what
the straight one would have.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gpt2_jax.llmc.rounding import noise_position, squirrel_noise

# The places of dropout in a model; each layer has its own of all of them.
PLACES = ("embedding", "attention", "attproj", "fcproj")


def noise_of_step(seed: int, step: jax.Array) -> jax.Array:
    """The uint32 scalar from which the noise of a step begins."""
    return squirrel_noise(step.astype(jnp.uint32), jnp.uint32(seed))


def noise_of(noise: jax.Array, number: int | jax.Array) -> jax.Array:
    """The noise (a uint32 scalar) of one of a step's micro-batches, of one of its devices, or of a place."""
    return squirrel_noise(jnp.asarray(number).astype(jnp.uint32), noise)


def noise_of_place(noise: jax.Array, layer: int, place: str) -> jax.Array:
    return noise_of(noise, layer * len(PLACES) + PLACES.index(place))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def dropped(rate: float, x: jax.Array, noise: jax.Array) -> jax.Array:
    """x with each element zeroed with probability `rate` (below 1), the others divided by 1 - rate; in x's dtype."""
    scaled = (x.astype(jnp.float32) * (1.0 / (1.0 - rate))).astype(x.dtype)
    return jnp.where(stays(rate, x.shape, noise), scaled, jnp.zeros((), x.dtype))


dropped.defvjp(
    lambda rate, x, noise: (dropped(rate, x, noise), noise),
    lambda rate, noise, dy: (dropped(rate, dy, noise), None),
)


def stays(rate: float, shape: tuple[int, ...], noise: jax.Array) -> jax.Array:
    """Which elements of an array of this shape are not zeroed: bool."""
    rows_and_columns = (math.prod(shape[:-1]), shape[-1])
    row, column = (lax.broadcasted_iota(jnp.uint32, rows_and_columns, axis) for axis in (0, 1))
    bits = squirrel_noise(noise_position(column, row), noise)
    return (bits >= np.uint32(round(rate * 2**32))).reshape(shape)
