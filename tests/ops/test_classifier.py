"""From hidden states to the loss and its gradient, by every implementation, against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.ops import classifier
from gpt2_jax.ops.classifier import classifier_of
from gpt2_jax.ops.threaded import Site
from gpt2_jax.ops.writer import writer_of
from tests.implementations import plan_with, rows_of
from tests.ops.seams import ROUNDING, in_dtype, parameters, random

V, C = 203, 16
CONFIG = GPT2Config(max_sequence_length=8, vocab_size=V, num_layers=1, num_heads=2, channels=C)


def float64_losses_and_gradients(h_RC, w_VC, y_R, scale):
    """d(mean loss)/d(logits) = (softmax - onehot) / R."""
    logits_RV = h_RC @ w_VC[:V].T
    p_RV = np.exp(logits_RV - logits_RV.max(-1, keepdims=True))
    p_RV /= p_RV.sum(-1, keepdims=True)
    losses_R = -np.log(p_RV[np.arange(len(y_R)), y_R])
    dlogits_RV = scale * (p_RV - np.eye(V)[y_R]) / len(y_R)
    dw_VC = np.zeros(w_VC.shape)
    dw_VC[:V] = dlogits_RV.T @ h_RC
    return losses_R, dlogits_RV @ w_VC[:V], dw_VC, np.abs(logits_RV).max()


def run(plan, h_BTC, y_BT, params_N, scale):
    """Losses, the loss, the gradient of h and of the token table, wherever the writer leaves that."""
    site, table = Site(plan, ("wte",)), plan.layout["wte"]

    @jax.jit
    def both(h_BTC, y_BT, params_N):
        garbage = jnp.full(params_N.shape, jnp.nan)
        losses = classifier_of(plan).token_losses(site, h_BTC, y_BT, params_N)
        return losses, *classifier_of(plan).loss_and_gradient(site, h_BTC, y_BT, params_N, garbage, scale)

    with plan.precision():
        losses, loss, dh, gradient_N, slots = both(h_BTC, y_BT, jnp.asarray(params_N))
    gradient_N = np.asarray(gradient_N)
    if writer_of(plan).writes_at_once:
        assert np.isnan(gradient_N[table.stop :]).all()
        return losses, loss, dh, gradient_N[table.offset : table.stop].reshape(table.shape)
    return losses, loss, dh, np.asarray(slots["wte"])


def check(plan, dtype, shape, *, scale=1.0, params=None):
    params = 0.25 * parameters(plan) if params is None else params
    h = in_dtype(random(1, *shape, C), dtype)
    y = np.random.default_rng(2).integers(0, V, shape).astype(np.int32)
    y.flat[0], y.flat[-1] = V - 1, 0
    losses, loss, dh, dw = run(plan, h, y, params, scale)
    assert (losses.dtype, loss.dtype, dh.dtype, dw.dtype) == (jnp.float32, jnp.float32, dtype, np.float32)
    assert (losses.shape, dh.shape) == (shape, h.shape)
    rows, w = np.asarray(h).astype(np.float64).reshape(-1, C), params[: w_size(plan)].reshape(-1, C).astype(np.float64)
    wanted, dh_RC, dw_VC, largest = float64_losses_and_gradients(rows, w, y.reshape(-1), scale)
    # Where the logits are rounded, a loss is off by two of these, and a probability by as many of itself.
    of_logits = 2 * ROUNDING[dtype] * largest if plan.classifier.name in ("low_precision", "apple") else 0.0
    of_sums = 16 * ROUNDING["float32"] * (largest + np.log(V))
    np.testing.assert_allclose(np.asarray(losses).reshape(-1), wanted, rtol=0, atol=of_logits + of_sums)
    assert float(loss) == pytest.approx(scale * wanted.mean(), abs=scale * (of_logits + of_sums))
    # The cotangent of the logits is rounded, and what products make of it.
    roundings = (2 * ROUNDING[dtype] if dtype == "bfloat16" else 0.0) + of_logits + 64 * ROUNDING["float32"]
    dh = np.asarray(dh).astype(np.float64).reshape(-1, C)
    np.testing.assert_allclose(dh, dh_RC, rtol=0, atol=roundings * np.abs(dh_RC).max())
    np.testing.assert_allclose(dw, dw_VC, rtol=0, atol=roundings * np.abs(dw_VC).max())
    assert (dw[V:] == 0).all()


def w_size(plan):
    return plan.layout["wte"].size


@rows_of("classifier")
@pytest.mark.parametrize("shape", [(2, 5), (1, 1), (1, 7)], ids=str)
def test_losses_and_gradients(implementation, dtype, shape):
    check(plan_with("classifier", implementation, dtype, CONFIG, matmul_precision="highest"), dtype, shape, scale=0.5)


@rows_of("classifier")
@pytest.mark.parametrize("rows", [1, 3, 4, 10])
def test_chunks_of_rows(implementation, dtype, rows, monkeypatch):
    """Ten rows in chunks of one, of unequal size, and in one."""
    monkeypatch.setattr(classifier, "CLASSIFIER_ROWS", rows)
    monkeypatch.setattr(classifier, "_LOW_ROWS", (rows, rows))
    plan = plan_with("classifier", implementation, dtype, CONFIG, matmul_precision="highest")
    if plan.classifier.name not in ("xla", "apple"):  # which have no chunks
        assert classifier_of(plan).most_rows(10) == rows
        check(plan, dtype, (2, 5))


def test_chunks_cover_every_row_once():
    h, y = jnp.arange(22.0).reshape(2, 11, 1), jnp.arange(22).reshape(2, 11)
    for most in (1, 5, 7, 21, 22, 100):
        chunks = classifier._chunks(h, y, most)
        np.testing.assert_array_equal(np.concatenate([rows for _, rows in chunks]), np.arange(22))
        np.testing.assert_array_equal(np.concatenate([rows for rows, _ in chunks])[:, 0], np.arange(22))
        assert max(rows.size for _, rows in chunks) <= most


@rows_of("classifier")
def test_padding_columns_get_no_probability_and_no_gradient(implementation, dtype):
    plan = plan_with("classifier", implementation, dtype, CONFIG, matmul_precision="highest")
    params = 0.25 * parameters(plan)
    params[slice(*plan.layout["wte"].padding_span)] = 1e3  # would win every softmax
    check(plan, dtype, (2, 5), params=params)


@rows_of("classifier")
def test_large_logits_do_not_overflow(implementation, dtype):
    plan = plan_with("classifier", implementation, dtype, CONFIG)
    params = 64 * parameters(plan)
    h, y = in_dtype(random(1, 2, 3, C), dtype), np.zeros((2, 3), np.int32)
    for found in run(plan, h, y, params, 1.0):
        assert np.isfinite(np.asarray(found).astype(np.float32)).all()
