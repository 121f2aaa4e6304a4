"""Logits and loss over the true vocabulary, against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.ops import classifier

B, T, C, V, PADDED = 2, 5, 16, 203, 256


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    h, w = rng.normal(size=(B, T, C)).astype(np.float32), rng.normal(size=(PADDED, C)).astype(np.float32)
    return h, w, rng.integers(0, V, (B, T)).astype(np.int32)


def float64_loss_and_gradient(h, w, y):
    """d(mean loss)/d(logits) = (softmax - onehot) / (B T)."""
    logits = h.astype(np.float64) @ w[:V].astype(np.float64).T
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    loss = -np.log(np.take_along_axis(p, y[..., None], -1)).mean()
    return loss, (p - np.eye(V)[y]) / (B * T)


def test_loss_and_gradients(problem):
    h, w, y = problem
    expected, dlogits = float64_loss_and_gradient(h, w, y)
    loss, (dh, dw) = jax.value_and_grad(classifier.mean_loss, argnums=(0, 1))(h, jnp.asarray(w), y, V)
    assert abs(float(loss) - expected) <= 8 * 2.0**-24 * (abs(expected) + np.abs(h @ w.T).max())
    np.testing.assert_allclose(dh, dlogits @ w[:V], rtol=0, atol=1e-6)
    np.testing.assert_allclose(dw[:V], np.einsum("btv,btc->vc", dlogits, h), rtol=0, atol=1e-6)


def test_padding_columns_get_no_probability_and_no_gradient(problem):
    h, w, y = problem
    w = w.copy()
    w[V:] = 1e3  # would win every softmax
    logits = classifier.logits(h, jnp.asarray(w), V)
    assert (np.asarray(logits)[..., V:] == -np.inf).all()
    loss, dw = jax.value_and_grad(classifier.mean_loss, argnums=1)(h, jnp.asarray(w), y, V)
    assert abs(float(loss) - float64_loss_and_gradient(h, w, y)[0]) < 1e-5
    assert (np.asarray(dw)[V:] == 0).all()


def test_bfloat16_hidden_states_give_float32_loss_and_weight_gradient(problem):
    h, w, y = problem
    low = jnp.asarray(h).astype(jnp.bfloat16)
    loss, (dh, dw) = jax.value_and_grad(classifier.mean_loss, argnums=(0, 1))(low, jnp.asarray(w), y, V)
    assert (loss.dtype, dh.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    assert abs(float(loss) - float64_loss_and_gradient(h, w, y)[0]) <= 2 * 2.0**-8 * np.abs(h @ w.T).max()
