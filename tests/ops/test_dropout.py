"""Which elements are dropped: the rate, the scale, and what the bits depend on."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.ops.dropout import PLACES, dropped, noise_of, noise_of_place, noise_of_step, stays

STEP = noise_of_step(42, jnp.int32(7))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_as_many_stay_as_the_rate_leaves(rate):
    kept = np.asarray(stays(rate, (4, 64, 256), STEP))
    # Binomial: five standard deviations, also of every row and every column.
    for found, number in ((kept.mean(), kept.size), (kept.mean(-1), 256), (kept.mean((0, 1)), 256)):
        np.testing.assert_allclose(found, 1 - rate, atol=5 * np.sqrt(rate * (1 - rate) / number))


def test_no_two_of_a_runs_arrays_drop_the_same():
    """Steps, micro-batches, devices, layers and places: their masks agree as often as independent ones do."""
    steps = [noise_of_step(seed, jnp.int32(step)) for seed in (0, 42) for step in (0, 1)]
    parts = [noise_of(STEP, number) for number in (0, 1)]
    places = [noise_of_place(parts[0], layer, place) for layer in (0, 1) for place in PLACES]
    masks = [np.asarray(stays(0.5, (64, 64), noise)) for noise in (*steps, *parts, *places)]
    for one, other in itertools.combinations(masks, 2):
        assert abs((one == other).mean() - 0.5) < 5 * np.sqrt(0.25 / one.size)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_stays_is_scaled_and_so_is_its_cotangent(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 8)).astype(np.float32)).astype(dtype)
    y, pull_back = jax.vjp(lambda x: dropped(0.25, x, STEP), x)
    kept = np.asarray(stays(0.25, x.shape, STEP))
    expected = jnp.where(kept, (x.astype(jnp.float32) / 0.75).astype(dtype), jnp.zeros((), dtype))
    assert y.dtype == x.dtype
    # One rounding of the factor, one of the product.
    unit = 2.0**-23 if dtype == "float32" else 2.0**-7
    np.testing.assert_allclose(*(np.asarray(each.astype(jnp.float32)) for each in (y, expected)), rtol=unit)
    (dx,) = pull_back(x)
    np.testing.assert_array_equal(dx, y)
    assert 0 < kept.sum() < kept.size


def test_the_backward_keeps_no_mask():
    def loss(x):
        return jnp.sum(dropped(0.25, x, STEP))

    _, pull_back = jax.vjp(loss, jnp.ones((64, 64)))
    kept = [leaf for leaf in jax.tree_util.tree_leaves(pull_back) if leaf.size > 1]
    assert not any(leaf.dtype in (jnp.bool_, jnp.uint32) for leaf in kept)
