"""Recomputation in the backward pass: one wrapper for every part of a model, and its barrier."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
from jax import lax

from gpt2_jax import jax_compat
from gpt2_jax.ops.cpu import library
from gpt2_jax.ops.table import Fallback, Implementation, always

if TYPE_CHECKING:
    from gpt2_jax.compute.plan import Plan
    from gpt2_jax.ops.threaded import Site, Slots, ThreadedOp

# For each choice of --recompute the parts of a block that the backward pass computes anew from their inputs. "gelu" and
# "layer_norm" go up to the product behind them, which keeps its input otherwise and is itself not made twice.
RECOMPUTED: dict[str, tuple[str, ...]] = {
    "none": (),
    "gelu": ("gelu",),
    "layernorm": ("gelu", "layer_norm"),
    "block": ("block",),
}


def recomputed_if_asked(part: str, op: ThreadedOp, site: Site) -> ThreadedOp:
    """The op, or one that keeps only its input, if the plan computes this part anew."""
    return partial(_recomputed, op) if part in RECOMPUTED[site.plan.recompute] else op


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _recomputed(op: ThreadedOp, site: Site, x: Any, flat_N: jax.Array, slots: Slots) -> tuple[Any, jax.Array]:
    return op(site, x, flat_N, slots)


def _forward(op: ThreadedOp, site: Site, x: Any, flat_N: jax.Array, slots: Slots) -> tuple[Any, Any]:
    return op(site, x, flat_N, slots), (x, flat_N, slots)


def _backward(op: ThreadedOp, site: Site, saved: Any, cotangents: tuple[Any, jax.Array]) -> tuple[Any, jax.Array, Slots]:
    x, flat_N, slots = saved
    # Without a barrier XLA would find both computations equal, and keep the first one's values after all.
    # The gradient buffer is awaited too, where the ops before have written into it.
    dy, gradient_N = cotangents
    if site.plan.writes_in_place:
        x, (dy, gradient_N) = barrier(site.plan, x, (dy, gradient_N))
    else:
        x, dy = barrier(site.plan, x, dy)
    _, pull_back = jax.vjp(partial(op, site), x, flat_N, slots)
    dx, gradient_N, dslots = pull_back((dy, gradient_N))
    # The cotangent waits for the gradients in slots, so that their inputs' memory can be reused.
    dx, dslots = barrier(site.plan, dx, dslots)
    return dx, gradient_N, dslots


_recomputed.defvjp(_forward, _backward)


def barrier(plan: Plan, x: Any, others: Any) -> tuple[Any, Any]:
    """Delay the arrays of x (a pytree) until the others (a pytree) exist, so that their inputs' memory can be reused.

    Go on with the others that are returned: XLA copies an array that goes through its barrier and is written in place
    beside it.
    """
    if plan.barrier.name != "custom_call":
        return lax.optimization_barrier((x, others))
    library.load()
    leaves = jax.tree_util.tree_leaves(others)

    def delayed(each: jax.Array) -> jax.Array:
        result = jax.ShapeDtypeStruct(each.shape, each.dtype)
        return jax_compat.ffi_call(library.BARRIER, result, each, *leaves, aliases={0: 0})

    return jax.tree_util.tree_map(delayed, x), others


def saves_memory(plan: Plan) -> bool:
    """Whether recomputation saves memory: the compiler must heed the barrier."""
    return plan.barrier.name == "custom_call" or "barriers" not in plan.backend.lacks


def _refuses_custom_call(plan: Plan) -> str | None:
    if reason := library.refusal(plan):
        return reason
    return None if jax_compat.ffi_call_can_alias() else Fallback("this jax cannot alias a custom call's argument and result")


TABLE = (
    Implementation("custom_call", _refuses_custom_call, "XLA's compiler for the CPU keeps it"),
    Implementation("xla", always, "the reference, on every device"),
)
