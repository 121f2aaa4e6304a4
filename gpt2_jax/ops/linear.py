"""The linear layer as a threaded op, over the products that the plan has chosen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from gpt2_jax.ops.matmul import product, product_dx
from gpt2_jax.ops.summed import Summed
from gpt2_jax.ops.threaded import Site, Slots, threaded
from gpt2_jax.ops.writer import write_gradient, write_product


def linear_forward(site: Site, x: jax.Array, flat_N: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x wᵀ + b, and x, which the backward needs."""
    w_OI, b_O = (site.view(flat_N, name) for name in site.names)
    return product(site.plan, x, w_OI, b_O, x.dtype), x


def linear_gradients(site: Site, x: jax.Array, dy: Summed, gradient_N: jax.Array) -> tuple[jax.Array, Slots]:
    """Write the gradients of weight and bias; returns the buffer and the slots' cotangents."""
    weight, bias = site.names
    gradient_N, w_slot = write_product(site, gradient_N, weight, dy.value, x)
    gradient_N, b_slot = write_gradient(site, gradient_N, bias, dy.sums)
    return gradient_N, {weight: w_slot, bias: b_slot}


def _linear_backward(
    site: Site, x: jax.Array, flat_N: jax.Array, dy: Summed, gradient_N: jax.Array
) -> tuple[Summed, jax.Array, Slots]:
    gradient_N, slots = linear_gradients(site, x, dy, gradient_N)
    w_OI = site.view(flat_N, site.names[0])
    # The rows of dy w add up to the sum of dy's rows, times w.
    dx_sums = jnp.sum(lax.expand_dims(dy.sums, (1,)) * w_OI.array(), axis=0)
    return Summed(product_dx(site.plan, dy.value, w_OI), dx_sums), gradient_N, slots


# The threaded op of a linear layer: names are its weight (O, I) and its bias (O,); x is (..., I), y (..., O) in x's dtype.
linear = threaded(linear_forward, _linear_backward, knows_sums=True)
