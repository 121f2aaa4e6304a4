"""Views of weights in the flat buffer, and the chain of ops through which the buffer is threaded."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.ops.threaded import Site, WeightView, rounded, threaded
from tests.conftest import TINY
from tests.implementations import plan_of_kind

PLAN = plan_of_kind("xla")


def test_views_are_the_layouts(tiny_params):
    expected = TINY.layout.views(tiny_params)
    for tensor in TINY.layout.tensors:
        for layer in range(tensor.num_layers):
            view = Site(PLAN, (tensor.name,), layer).view(jnp.asarray(tiny_params), tensor.name)
            wanted = expected[tensor.name][layer] if tensor.stacked else expected[tensor.name]
            np.testing.assert_array_equal(view.array(), wanted)


def test_rows_of_a_view():
    view = WeightView(jnp.arange(60), 7, (5, 2, 3))
    np.testing.assert_array_equal(view.rows(1, 4).array(), np.arange(7, 37).reshape(5, 2, 3)[1:4])


def test_a_view_is_a_pytree_of_its_buffer_alone():
    """So that it passes through jit with its place as a constant."""
    view = WeightView(jnp.arange(20.0), 3, (2, 4))
    found = jax.jit(lambda view: view.array() + view.offset)(view)
    np.testing.assert_array_equal(found, np.arange(3.0, 11.0).reshape(2, 4) + 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounded_is_a_cast(dtype):
    weight = jnp.asarray(np.random.default_rng(0).normal(size=1000) * 10.0 ** np.arange(-30, 20, 0.05), jnp.float32)
    found = jax.jit(lambda weight: rounded(weight, jnp.dtype(dtype)))(weight)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, weight.astype(dtype))


def test_a_site_says_whether_a_gradient_is_added():
    site = Site(PLAN, ("wte", "wpe"))
    assert not site.adds("wte")
    assert site._replace(added=("wte",)).adds("wte")
    assert not site._replace(added=("wte",)).adds("wpe")
    assert site._replace(accumulate=True).adds("wpe")
    assert site.over("fcw").names == ("fcw",)


def test_ops_backward_in_the_opposite_order_of_their_forward():
    """Each takes the gradient buffer that the op behind it has written to, and none adds up whole buffers."""

    def forward(site, x, flat_N):
        return x * flat_N[site.layer], x

    def backward(site, x, flat_N, dy, gradient_N):
        return dy * flat_N[site.layer], gradient_N.at[site.layer].set(dy * x), {}

    op = threaded(forward, backward)

    def chain(x, flat_N):
        for layer in range(3):
            x, flat_N = op(Site(PLAN, (), layer), x, flat_N, {})
        return x, flat_N

    flat_N = jnp.array([2.0, 3.0, 5.0, 7.0])

    def gradient(x, flat_N, gradient_N):
        (y, passed), pull_back = jax.vjp(chain, x, flat_N)
        return y, passed, *pull_back((jnp.float32(1.0), gradient_N))

    y, passed, dx, gradient_N = gradient(jnp.float32(4.0), flat_N, jnp.full(4, -1.0))
    assert (float(y), float(dx)) == (120.0, 30.0)
    np.testing.assert_array_equal(passed, flat_N)
    np.testing.assert_array_equal(gradient_N, [60.0, 40.0, 24.0, -1.0])
    operations = str(jax.make_jaxpr(gradient)(jnp.float32(4.0), flat_N, flat_N))
    assert ":f32[4] = add" not in operations
