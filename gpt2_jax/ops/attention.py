"""Causal self-attention of all heads."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def causal_attention(q_BTHD: jax.Array, k_BTHD: jax.Array, v_BTHD: jax.Array) -> jax.Array:
    """softmax(q kᵀ / sqrt(D), positions up to one's own) v, (B, T, H, D) in the dtype of q; the softmax in float32."""
    T, D = q_BTHD.shape[1], q_BTHD.shape[3]
    scores_BHTS = jnp.einsum("bthd,bshd->bhts", q_BTHD, k_BTHD, preferred_element_type=jnp.float32)
    causal_TS = jnp.tril(jnp.ones((T, T), dtype=bool))
    scores_BHTS = jnp.where(causal_TS[None, None], scores_BHTS * (1.0 / math.sqrt(D)), -jnp.inf)
    weights_BHTS = jax.nn.softmax(scores_BHTS, axis=-1).astype(q_BTHD.dtype)
    return jnp.einsum("bhts,bshd->bthd", weights_BHTS, v_BTHD)
