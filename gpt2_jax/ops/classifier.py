"""From the last hidden states to logits and to the loss, over the true vocabulary only."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from gpt2_jax.ops.linear import linear


def logits(h_BTC: jax.Array, wte_VC: jax.Array, vocab_size: int, *, matmul: str = "xla") -> jax.Array:
    """Logits (B, T, V) float32, V the padded vocabulary; the padding columns are -inf, so they get no probability and
    wte's padding rows no gradient."""
    logits_BTV = linear(h_BTC, wte_VC, out_dtype=jnp.float32, implementation=matmul)
    return jnp.where(_columns(logits_BTV) < vocab_size, logits_BTV, -jnp.inf)


def mean_loss(h_BTC: jax.Array, wte_VC: jax.Array, y_BT: jax.Array, vocab_size: int, *, matmul: str = "xla") -> jax.Array:
    """Mean cross-entropy of the targets, a float32 scalar, in nats per token."""
    return jnp.mean(token_losses(h_BTC, wte_VC, y_BT, vocab_size, matmul=matmul))


def token_losses(h_BTC: jax.Array, wte_VC: jax.Array, y_BT: jax.Array, vocab_size: int, *, matmul: str = "xla") -> jax.Array:
    """Cross-entropy of every target, (B, T) float32, in nats.

    The target's logit is picked by comparing with an iota, which every backend can do; a gather cannot be compiled by
    some of the Apple plugins.
    """
    logits_BTV = logits(h_BTC, wte_VC, vocab_size, matmul=matmul)
    is_target_BTV = _columns(logits_BTV) == y_BT[..., None]
    target_logit_BT = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0.0), axis=-1)
    return jax.nn.logsumexp(logits_BTV, axis=-1) - target_logit_BT


def _columns(logits_BTV: jax.Array) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, logits_BTV.shape, logits_BTV.ndim - 1)
