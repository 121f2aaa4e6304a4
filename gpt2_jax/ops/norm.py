"""LayerNorm, alone and joined with the linear layer behind it.

The op of a norm also returns its input, the residual stream: its backward then adds the cotangent that reaches the stream
around the norm in the same pass. A norm in front of a linear layer is one seam with it, since some devices do best when
the gain is folded into the weight. The result comes in `site.parts` equal parts (q, k and v), where the consumer wants so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from gpt2_jax.ops import folded
from gpt2_jax.ops.apple import fused, plugin
from gpt2_jax.ops.cpu import library
from gpt2_jax.ops.layer_norm import layer_norm
from gpt2_jax.ops.linear import linear
from gpt2_jax.ops.plain import plain
from gpt2_jax.ops.summed import Summed, is_summed
from gpt2_jax.ops.table import Implementation, always
from gpt2_jax.ops.threaded import Site, Slots, ThreadedOp, threaded
from gpt2_jax.ops.writer import write_gradient

if TYPE_CHECKING:
    from gpt2_jax.compute.plan import Plan


class Norms(NamedTuple):
    """The two threaded ops of one implementation."""

    norm: ThreadedOp  # names: gain, shift; x (..., C) -> (x, its norm)
    norm_linear: ThreadedOp  # names: gain, shift, weight, bias; x (..., C) -> (x, the linear layer of its norm in parts)
    # (bytes of an activation): those that norm_linear keeps of a channel for its backward, of input and norm
    keeps: Callable[[int], int] = lambda s: 2 * s
    folds: bool = False  # norm_linear keeps a copy of its weight with the gain in it


def norms_of(plan: Plan) -> Norms:
    return next(row.functions for row in TABLE if row.name == plan.norm_linear.name)


# The reference.


def _residual_and_norm(site: Site, x: jax.Array, gain_C: jax.Array, shift_C: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, layer_norm(x, gain_C, shift_C)


# By custom calls, on the CPU.


def _call_forward(site: Site, x: jax.Array, flat_N: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    gain_C, shift_C = (site.view(flat_N, name).array() for name in site.names)
    return (x, library.call(library.LAYER_NORM, _like(x), x, gain_C, shift_C)), x


def _call_backward(
    site: Site, x: jax.Array, flat_N: jax.Array, dy: tuple[jax.Array, jax.Array], gradient_N: jax.Array
) -> tuple[jax.Array, jax.Array, Slots]:
    dresidual, dh = dy
    gain, shift = site.names
    gain_C = site.view(flat_N, gain).array()
    results = (_like(x), _like(gain_C), _like(gain_C))
    dx, dgain_C, dshift_C = library.call(library.LAYER_NORM_BACKWARD, results, x, gain_C, dh, dresidual)
    gradient_N, gain_slot = write_gradient(site, gradient_N, gain, dgain_C)
    gradient_N, shift_slot = write_gradient(site, gradient_N, shift, dshift_C)
    return dx, gradient_N, {gain: gain_slot, shift: shift_slot}


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _followed_by_linear(
    norm: ThreadedOp, site: Site, x: Any, flat_N: jax.Array, slots: Slots
) -> tuple[tuple[Any, tuple[Any, ...]], jax.Array]:
    (x, h), flat_N = norm(site.over(*site.names[:2]), x, flat_N, {name: slots[name] for name in site.names[:2]})
    y, flat_N = linear(site.over(*site.names[2:]), h, flat_N, {name: slots[name] for name in site.names[2:]})
    return (x, _split(y, site.parts)), flat_N


def _split(y: Any, parts: int) -> tuple[Any, ...]:
    """Equal parts by the last axis, of an array or a Summed."""
    if parts == 1:
        return (y,)
    if is_summed(y):
        return tuple(map(Summed, jnp.split(y.value, parts, axis=-1), jnp.split(y.sums, parts)))
    return tuple(jnp.split(y, parts, axis=-1))


_plugin = fused.layer_norm_op(layer_norm)
_reference, _custom_call = plain(_residual_and_norm), threaded(_call_forward, _call_backward)
TABLE = (
    Implementation(
        "custom_call",
        library.refusal,
        "one pass over the rows",
        functions=Norms(_custom_call, partial(_followed_by_linear, _custom_call)),
    ),
    Implementation(
        "folded_kernel",
        folded.refuses_kernels,
        "gain and shift become part of the weight, a norm is one pass",
        functions=Norms(folded.norm_by_kernel, folded.norm_linear_by_kernels, keeps=lambda s: s, folds=True),
    ),
    Implementation(
        "folded",
        folded.refuses,
        "gain and shift become part of the weight",
        functions=Norms(_reference, folded.norm_linear, keeps=lambda s: s, folds=True),
    ),
    Implementation(
        "apple",
        plugin.refuses("layer_norm"),
        "one operation, keeps its input only",
        functions=Norms(
            _plugin,
            partial(_followed_by_linear, _plugin),
            keeps=lambda s: 2 * s + (4 if s < 4 else 0),  # the input in float32 as well
        ),
    ),
    Implementation(
        "xla",
        always,
        "the reference, on every device",
        functions=Norms(_reference, partial(_followed_by_linear, _reference)),
    ),
)
