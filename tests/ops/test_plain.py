"""A plain function as a threaded op has the derivatives of automatic differentiation, under every writer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.ops.plain import plain
from gpt2_jax.ops.threaded import Site
from tests.conftest import TINY, available
from tests.implementations import plan_of_kind
from tests.ops.seams import assert_within, differentiate, parameters, random

NAMES = ("fcw", "fcb", "wpe")  # a product's weight, a vector, and a matrix that no product reads


def toy(site, x, w_OI, b_O, p_TI):
    """Two results, one of which uses a weight twice."""
    moved = x + p_TI[: x.shape[0]]
    return jnp.tanh(moved @ w_OI.T / 8 + b_O[None]) * b_O[None], jnp.sin(moved)


@pytest.mark.parametrize("kind", ["xla", *available(["threaded"]), "nvidia"])
def test_derivatives_are_autodiffs(kind):
    plan = plan_of_kind(kind)
    params, x = parameters(plan), jnp.asarray(random(1, 7, TINY.channels))
    dy = jnp.asarray(random(2, 7, 4 * TINY.channels)), jnp.asarray(random(3, 7, TINY.channels))
    site = Site(plan, NAMES)
    found = differentiate(plain(toy), site, x, params, dy)
    tensors = TINY.layout.views(params)
    weights = [tensors["fcw"][0], tensors["fcb"][0], tensors["wpe"]]
    y, pull_back = jax.jit(lambda x, *weights: jax.vjp(lambda *each: toy(site, *each), x, *weights))(
        x, *map(jnp.asarray, weights)
    )
    dx, *gradients = pull_back(dy)
    assert_within(found.y, y, 16, "float32")
    assert_within(found.dx, dx, 64, "float32")
    for name, gradient in zip(NAMES, gradients, strict=True):
        assert_within(found.weights[name], gradient, 64, "float32")
    assert (np.asarray(found.weights["wpe"])[7:] == 0).all()
