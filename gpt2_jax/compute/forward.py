"""The forward pass alone, by the ops of the training step: losses of tokens, and logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gpt2_jax.buffer.weights import Weights
from gpt2_jax.compute import parallel
from gpt2_jax.compute.plan import Plan
from gpt2_jax.models import gpt2 as model
from gpt2_jax.ops.classifier import classifier_of, logits
from gpt2_jax.ops.threaded import Site
from gpt2_jax.ops.writer import empty_slots

_SPECS = (parallel.EVERYWHERE, parallel.BY_RANK, parallel.BY_RANK)  # whole parameters, x and y


def token_losses(plan: Plan, params_N: jax.Array, x_BT: jax.Array, y_BT: jax.Array) -> jax.Array:
    """Cross-entropy of every target, (B, T) float32, in nats."""
    with plan.precision():
        h_BTC = _hidden_states(plan, params_N, x_BT)
        return classifier_of(plan).token_losses(Site(plan, (model.CLASSIFIER,)), h_BTC, y_BT, params_N)


def logits_at(plan: Plan, params_N: jax.Array, x_BT: jax.Array, position: jax.Array) -> jax.Array:
    """Logits (B, vocab_size) float32 of the token after `position` (int32 scalar)."""
    with plan.precision():
        h_BTC = _hidden_states(plan, params_N, x_BT)
        h_BC = lax.dynamic_index_in_dim(h_BTC, position, axis=1, keepdims=False)
        return logits(Site(plan, (model.CLASSIFIER,)), h_BC, params_N)[:, : plan.config.vocab_size]


def all_logits(plan: Plan, params_N: jax.Array, x_BT: jax.Array) -> jax.Array:
    """Logits (B, T, vocab_size) float32 of every position: for comparing, since they are large."""
    with plan.precision():
        h_BTC = _hidden_states(plan, params_N, x_BT)
        return logits(Site(plan, (model.CLASSIFIER,)), h_BTC, params_N)[..., : plan.config.vocab_size]


Losses = Callable[[jax.Array, np.ndarray, np.ndarray], jax.Array]


def make_loss_function(plan: Plan) -> jax.stages.Wrapped:
    """The compiled loss (params, x_BT, y_BT) -> float32 scalar, without a gradient; of D devices x and y are (D * B, T)."""

    def loss(params_N: jax.Array, x_BT: jax.Array, y_BT: jax.Array) -> jax.Array:
        return parallel.mean(plan, jnp.mean(token_losses(plan, params_N, x_BT, y_BT)))

    return jax.jit(parallel.on_every_device(plan, loss, _SPECS, parallel.EVERYWHERE))


def make_token_loss_function(plan: Plan) -> jax.stages.Wrapped:
    """The compiled losses (params, x_BT, y_BT) -> (B, T) float32 of every target; of D devices all are (D * B, T), which all
    of several processes have whole."""

    def losses(params_N: jax.Array, x_BT: jax.Array, y_BT: jax.Array) -> jax.Array:
        return parallel.everywhere(plan, token_losses(plan, params_N, x_BT, y_BT))

    result = parallel.BY_RANK if plan.processes == 1 else parallel.EVERYWHERE
    return jax.jit(parallel.on_every_device(plan, losses, _SPECS, result))


def of_own_rows(plan: Plan, losses: jax.stages.Wrapped) -> Losses:
    """A function of the two above that each of several processes calls with the rows of its own ranks."""
    if plan.processes == 1:
        return losses
    return lambda params_N, x_BT, y_BT: losses(params_N, *parallel.place(plan, (x_BT, y_BT), _SPECS[1:]))


def of_all_rows(plan: Plan, losses: jax.stages.Wrapped) -> Losses:
    """The same that all processes call with the same rows, those of all ranks."""
    of_own, own = of_own_rows(plan, losses), partial(parallel.own_part, plan)
    return losses if plan.processes == 1 else lambda params_N, x_BT, y_BT: of_own(params_N, own(x_BT), own(y_BT))


@partial(jax.jit, static_argnums=0)
def next_token_logits(plan: Plan, params_N: jax.Array, x_BT: jax.Array, position: jax.Array) -> jax.Array:
    """`logits_at`, compiled."""
    return logits_at(plan, params_N, x_BT, position)


@partial(jax.jit, static_argnums=0)
def target_scores(
    plan: Plan, params_N: jax.Array, x_BT: jax.Array, positions_BK: jax.Array, targets_BK: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of K targets in each row, which follow the tokens at these positions: the cross-entropy (B, K) float32, in nats, and
    whether the target is the likeliest token (B, K) bool. Only their logits are made."""
    with plan.precision():
        h_BTC = _hidden_states(plan, params_N, x_BT)
        h_BKC = jnp.take_along_axis(h_BTC, positions_BK[..., None], axis=1)
        logits_BKV = logits(Site(plan, (model.CLASSIFIER,)), h_BKC, params_N)[..., : plan.config.vocab_size]
    of_targets_BK = jnp.take_along_axis(logits_BKV, targets_BK[..., None], axis=-1)[..., 0]
    losses_BK = jax.nn.logsumexp(logits_BKV, axis=-1) - of_targets_BK
    return losses_BK, jnp.argmax(logits_BKV, axis=-1) == targets_BK


def _hidden_states(plan: Plan, params_N: jax.Array, x_BT: jax.Array) -> jax.Array:
    return model.hidden_states(Weights(plan, params_N, empty_slots(plan)), x_BT)
