"""From the last hidden states to the loss: linear layer, softmax and cross-entropy as one seam, over the true vocabulary.

The gradient is made in the forward direction, next to the loss, so that logits live for a moment only. Names: the
embedding table (V, C), V padded. Rows R are tokens of all sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gpt2_jax.ops.apple import classifier as apple
from gpt2_jax.ops.cpu import library
from gpt2_jax.ops.cuda import kernels, libraries
from gpt2_jax.ops.matmul import ON_NVIDIA_ONLY, product, product_dx, weight_gradient
from gpt2_jax.ops.recompute import barrier
from gpt2_jax.ops.table import Implementation, always
from gpt2_jax.ops.threaded import Site, Slots
from gpt2_jax.ops.writer import write_gradient, write_product, writer_of

if TYPE_CHECKING:
    from gpt2_jax.compute.plan import Plan

# So many rows of the logits are made at once: at 8192 tokens all of them would be 1.6 GB, and their gradient as much again.
CLASSIFIER_ROWS = 1024
# The same on GPUs, where few large products are faster: half of the rows, so that only half of the logits are there while
# all layers' activations are (0.2 of 31 ms at 16 x 1024 tokens for 0.6 of 7.9 GiB), within these limits.
_LOW_ROWS = (1 << 13, 1 << 15)
_FLOAT32 = jnp.dtype(jnp.float32)
Gradient = tuple[jax.Array, jax.Array, jax.Array, Slots]


class Classifier(NamedTuple):
    # (site, h_BTC, y_BT, flat_N): the cross-entropy of every target, (B, T) float32, in nats
    token_losses: Callable[[Site, jax.Array, jax.Array, jax.Array], jax.Array]
    # (site, h_BTC, y_BT, flat_N, gradient_N, scale): scale * the mean loss, its cotangent of h, the gradient buffer, slots
    loss_and_gradient: Callable[[Site, jax.Array, jax.Array, jax.Array, jax.Array, float], Gradient]
    most_rows: Callable[[int], int]  # (rows R): those whose logits exist at a time
    bytes_of_logit: Callable[[int], int]  # (bytes of an activation): of a logit and its cotangent together


def classifier_of(plan: Plan) -> Classifier:
    return next(row.functions for row in TABLE if row.name == plan.classifier.name)


def logits(site: Site, h: jax.Array, flat_N: jax.Array) -> jax.Array:
    """Logits (..., V) float32 of hidden states (..., C), V the padded vocabulary."""
    return product(site.plan, h, site.view(flat_N, site.names[0]), None, _FLOAT32)


def _columns(logits: jax.Array) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)


# The reference. The target's logit is picked by comparing with an iota, which every backend can do; a gather cannot be
# compiled by some of the Apple plugins. The padding columns are -inf, so they get no probability.


def _losses_of_logits(site: Site, logits_BTV: jax.Array, y_BT: jax.Array) -> jax.Array:
    columns_BTV = _columns(logits_BTV)
    logits_BTV = jnp.where(columns_BTV < site.plan.config.vocab_size, logits_BTV, -jnp.inf)
    target_logit_BT = jnp.sum(jnp.where(columns_BTV == y_BT[..., None], logits_BTV, 0.0), axis=-1)
    return jax.nn.logsumexp(logits_BTV, axis=-1) - target_logit_BT


def _reference_losses(site: Site, h_BTC: jax.Array, y_BT: jax.Array, flat_N: jax.Array) -> jax.Array:
    return _losses_of_logits(site, logits(site, h_BTC, flat_N), y_BT)


def _reference_gradient(
    site: Site, h_BTC: jax.Array, y_BT: jax.Array, flat_N: jax.Array, gradient_N: jax.Array, scale: float
) -> Gradient:
    def loss_of(logits_BTV: jax.Array) -> jax.Array:
        return jnp.mean(_losses_of_logits(site, logits_BTV, y_BT)) * scale

    loss, dlogits_BTV = jax.value_and_grad(loss_of)(logits(site, h_BTC, flat_N))
    dlogits_BTV = dlogits_BTV.astype(h_BTC.dtype)
    dh_BTC = product_dx(site.plan, dlogits_BTV, site.view(flat_N, site.names[0]))
    gradient_N, slots = _write(site, gradient_N, dlogits_BTV, h_BTC)
    return loss, dh_BTC, gradient_N, slots


def _write(
    site: Site, gradient_N: jax.Array, dlogits: jax.Array, h: jax.Array, earlier: jax.Array | None = None
) -> tuple[jax.Array, Slots]:
    """Write the table's gradient; `earlier` is the slot of the rows before, to which these are added."""
    (name,) = site.names
    dlogits_RV, h_RC = dlogits.reshape(-1, dlogits.shape[-1]), h.reshape(-1, h.shape[-1])
    gradient_N, slot = write_product(site, gradient_N, name, dlogits_RV, h_RC)
    # A slot that holds a gradient has that of these rows alone; one that holds squares has those of all rows.
    if earlier is not None and not writer_of(site.plan).writes_at_once:
        slot = earlier + slot
    return gradient_N, {name: slot}


