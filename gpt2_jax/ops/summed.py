"""Activations whose cotangents bring their column sums.

The gradient of a bias is the sum over rows of the cotangent of what it was added to. An op's backward that has a cotangent
at hand, or knows its sums without adding, hands the sums on with it: no pass over the array for every bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from gpt2_jax.ops.cpu import library

if TYPE_CHECKING:
    from gpt2_jax.compute.plan import Plan

_FLOAT32 = jnp.dtype(jnp.float32)


@struct.dataclass
class Summed:
    """An activation. Its cotangent is a Summed too, whose `sums` are those of its `value` over all rows.

    Leave it by `value_of`, not by the field: the cotangent of a bare field has no sums.
    """

    value: jax.Array  # (..., C)
    sums: jax.Array  # (C,) float32: zero, and read by nobody; the cotangent's are what it is for

    def __add__(self, other: Summed) -> Summed:
        return Summed(lax.add(self.value, other.value), lax.add(self.sums, other.sums))


def summed(value: jax.Array) -> Summed:
    return Summed(value, lax.full(value.shape[-1:], 0, _FLOAT32))


def column_sums(plan: Plan, x: jax.Array) -> jax.Array:
    """Sums of x (..., C) over its rows, (C,) float32."""
    x_MC = x.reshape(-1, x.shape[-1])
    if library.serves(plan):
        return library.call(library.COLUMN_SUMS, jax.ShapeDtypeStruct(x_MC.shape[1:], _FLOAT32), x_MC)
    return jnp.sum(x_MC.astype(_FLOAT32), axis=0)


def with_sums(plan: Plan, x: Any) -> Any:
    """A pytree in which every array has its column sums."""
    return jax.tree_util.tree_map(
        lambda each: each if isinstance(each, Summed) else Summed(each, column_sums(plan, each)), x, is_leaf=is_summed
    )


def without_sums(x: Any) -> Any:
    """A pytree of bare arrays."""
    return jax.tree_util.tree_map(lambda each: each.value if is_summed(each) else each, x, is_leaf=is_summed)


def is_summed(x: Any) -> bool:
    return isinstance(x, Summed)


def value_of(plan: Plan, x: Summed) -> jax.Array:
    """The bare array, whose cotangent gets its sums here."""
    return _map(plan, lambda value: value, None, x).value


# (column sums of the cotangent of y, the cotangents of all x) -> the column sums of each of these
SumsOf = Callable[[jax.Array, Sequence[jax.Array]], Sequence[jax.Array]]


def mapped(plan: Plan, function: Callable[..., jax.Array], *x: Summed, sums: SumsOf | None = None) -> Summed:
    """function of the values. `sums` knows the cotangents' column sums without adding, where somebody does."""
    return _map(plan, function, sums, *x)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _map(plan: Plan, function: Callable[..., jax.Array], sums: SumsOf | None, *x: Summed) -> Summed:
    return summed(function(*(each.value for each in x)))


def _map_forward(
    plan: Plan, function: Callable[..., jax.Array], sums: SumsOf | None, *x: Summed
) -> tuple[Summed, Callable[[jax.Array], tuple[jax.Array, ...]]]:
    y, pull_back = jax.vjp(function, *(each.value for each in x))
    return summed(y), pull_back


def _map_backward(
    plan: Plan,
    function: Callable[..., jax.Array],
    sums: SumsOf | None,
    pull_back: Callable[[jax.Array], tuple[jax.Array, ...]],
    dy: Summed,
) -> tuple[Summed, ...]:
    dx = pull_back(dy.value)
    if sums is None:
        return tuple(with_sums(plan, dx))
    return tuple(map(Summed, dx, sums(dy.sums, dx)))


_map.defvjp(_map_forward, _map_backward)
