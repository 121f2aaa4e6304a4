"""Causal attention against a plain loop, and what causality means."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.ops.attention import causal_attention

B, T, H, D = 2, 9, 3, 8


@pytest.fixture
def qkv():
    return np.random.default_rng(0).normal(size=(3, B, T, H, D)).astype(np.float32)


def plain_attention(q, k, v):
    out = np.zeros_like(q, dtype=np.float64)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                scores = k[b, : t + 1, h].astype(np.float64) @ q[b, t, h] / np.sqrt(D)
                weights = np.exp(scores - scores.max())
                out[b, t, h] = weights @ v[b, : t + 1, h] / weights.sum()
    return out


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 2.0**-24), ("bfloat16", 2.0**-9)])
def test_equals_the_plain_loop(qkv, dtype, rounding):
    low = [jnp.asarray(x).astype(dtype) for x in qkv]
    expected = plain_attention(*(np.asarray(x.astype(jnp.float32)) for x in low))
    # The weights sum to 1, so an error is a few roundings of the largest value, plus the scores' D-term sums.
    np.testing.assert_allclose(
        np.asarray(causal_attention(*low)).astype(np.float32),
        expected,
        rtol=0,
        atol=(4 * rounding + 3 * D * 2.0**-24) * np.abs(qkv[2]).max(),
    )


def test_a_later_position_changes_nothing_before_it(qkv):
    before = causal_attention(*qkv)
    changed = qkv.copy()
    changed[:, :, 6:] = 1e3
    np.testing.assert_array_equal(causal_attention(*changed)[:, :6], before[:, :6])
