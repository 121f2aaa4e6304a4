"""The JAX views over the buffer against NumPy's, and their hand-written derivative."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from gpt2_jax.buffer.views import Layer, views


def test_views_equal_numpys(tiny_layout, tiny_params):
    expected = tiny_layout.views(tiny_params)
    found = views(jnp.asarray(tiny_params), tiny_layout)
    for name in ("wte", "wpe", "lnfw", "lnfb"):
        np.testing.assert_array_equal(getattr(found, name), expected[name])
    assert len(found.layers) == tiny_layout.config.num_layers
    for index, layer in enumerate(found.layers):
        for name in Layer._fields:
            np.testing.assert_array_equal(getattr(layer, name), expected[name][index])


def test_derivative_puts_each_gradient_at_its_tensors_place(tiny_layout, tiny_params):
    cotangent = np.random.default_rng(3).normal(size=tiny_layout.num_parameters).astype(np.float32)
    _, pull_back = jax.vjp(lambda params: views(params, tiny_layout), jnp.asarray(tiny_params))
    (gradient,) = pull_back(views(jnp.asarray(cotangent), tiny_layout))
    np.testing.assert_array_equal(gradient, cotangent)


def test_derivative_is_one_concatenation_without_a_pad(tiny_layout, tiny_params):
    def total(params):
        return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree_util.tree_leaves(views(params, tiny_layout)))

    operations = str(jax.make_jaxpr(jax.grad(total))(jnp.asarray(tiny_params)))
    assert " pad[" not in operations
    assert operations.count(" concatenate[") == 1
