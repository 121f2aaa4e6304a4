"""Weights that come when an op needs them, and gradients that leave when a layer has made them: --zero 2 and 3.

A device keeps a row (N/D,) of the buffer, `layout.part(D)`. Of a layer's tensor, the devices' parts one after another are
the tensor; so gathering is joining, and a gradient's equal parts are those of the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from gpt2_jax.ops import collectives
from gpt2_jax.ops.recompute import barrier

if TYPE_CHECKING:
    from gpt2_jax.compute.plan import Plan
    from gpt2_jax.ops.threaded import Site, Slots


def at_hand(site: Site, flat: jax.Array, awaited: Any) -> tuple[Site, jax.Array]:
    """The buffer (N,) as an op reads it: itself if it is whole. Of a row (N/D,) the op's tensors alone, gathered from all
    devices, float32 with the values of the dtype of products.

    They travel when the arrays of `awaited` exist. So none is there long before its op; and the backward pass gathers anew,
    since XLA does not find its gathering equal to the forward pass's.
    """
    plan = site.plan
    if plan.zero < 3 or flat.size == plan.layout.num_parameters:
        return site, flat
    parts = [plan.layout.part(plan.devices)[name].of_layer(site.layer) for name in site.names]
    mine, _ = barrier(plan, lax.concatenate([lax.slice(flat, (part.offset,), (part.stop,)) for part in parts], 0), awaited)
    tensors = _columns(collectives.gathered_weights(plan, mine), [part.size for part in parts])
    return site._replace(packed=True), lax.concatenate([tensor.reshape(-1) for tensor in tensors], 0).astype(jnp.float32)


def scattered(plan: Plan, gradients: Sequence[jax.Array]) -> list[jax.Array]:
    """Of every device's gradients the sums of this rank's parts, each (size / D,); they travel together."""
    pieces = [gradient.reshape(plan.devices, -1) for gradient in gradients]
    sums = collectives.scattered_sum(plan, lax.concatenate(pieces, 1))
    return [column[0] for column in _columns(sums[None], [piece.shape[1] for piece in pieces])]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def scattering_slots(plan: Plan, slots: Slots) -> Slots:
    """Slots for the gradients of one layer's tensors. The cotangents of the slots given are this rank's parts (size / D,) of
    the sums of all devices' gradients."""
    return {name: jnp.zeros(plan.layout[name].shape, slot.dtype) for name, slot in slots.items()}


def _scattering_forward(plan: Plan, slots: Slots) -> tuple[Slots, None]:
    return scattering_slots(plan, slots), None


def _scattering_backward(plan: Plan, saved: None, gradients: Slots) -> tuple[Slots]:
    return (dict(zip(gradients, scattered(plan, list(gradients.values())), strict=True)),)


scattering_slots.defvjp(_scattering_forward, _scattering_backward)


def _columns(rows: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    """The blocks of so many columns each of a matrix."""
    stops = list(accumulate(sizes))
    return [lax.slice(rows, (0, stop - size), (rows.shape[0], stop)) for stop, size in zip(stops, sizes, strict=True)]