# In chunks of rows.


def _chunks(h_BTC: jax.Array, y_BT: jax.Array, most_rows: int) -> list[tuple[jax.Array, jax.Array]]:
    """Rows of both, few enough for their logits; without a barrier between them XLA may make those of all chunks first."""
    h_RC, y_R = h_BTC.reshape(-1, h_BTC.shape[-1]), y_BT.reshape(-1)
    num_chunks = -(-y_R.shape[0] // most_rows)
    bounds = [y_R.shape[0] * chunk // num_chunks for chunk in range(num_chunks + 1)]
    return [(h_RC[start:stop], y_R[start:stop]) for start, stop in pairwise(bounds)]


def _call_rows(site: Site, h_RC: jax.Array, y_R: jax.Array, flat_N: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
    """The losses of some rows, and `scale` times the cotangent of the logits that their sum has."""
    logits_RV = logits(site, h_RC, flat_N)
    return library.call(
        library.SOFTMAX_CROSS_ENTROPY,
        (jax.ShapeDtypeStruct(y_R.shape, _FLOAT32), jax.ShapeDtypeStruct(logits_RV.shape, h_RC.dtype)),
        logits_RV,
        y_R,
        aliases={0: 1} if h_RC.dtype == _FLOAT32 else None,
        vocab_size=np.int64(site.plan.config.vocab_size),
        scale=np.float32(scale),
    )


def _call_losses(site: Site, h_BTC: jax.Array, y_BT: jax.Array, flat_N: jax.Array) -> jax.Array:
    losses: list[jax.Array] = []
    for h_RC, y_R in _chunks(h_BTC, y_BT, CLASSIFIER_ROWS):
        if losses:
            h_RC, losses[-1] = barrier(site.plan, h_RC, losses[-1])
        losses.append(_call_rows(site, h_RC, y_R, flat_N, 1.0)[0])
    return jnp.concatenate(losses).reshape(y_BT.shape)


def _call_gradient(
    site: Site, h_BTC: jax.Array, y_BT: jax.Array, flat_N: jax.Array, gradient_N: jax.Array, scale: float
) -> Gradient:
    losses: list[jax.Array] = []
    dh: list[jax.Array] = []
    slots: Slots = {}
    for h_RC, y_R in _chunks(h_BTC, y_BT, CLASSIFIER_ROWS):
        if dh:
            h_RC, (dh[-1], gradient_N) = barrier(site.plan, h_RC, (dh[-1], gradient_N))
            site = site._replace(added=site.names)
        losses_R, dlogits_RV = _call_rows(site, h_RC, y_R, flat_N, scale / y_BT.size)
        gradient_N, slots = _write(site, gradient_N, dlogits_RV, h_RC, slots.get(site.names[0]))
        losses.append(losses_R)
        dh.append(product_dx(site.plan, dlogits_RV, site.view(flat_N, site.names[0])))
    return scale * jnp.mean(jnp.concatenate(losses)), jnp.concatenate(dh).reshape(h_BTC.shape), gradient_N, slots


# On GPUs: logits in the dtype of products, and the gradient in as many passes over them as the loss.


def _most_low_rows(R: int) -> int:
    least, most = _LOW_ROWS
    return min(R, most, max(least, -(-R // 2)))


def _low_logits(site: Site, h_RC: jax.Array, flat_N: jax.Array) -> jax.Array:
    return product(site.plan, h_RC, site.view(flat_N, site.names[0]), None, h_RC.dtype)


def _log_sums(site: Site, logits_RV: jax.Array, y_R: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """log sum exp (R,) and target's logit (R,), float32; and the logits in float32, -inf in the padding columns."""
    wide_RV = jnp.where(_columns(logits_RV) < site.plan.config.vocab_size, logits_RV.astype(_FLOAT32), -jnp.inf)
    target_R = jnp.take_along_axis(logits_RV, y_R[:, None], axis=1)[:, 0].astype(_FLOAT32)
    maximum_R = jnp.max(wide_RV, axis=-1)
    log_sum_R = jnp.log(jnp.sum(jnp.exp(wide_RV - maximum_R[:, None]), axis=-1)) + maximum_R
    return log_sum_R, target_R, wide_RV


def _low_losses(site: Site, h_BTC: jax.Array, y_BT: jax.Array, flat_N: jax.Array) -> jax.Array:
    h_RC, y_R = h_BTC.reshape(-1, h_BTC.shape[-1]), y_BT.reshape(-1)
    log_sum_R, target_R, _ = _log_sums(site, _low_logits(site, h_RC, flat_N), y_R)
    return (log_sum_R - target_R).reshape(y_BT.shape)


# (site, logits (R, V), targets (R,), scale): the rows' losses, and `scale` times the cotangent of the logits of their sum
_OfRows = Callable[[Site, jax.Array, jax.Array, float], tuple[jax.Array, jax.Array]]


def _low_rows(site: Site, logits_RV: jax.Array, y_R: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
    log_sum_R, target_R, wide_RV = _log_sums(site, logits_RV, y_R)
    is_target_RV = _columns(logits_RV) == y_R[:, None]
    dlogits_RV = (jnp.exp(wide_RV - log_sum_R[:, None]) - is_target_RV.astype(_FLOAT32)) * scale
    return log_sum_R - target_R, dlogits_RV.astype(logits_RV.dtype)


def _low_gradient(
    of_rows: _OfRows,
    site: Site,
    h_BTC: jax.Array,
    y_BT: jax.Array,
    flat_N: jax.Array,
    gradient_N: jax.Array,
    scale: float,
) -> Gradient:
    (name,) = site.names
    losses: list[jax.Array] = []
    dh: list[jax.Array] = []
    dw: jax.Array | None = None
    for h_RC, y_R in _chunks(h_BTC, y_BT, _most_low_rows(y_BT.size)):
        if dh:
            # Both products have read the last rows' logits by then, whose memory these rows take.
            h_RC, (dh[-1], dw) = barrier(site.plan, h_RC, (dh[-1], dw))
        losses_R, dlogits_RV = of_rows(site, _low_logits(site, h_RC, flat_N), y_R, scale / y_BT.size)
        losses.append(losses_R)
        dh.append(product_dx(site.plan, dlogits_RV, site.view(flat_N, name)))
        of_rows_VC = weight_gradient(site.plan, dlogits_RV, h_RC)
        # The first stays in its dtype until the second comes, so that both are read once.
        dw = of_rows_VC if dw is None else dw.astype(_FLOAT32) + of_rows_VC.astype(_FLOAT32)
    assert dw is not None
    gradient_N, slot = write_gradient(site, gradient_N, name, dw)
    return scale * jnp.mean(jnp.concatenate(losses)), jnp.concatenate(dh).reshape(h_BTC.shape), gradient_N, {name: slot}


# By a kernel of our own: the loss and, written over the logits, their gradient, in one pass.

_KERNEL_THREADS = 1024
_KERNEL_STATIC_BYTES = 512  # of shared memory, beside the row


def _kernel_rows(site: Site, logits_RV: jax.Array, y_R: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
    config = site.plan.config
    constants: dict[str, str | int | float] = {
        "CLASSIFIER": 1,
        "V": logits_RV.shape[1],
        "TRUE_V": config.vocab_size,
        "SCALE": f"{scale!r}f",
    }
    results = (jax.ShapeDtypeStruct(y_R.shape, _FLOAT32), jax.ShapeDtypeStruct(logits_RV.shape, logits_RV.dtype))
    return kernels.call(
        "softmax_cross_entropy",
        results,
        logits_RV,
        y_R,
        constants=constants,
        blocks=y_R.size,
        threads=_KERNEL_THREADS,
        shared_bytes=2 * logits_RV.shape[1],
        aliases={0: 1},
    )


def _refuses_kernel(plan: Plan) -> str | None:
    if reason := kernels.refusal(plan):
        return reason
    row, room = 2 * plan.config.padded_vocab_size, libraries.device().shared_bytes - _KERNEL_STATIC_BYTES
    return None if row <= room else f"a row of logits has {row} bytes, of which {room} fit into shared memory"


def _refuses_low(plan: Plan) -> str | None:
    return ON_NVIDIA_ONLY if "cuda_libraries" in plan.backend.lacks else None


_CUSTOM_CALL = Classifier(
    _call_losses,
    _call_gradient,
    lambda R: min(R, CLASSIFIER_ROWS),
    lambda s: 4 if s == 4 else 4 + s,  # in float32 one is written over the other
)
_KERNEL = Classifier(_low_losses, partial(_low_gradient, _kernel_rows), _most_low_rows, lambda s: s)
_LOW_PRECISION = Classifier(_low_losses, partial(_low_gradient, _low_rows), _most_low_rows, lambda s: 2 * s)
_APPLE = Classifier(apple.token_losses, apple.loss_and_gradient, lambda R: R, lambda s: 4 + s)
_REFERENCE = Classifier(_reference_losses, _reference_gradient, lambda R: R, lambda s: 4 + s)
TABLE = (
    Implementation("custom_call", library.refusal, "logits in chunks of rows", functions=_CUSTOM_CALL),
    Implementation("kernel", _refuses_kernel, "loss and gradient in one pass over the logits", functions=_KERNEL),
    Implementation("low_precision", _refuses_low, "logits in the dtype of products", functions=_LOW_PRECISION),
    Implementation("apple", apple.refuses, "no masked copy of the logits", functions=_APPLE),
    Implementation("xla", always, "the reference, on every device", functions=_REFERENCE),
)
