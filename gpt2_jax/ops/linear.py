"""The linear layer as a threaded op, over the products that the plan has chosen."""

from __future__ import annotations

import jax

from gpt2_jax.ops.matmul import column_sums, product, product_dx
from gpt2_jax.ops.threaded import Site, Slots, threaded
from gpt2_jax.ops.writer import write_gradient, write_product


def linear_forward(site: Site, x: jax.Array, flat_N: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x wᵀ + b, and x, which the backward needs."""
    w_OI, b_O = (site.view(flat_N, name) for name in site.names)
    return product(site.plan, x, w_OI, b_O, x.dtype), x


def linear_gradients(site: Site, x: jax.Array, dy: jax.Array, gradient_N: jax.Array) -> tuple[jax.Array, Slots]:
    """Write the gradients of weight and bias; returns the buffer and the slots' cotangents."""
    weight, bias = site.names
    dy_MO = dy.reshape(-1, dy.shape[-1])
    gradient_N, w_slot = write_product(site, gradient_N, weight, dy_MO, x.reshape(-1, x.shape[-1]))
    gradient_N, b_slot = write_gradient(site, gradient_N, bias, column_sums(site.plan, dy_MO))
    return gradient_N, {weight: w_slot, bias: b_slot}


def _linear_backward(
    site: Site, x: jax.Array, flat_N: jax.Array, dy: jax.Array, gradient_N: jax.Array
) -> tuple[jax.Array, jax.Array, Slots]:
    gradient_N, slots = linear_gradients(site, x, dy, gradient_N)
    return product_dx(site.plan, dy, site.view(flat_N, site.names[0])), gradient_N, slots


# The threaded op of a linear layer: names are its weight (O, I) and its bias (O,); x is (..., I), y (..., O) in x's dtype.
linear = threaded(linear_forward, _linear_backward)
