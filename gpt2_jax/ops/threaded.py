"""Ops through which the flat parameter buffer is threaded, so that their backward passes write gradients where they belong.

A threaded op is a function (x, flat, slots) -> (y, flat). Forward it reads its weights where they lie in `flat`
(num_parameters,) and passes the buffer on untouched. Backward it takes the buffer's cotangent, which is the gradient
buffer while it is being filled, writes its own gradient into it, and passes that on: no sum over whole buffers, no
concatenation.

`slots` are inputs without content: one array for each of the op's tensors, whose cotangent carries to the end of the
backward pass what is not written at once. ops/writer.py says what a slot holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from gpt2_jax.ops.sharded import at_hand
from gpt2_jax.ops.summed import is_summed, summed, with_sums, without_sums

if TYPE_CHECKING:
    from gpt2_jax.compute.plan import Plan

Slots = dict[str, jax.Array]  # by tensor


@struct.dataclass
class WeightView:
    """A tensor by its place in a flat buffer: what a custom call needs to read or write it there, without a copy."""

    buffer: jax.Array  # (N,)
    offset: int = struct.field(pytree_node=False)  # elements
    shape: tuple[int, ...] = struct.field(pytree_node=False)

    def array(self) -> jax.Array:
        """The tensor as an array of its own: outside a fusion of XLA's, a copy."""
        return lax.slice(self.buffer, (self.offset,), (self.offset + math.prod(self.shape),)).reshape(self.shape)

    def rows(self, start: int, stop: int) -> WeightView:
        """Rows [start, stop)."""
        row = math.prod(self.shape[1:])
        return WeightView(self.buffer, self.offset + start * row, (stop - start, *self.shape[1:]))


class Site(NamedTuple):
    """An op's place in a model and its options: the static argument of every threaded op."""

    plan: Plan
    names: tuple[str, ...]  # of its tensors, in the op's own order
    layer: int = 0
    parts: int = 1  # equal parts that its result comes in, by the last axis
    accumulate: bool = False  # gradients are added to what the gradient buffer holds, rather than written over it
    added: tuple[str, ...] = ()  # of these tensors the buffer holds a part of this step's gradient already
    packed: bool = False  # the buffer of weights holds the tensors of `names` alone, one after another

    def over(self, *names: str) -> Site:
        """The same place for an op over other tensors."""
        return self._replace(names=names)

    def adds(self, name: str) -> bool:
        """Whether a tensor's gradient is added to what the gradient buffer holds."""
        return self.accumulate or name in self.added

    def view(self, flat_N: jax.Array, name: str) -> WeightView:
        tensor = self.plan.layout[name]
        if self.packed:
            before = self.names[: self.names.index(name)]
            return WeightView(flat_N, sum(self.plan.layout[other].layer_size for other in before), tensor.shape)
        return WeightView(flat_N, tensor.layer_offset(self.layer), tensor.shape)


def rounded(weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """A float32 weight in the dtype of products.

    XLA would move a bare cast of a slice above the slice, and so cast the whole buffer; it does not move
    reduce_precision.
    """
    if weight.dtype == dtype:
        return weight
    bits = jnp.finfo(dtype)
    return lax.reduce_precision(weight, bits.nexp, bits.nmant).astype(dtype)


# (site, x, flat_N) -> (y, saved)
Forward = Callable[[Site, Any, jax.Array], tuple[Any, Any]]
# (site, saved, flat_N, dy, gradient_N) -> (dx, gradient_N, the slots' cotangents)
Backward = Callable[[Site, Any, jax.Array, Any, jax.Array], tuple[Any, jax.Array, Slots]]
# (site, x, flat_N, slots) -> (y, flat_N)
ThreadedOp = Callable[[Site, Any, jax.Array, Slots], tuple[Any, jax.Array]]


def threaded(forward: Forward, backward: Backward, *, knows_sums: bool = False) -> ThreadedOp:
    """The threaded op of a forward and a backward function. x and y are pytrees of arrays, or of `Summed`.

    Both functions are about bare arrays; the buffer of weights that they are given may be one that ops/sharded.py made for
    the op. With `knows_sums` the backward is given dy as a pytree of `Summed`, and may return such for dx where it knows the
    sums; what it leaves out is added up here.
    """

    def compute(site: Site, hands_on: bool, x: Any, flat_N: jax.Array) -> tuple[Any, Any]:
        x = without_sums(x)
        here, weights = at_hand(site, flat_N, x)
        y, saved = forward(here, x, weights)
        return (jax.tree_util.tree_map(summed, y) if hands_on else y), saved

    @partial(jax.custom_vjp, nondiff_argnums=(0, 1))
    def op(site: Site, hands_on: bool, x: Any, flat_N: jax.Array, slots: Slots) -> tuple[Any, jax.Array]:
        return compute(site, hands_on, x, flat_N)[0], flat_N

    def op_forward(site: Site, hands_on: bool, x: Any, flat_N: jax.Array, slots: Slots) -> tuple[Any, Any]:
        y, saved = compute(site, hands_on, x, flat_N)
        return (y, flat_N), (saved, flat_N)

    def op_backward(
        site: Site, hands_on: bool, residuals: Any, cotangents: tuple[Any, jax.Array]
    ) -> tuple[Any, jax.Array, Slots]:
        (saved, flat_N), (dy, gradient_N) = residuals, cotangents
        here, weights = at_hand(site, flat_N, without_sums(dy))
        dy = with_sums(site.plan, dy) if knows_sums else without_sums(dy)
        # Where weights are gathered, gradients leave in slots.
        buffer = gradient_N if weights is flat_N else jnp.zeros_like(weights)
        dx, buffer, slots = backward(here, saved, weights, dy, buffer)
        gradient_N = buffer if weights is flat_N else gradient_N
        return (with_sums(site.plan, dx) if hands_on else without_sums(dx)), gradient_N, slots

    op.defvjp(op_forward, op_backward)

    def on_arrays_or_summed(site: Site, x: Any, flat_N: jax.Array, slots: Slots) -> tuple[Any, jax.Array]:
        hands_on = any(map(is_summed, jax.tree_util.tree_leaves(x, is_leaf=is_summed)))
        return op(site, hands_on, x, flat_N, slots)

    return on_arrays_or_summed
