"""Causal attention: the reference against a plain loop, every implementation against the reference, and causality."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.ops.attention import _known_sums, attention_of, causal_attention
from tests.conftest import available, plan_of
from tests.implementations import plan_of_kind, plan_with, rows_of
from tests.ops.seams import assert_within, in_dtype, random

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


def value_and_derivative(plan, qkv_BTC, dout_BTC):
    """By one array (B, T, 3 C), or by three where the implementation wants so."""
    attention = attention_of(plan)

    @jax.jit
    def run(qkv_BTC, dout_BTC):
        def compute(qkv_BTC):
            parts = jnp.split(qkv_BTC, 3, axis=-1) if attention.parts == 3 else [qkv_BTC]
            return attention.compute(plan, 0, *parts)

        with plan.precision():
            out, pull_back = jax.vjp(compute, qkv_BTC)
            return out, pull_back(dout_BTC)[0]

    return run(qkv_BTC, dout_BTC)


SHAPES = [(2, 9, 3, 8), (1, 1, 1, 5), (3, 2, 2, 7), (2, 150, 2, 8)]  # the last is longer than a block of queries
# The scores' sums and the softmax are in float32; in bfloat16 the weights are rounded too, the sum with the values and
# what is made of both, each relative to the largest.
ROUNDINGS = {"float32": 64, "bfloat16": 3}


def assert_equals_the_reference(plan, dtype, shape):
    B, T, H, D = shape
    reference = plan_of_kind("xla", config=plan.config, matmul_precision="highest")
    qkv, dout = in_dtype(random(0, B, T, 3 * H * D), dtype), in_dtype(random(1, B, T, H * D), dtype)
    found = value_and_derivative(plan, qkv, dout)
    wanted = value_and_derivative(reference, qkv.astype(jnp.float32), dout.astype(jnp.float32))
    assert found[0].dtype == found[1].dtype == dtype
    assert_within(found, wanted, ROUNDINGS[dtype], dtype)


def sizes(shape):
    _, T, H, D = shape
    return GPT2Config(max_sequence_length=T, vocab_size=5, num_layers=1, num_heads=H, channels=H * D)


@rows_of("attention")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_derivative(implementation, dtype, shape):
    assert_equals_the_reference(plan_with("attention", implementation, dtype, sizes(shape)), dtype, shape)


@pytest.mark.parametrize("name", available(("naive", "amx")))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_custom_call_by_other_products(name, dtype):
    shape = (2, 150, 2, 8)
    plan = plan_of_kind(name, dtype, config=sizes(shape))
    assert plan.attention.name == "custom_call"
    assert_equals_the_reference(plan, dtype, shape)


@rows_of("attention")
def test_no_implementation_sees_later_positions(implementation, dtype):
    shape = (2, 9, 3, 8)
    plan = plan_with("attention", implementation, dtype, sizes(shape))
    qkv, dout = random(0, 2, 9, 72), random(1, 2, 9, 24)
    out, _ = value_and_derivative(plan, in_dtype(qkv, dtype), in_dtype(dout, dtype))
    dout[:, 6:] = 0
    qkv[:, 6:] *= 7
    changed, dqkv = value_and_derivative(plan, in_dtype(qkv, dtype), in_dtype(dout, dtype))
    np.testing.assert_array_equal(out[:, :6].astype(jnp.float32), changed[:, :6].astype(jnp.float32))
    assert (np.asarray(dqkv[:, 6:].astype(jnp.float32)) == 0).all()


@pytest.mark.parametrize(("start", "length"), [(0, 1), (5, 1), (19, 1), (0, 20), (3, 9), (11, 8)])
@rows_of("attention")
def test_the_cached_attention(implementation, dtype, start, length):
    """Against the reference over the whole text. Behind what is seen the cache holds anything."""
    B, S, H, D = 2, 20, 3, 8
    plan = plan_with("attention", implementation, dtype, sizes((B, S, H, D)))
    q, k, v = (in_dtype(random(seed, B, S, H, D), dtype) for seed in range(3))
    keys, values = (jnp.swapaxes(x.at[:, start + length :].set(1e4), 1, 2) for x in (k, v))
    part_BTC = q[:, start : start + length].reshape(B, length, H * D)
    run = jax.jit(lambda *arguments: attention_of(plan).cached(plan, *arguments))
    found = run(part_BTC, keys, values, np.int32(start))
    expected = causal_attention(*(x.astype(jnp.float32) for x in (q, k, v)))[:, start : start + length]
    assert found.dtype == dtype
    assert_within(found, expected.reshape(part_BTC.shape), ROUNDINGS[dtype], dtype)


@pytest.mark.parametrize("start", [-1, 20, 2**31 - 1])
def test_the_custom_call_refuses_queries_behind_the_cache(start):
    plan = plan_with("attention", "custom_call", config=sizes((1, 20, 1, 8)))
    cache = jnp.zeros((1, 1, 20, 8))
    run = jax.jit(lambda *arguments: attention_of(plan).cached(plan, *arguments))
    with pytest.raises(Exception, match=f"expected 1 queries within the cached positions, got start {start}"):
        jax.block_until_ready(run(jnp.zeros((1, 1, 8)), cache, cache, np.int32(start)))


def test_cudnn_takes_heads_that_it_can():
    """It refuses the others by an error of its own, at the first step."""

    def refusals(head_size):
        config = GPT2Config(max_sequence_length=8, vocab_size=5, num_layers=1, num_heads=1, channels=head_size)
        from gpt2_jax.ops.attention import TABLE

        row = next(row for row in TABLE if row.name == "cudnn")
        return row.accepts(plan_of_kind("nvidia", "bfloat16", config=config))

    assert refusals(64) is refusals(128) is None
    assert "not 20" in refusals(20)
    assert "not 136" in refusals(136)


@pytest.mark.parametrize("seed", range(3))
def test_the_known_column_sums_are_those_of_the_cotangents(seed):
    """In float32, of 2 x 7 rows: the keys' add up to nothing, the values' to the sum of the result's."""
    plan = plan_of()
    H, D = plan.config.num_heads, plan.config.channels // plan.config.num_heads
    q, k, v, dout = np.random.default_rng(seed).normal(size=(4, 2, 7, H, D)).astype(np.float32)
    _, pull_back = jax.vjp(causal_attention, q, k, v)
    dqkv = [part.reshape(2, 7, H * D) for part in pull_back(jnp.asarray(dout))]
    known = _known_sums(plan, jnp.asarray(dout.sum((0, 1)).reshape(-1)), dqkv)
    assert not known[1].any()
    for part, sums in zip(dqkv, known, strict=True):
        # So many roundings of terms of this size.
        bound = 64 * 2.0**-24 * np.abs(part).sum((0, 1)).max()
        np.testing.assert_allclose(sums, part.sum((0, 1)), rtol=0, atol=bound)
