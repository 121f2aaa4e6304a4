"""Token and position embeddings: a table of threaded ops. Names: wte (V, C), wpe (P, C); x is tokens (B, T) int32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from gpt2_jax.ops.plain import plain
from gpt2_jax.ops.table import Implementation, always
from gpt2_jax.ops.threaded import Site, Slots, ThreadedOp, threaded
from gpt2_jax.ops.writer import write_gradient, write_rows

if TYPE_CHECKING:
    from gpt2_jax.compute.plan import Plan


def embedding_of(plan: Plan) -> ThreadedOp:
    return next(row.functions for row in TABLE if row.name == plan.embedding.name)


def _reference(site: Site, x_BT: jax.Array, wte_VC: jax.Array, wpe_PC: jax.Array) -> jax.Array:
    return (wte_VC[x_BT] + wpe_PC[: x_BT.shape[1]][None]).astype(site.plan.compute_dtype)


def _gather_forward(site: Site, x_BT: jax.Array, flat_N: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows of wte are gathered from the buffer itself: no copy of the whole matrix."""
    wte, wpe = (site.view(flat_N, name) for name in site.names)
    tokens_BTC = lax.gather(
        flat_N,
        (x_BT * wte.shape[1] + wte.offset)[..., None],
        lax.GatherDimensionNumbers(offset_dims=(2,), collapsed_slice_dims=(), start_index_map=(0,)),
        (wte.shape[1],),
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )
    return (tokens_BTC + wpe.rows(0, x_BT.shape[1]).array()[None]).astype(site.plan.compute_dtype), x_BT


def _gather_backward(
    site: Site, x_BT: jax.Array, flat_N: jax.Array, dy_BTC: jax.Array, gradient_N: jax.Array
) -> tuple[None, jax.Array, Slots]:
    tokens, positions = site.names
    gradient_N, wte_slot = write_rows(site, gradient_N, tokens, x_BT, dy_BTC)
    unused = site.plan.layout[positions].shape[0] - x_BT.shape[1]
    dwpe_PC = jnp.pad(jnp.sum(dy_BTC.astype(jnp.float32), axis=0), ((0, unused), (0, 0)))
    gradient_N, wpe_slot = write_gradient(site, gradient_N, positions, dwpe_PC)
    return None, gradient_N, {tokens: wte_slot, positions: wpe_slot}


def _refuses_gather(plan: Plan) -> str | None:
    return "gradients are not written in place" if plan.writer.name == "concatenate" else None


TABLE = (
    Implementation("gather", _refuses_gather, "no copy of the table", functions=threaded(_gather_forward, _gather_backward)),
    Implementation("xla", always, "the reference, on every device", functions=plain(_reference)),
)
