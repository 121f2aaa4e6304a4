"""The classifier for a compiler that fuses elementwise operations alone, as MLX does.

The table is cut to the true vocabulary, so that no masked copy of the logits is made. The target's logit is a sum of
products of its own. The logits' gradient is one elementwise pass over the logits that are there already.

Names: the embedding table (V, C), V padded; U is the true vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from gpt2_jax.ops.matmul import product, product_dx, weight_gradient
from gpt2_jax.ops.threaded import Site, Slots, WeightView, rounded
from gpt2_jax.ops.writer import write_gradient

if TYPE_CHECKING:
    from gpt2_jax.compute.plan import Plan

ON_MLX_ONLY = "with plugins on MLX only"
_FLOAT32 = jnp.dtype(jnp.float32)


def refuses(plan: Plan) -> str | None:
    return None if "fused_reductions" in plan.backend.lacks else ON_MLX_ONLY


def token_losses(site: Site, h_BTC: jax.Array, y_BT: jax.Array, flat_N: jax.Array) -> jax.Array:
    """The cross-entropy of every target, (B, T) float32, in nats."""
    return _losses(site, h_BTC, y_BT, flat_N)[0]


def loss_and_gradient(
    site: Site, h_BTC: jax.Array, y_BT: jax.Array, flat_N: jax.Array, gradient_N: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array, jax.Array, Slots]:
    """scale * the mean loss, its cotangent of h in h's dtype, the gradient buffer, and the table's slot."""
    (name,) = site.names
    losses_BT, log_sums_BT, logits_BTU = _losses(site, h_BTC, y_BT, flat_N)
    # A vector of columns, which the comparison broadcasts: an iota of the logits' shape would be written out.
    columns_11U = lax.iota(jnp.int32, site.plan.config.vocab_size)[None, None]
    is_target_BTU = y_BT[..., None] == columns_11U
    probabilities_BTU = jnp.exp(logits_BTU.astype(_FLOAT32) - log_sums_BT[..., None])
    dlogits_BTU = ((probabilities_BTU - is_target_BTU.astype(_FLOAT32)) * (scale / y_BT.size)).astype(h_BTC.dtype)
    table = site.view(flat_N, name)
    dh_BTC = product_dx(site.plan, dlogits_BTU, _used_rows(site, table))
    dlogits_RU, h_RC = dlogits_BTU.reshape(-1, dlogits_BTU.shape[-1]), h_BTC.reshape(-1, h_BTC.shape[-1])
    unused = table.shape[0] - site.plan.config.vocab_size
    dtable_VC = jnp.pad(weight_gradient(site.plan, dlogits_RU, h_RC), ((0, unused), (0, 0)))
    gradient_N, slot = write_gradient(site, gradient_N, name, dtable_VC)
    return scale * jnp.mean(losses_BT), dh_BTC, gradient_N, {name: slot}


def _losses(site: Site, h_BTC: jax.Array, y_BT: jax.Array, flat_N: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Losses and log sum exp (B, T) float32, and the logits (B, T, U) in h's dtype."""
    table = site.view(flat_N, site.names[0])
    logits_BTU = product(site.plan, h_BTC, _used_rows(site, table), None, h_BTC.dtype)
    log_sums_BT = jax.nn.logsumexp(logits_BTU.astype(_FLOAT32), axis=-1)
    target_BTC = rounded(table.array()[y_BT], h_BTC.dtype)
    target_logits_BT = jnp.sum(h_BTC.astype(_FLOAT32) * target_BTC.astype(_FLOAT32), axis=-1)
    return log_sums_BT - target_logits_BT, log_sums_BT, logits_BTU


def _used_rows(site: Site, table: WeightView) -> WeightView:
    return table.rows(0, site.plan.config.vocab_size)
