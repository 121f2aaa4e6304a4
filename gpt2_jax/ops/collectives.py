"""The only file that sends anything from one device to another. Its functions are called by every device, inside of
compute/parallel.py's `on_every_device`, and do nothing else.

Sums are jax's own, or with `adds_in_rank_order` exchanges and additions in the order of ranks: the same bits on every
backend and in every run, for one buffer more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

if TYPE_CHECKING:
    from gpt2_jax.compute.plan import Plan

AXIS = "data"


def adds_in_rank_order(plan: Plan) -> bool:
    """Whether sums over devices are exchanges and additions, rather than jax's own sums."""
    return plan.deterministic or "reduce_scatter" in plan.backend.lacks


def sum_everywhere(plan: Plan, value: jax.Array) -> jax.Array:
    """The sum of a small array over all devices, on every device."""
    if not adds_in_rank_order(plan):
        return lax.psum(value, AXIS)
    return _in_order(lax.all_gather(value, AXIS))


def scattered_sum(plan: Plan, pieces_DM: jax.Array) -> jax.Array:
    """Of every device's pieces, one for each rank, the sum (M,) of those for this device."""
    if not adds_in_rank_order(plan):
        return lax.psum_scatter(pieces_DM, AXIS, scatter_dimension=0, tiled=True)[0]
    return _in_order(lax.all_to_all(pieces_DM, AXIS, 0, 0, tiled=True))


def whole_sum(plan: Plan, value_M: jax.Array) -> jax.Array:
    """The sum (M,) of a long array over all devices, on every device."""
    if not adds_in_rank_order(plan):
        return lax.psum(value_M, AXIS)
    size = value_M.shape[0]
    padded = jnp.pad(value_M, (0, -size % plan.devices)).reshape(plan.devices, -1)
    return lax.all_gather(scattered_sum(plan, padded), AXIS, tiled=True)[:size]


def gathered(part_M: jax.Array) -> jax.Array:
    """The parts of all devices, (D, M) by rank."""
    return lax.all_gather(part_M, AXIS)


def gathered_weights(plan: Plan, part_M: jax.Array) -> jax.Array:
    """The parts of all devices' float32 weights as the dtype of products has them, (D, M) in that dtype.

    bfloat16 values travel as integers of 2 bytes: XLA would gather float32 and convert it after.
    """
    if plan.dtype == "float32":
        return gathered(part_M)
    # reduce_precision is a rounding that XLA does not take for the conversion's inverse and remove.
    narrow = lax.reduce_precision(part_M, 8, 7).astype(jnp.bfloat16)
    return lax.bitcast_convert_type(gathered(lax.bitcast_convert_type(narrow, jnp.uint16)), jnp.bfloat16)


def _in_order(values: jax.Array) -> jax.Array:
    """The sum over the leading axis, one after another, so that the bits depend on the order of ranks alone."""
    total = values[0]
    for rank in range(1, values.shape[0]):
        total = total + values[rank]
    return total
