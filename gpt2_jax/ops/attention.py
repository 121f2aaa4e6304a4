"""Causal self-attention of all heads: a table of implementations.

An implementation takes q, k and v as one array (B, T, 3 C) or as three (B, T, C), whichever it says, and returns (B, T, C)
in their dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gpt2_jax.ops.apple import fused, plugin
from gpt2_jax.ops.cpu import library
from gpt2_jax.ops.matmul import ON_NVIDIA_ONLY
from gpt2_jax.ops.summed import column_sums
from gpt2_jax.ops.table import Implementation, always

if TYPE_CHECKING:
    from gpt2_jax.compute.plan import Plan


Drop = Callable[[jax.Array], jax.Array]


def attention(
    q_BTHD: jax.Array, k_BSHD: jax.Array, v_BSHD: jax.Array, seen_TS: jax.Array, drop: Drop | None = None
) -> jax.Array:
    """softmax(q kᵀ / sqrt(D), positions that are seen) v, (B, T, H, D) in the dtype of q; the softmax in float32.

    `drop` is given the softmax (B, H, T, S) in the dtype of q, and what it returns takes its place.
    """
    scores_BHTS = jnp.einsum("bthd,bshd->bhts", q_BTHD, k_BSHD, preferred_element_type=jnp.float32)
    scores_BHTS = jnp.where(seen_TS[None, None], scores_BHTS * (1.0 / math.sqrt(q_BTHD.shape[-1])), -jnp.inf)
    weights_BHTS = jax.nn.softmax(scores_BHTS, axis=-1).astype(q_BTHD.dtype)
    if drop is not None:
        weights_BHTS = drop(weights_BHTS)
    return jnp.einsum("bhts,bshd->bthd", weights_BHTS, v_BSHD)


def _cached_by_xla(plan: Plan, q_BTC: jax.Array, keys_BHSD: jax.Array, values_BHSD: jax.Array, start: jax.Array) -> jax.Array:
    T, S = q_BTC.shape[1], keys_BHSD.shape[2]
    own_TS = start + lax.broadcasted_iota(jnp.int32, (T, S), 0)
    seen_TS = lax.broadcasted_iota(jnp.int32, (T, S), 1) <= own_TS
    k_BSHD, v_BSHD = jnp.swapaxes(keys_BHSD, 1, 2), jnp.swapaxes(values_BHSD, 1, 2)
    return attention(by_heads(plan, q_BTC), k_BSHD, v_BSHD, seen_TS).reshape(q_BTC.shape)


class Attention(NamedTuple):
    # (plan, layer, *qkv) -> (B, T, C); where the plan drops out, also with drop=, a function of the softmax's result
    compute: Callable[..., jax.Array]
    parts: int  # arrays that hold q, k and v: 1 or 3
    keeps_scores: bool  # for the backward: B H T T elements
    # (plan, ...) as SumsOf: the column sums of the cotangents of q, k and v, where they are known without adding
    sums: Callable[[Plan, jax.Array, Sequence[jax.Array]], Sequence[jax.Array]] | None = None
    # (plan, q (B, T, C), keys (B, H, S, D), values, start): q stands at the positions from `start` on and sees those up to
    # its own; (B, T, C). Has no derivative.
    cached: Callable[[Plan, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array] = _cached_by_xla


def attention_of(plan: Plan) -> Attention:
    return next(row.functions for row in TABLE if row.name == plan.attention.name)


def causal_attention(q_BTHD: jax.Array, k_BTHD: jax.Array, v_BTHD: jax.Array, drop: Drop | None = None) -> jax.Array:
    """softmax(q kᵀ / sqrt(D), positions up to one's own) v, (B, T, H, D) in the dtype of q; the softmax in float32."""
    T = q_BTHD.shape[1]
    return attention(q_BTHD, k_BTHD, v_BTHD, jnp.tril(jnp.ones((T, T), dtype=bool)), drop)


def by_heads(plan: Plan, x_BTC: jax.Array) -> jax.Array:
    """(B, T, C) as (B, T, H, D)."""
    H = plan.config.num_heads
    return x_BTC.reshape(*x_BTC.shape[:-1], H, x_BTC.shape[-1] // H)


def _reference(plan: Plan, layer: int, qkv: jax.Array, drop: Drop | None = None) -> jax.Array:
    q, k, v = (by_heads(plan, part) for part in jnp.split(qkv, 3, axis=-1))
    out_BTHD = causal_attention(q, k, v, drop)
    return out_BTHD.reshape(*out_BTHD.shape[:-2], -1)


def _cudnn(plan: Plan, layer: int, q_BTC: jax.Array, k_BTC: jax.Array, v_BTC: jax.Array) -> jax.Array:
    q, k, v = (by_heads(plan, x) for x in (q_BTC, k_BTC, v_BTC))
    # XLA forgets to make all but the first of several equal backward passes deterministic, and then fails
    # (github.com/openxla/xla/pull/46500). A window of the whole sequence and more changes no result, and makes them differ.
    window = (q_BTC.shape[1] + layer, 0) if plan.deterministic else None
    # As an attribute of jax.nn, so that a plugin which replaces it is heeded.
    attend = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn", local_window_size=window)
    return attend(q, k, v).reshape(q_BTC.shape)


def _known_sums(plan: Plan, dout_sums_C: jax.Array, dqkv: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Every query's weights add up to 1. So a vector that is added to all keys changes no weight, and the cotangents of the
    keys add up to zero; one that is added to all values is added to every result, and their cotangents have one sum."""
    return column_sums(plan, dqkv[0]), jnp.zeros_like(dout_sums_C), dout_sums_C


def _plugin(plan: Plan, layer: int, qkv: jax.Array) -> jax.Array:
    out_BTHD = fused.attention(causal_attention, *(by_heads(plan, part) for part in jnp.split(qkv, 3, axis=-1)))
    return out_BTHD.reshape(*out_BTHD.shape[:-2], -1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _custom_call(plan: Plan, layer: int, qkv: jax.Array) -> jax.Array:
    return _custom_call_forward(plan, layer, qkv)[0]


def _custom_call_forward(plan: Plan, layer: int, qkv: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    B, T, three_C = qkv.shape
    log_sums_BHT = jax.ShapeDtypeStruct((B, plan.config.num_heads, T), jnp.float32)
    results = (jax.ShapeDtypeStruct((B, T, three_C // 3), qkv.dtype), log_sums_BHT)
    out_BTC, log_sums = library.call(library.ATTENTION, results, qkv, **_attributes(plan))
    return out_BTC, (qkv, out_BTC, log_sums)


def _custom_call_backward(plan: Plan, layer: int, saved: tuple[jax.Array, ...], dout_BTC: jax.Array) -> tuple[jax.Array]:
    dqkv = jax.ShapeDtypeStruct(saved[0].shape, saved[0].dtype)
    return (library.call(library.ATTENTION_BACKWARD, dqkv, *saved, dout_BTC, **_attributes(plan)),)


_custom_call.defvjp(_custom_call_forward, _custom_call_backward)


def _attributes(plan: Plan) -> dict[str, Any]:
    return {"num_heads": np.int64(plan.config.num_heads), **_products(plan)}


def _products(plan: Plan) -> dict[str, Any]:
    return {"implementation": plan.linear.name, "precision": plan.product_precision}


def _cached_by_custom_call(
    plan: Plan, q_BTC: jax.Array, keys_BHSD: jax.Array, values_BHSD: jax.Array, start: jax.Array
) -> jax.Array:
    result, names = jax.ShapeDtypeStruct(q_BTC.shape, q_BTC.dtype), _products(plan)
    return library.call(library.CACHED_ATTENTION, result, q_BTC, keys_BHSD, values_BHSD, start, **names)


def _without_dropout(accepts: Callable[[Plan], str | None]) -> Callable[[Plan], str | None]:
    """`accepts` of an implementation that never has the softmax in hand, and so cannot drop of it."""

    def refuses(plan: Plan) -> str | None:
        return accepts(plan) or ("cannot drop attention weights (--dropout)" if plan.dropout else None)

    return refuses


def _refuses_cudnn(plan: Plan) -> str | None:
    if "cuda_libraries" in plan.backend.lacks:
        return ON_NVIDIA_ONLY
    if plan.dtype != "bfloat16":
        return "in bfloat16 only"
    head_size = plan.config.channels // plan.config.num_heads
    if head_size % 8 or head_size > 128:
        return f"cuDNN takes heads of a multiple of 8 up to 128 channels, not {head_size}"
    return None


_BY_CUSTOM_CALL = Attention(_custom_call, parts=1, keeps_scores=False, cached=_cached_by_custom_call)
_BY_CUDNN = Attention(_cudnn, parts=3, keeps_scores=False, sums=_known_sums)
_BY_REFERENCE = Attention(_reference, parts=1, keeps_scores=True)
_BY_PLUGIN = Attention(_plugin, parts=1, keeps_scores=False)
TABLE = (
    Implementation("custom_call", _without_dropout(library.refusal), "keeps no scores", functions=_BY_CUSTOM_CALL),
    Implementation("cudnn", _without_dropout(_refuses_cudnn), "keeps no scores", functions=_BY_CUDNN),
    Implementation(
        "apple", _without_dropout(plugin.refuses("attention")), "one operation, keeps no scores", functions=_BY_PLUGIN
    ),
    Implementation("xla", always, "the reference, on every device", functions=_BY_REFERENCE),
)
