"""The linear layer's products in the form that jax-mps recognises: x times the transposed weight, plus the bias.

Leading dimensions stay as they are, since a reshape would part the bias from what follows in one kernel of MLX. jax-mps
gives a product the dtype of its operands, whatever dtype is declared. So a bfloat16 product is declared as one, and
converted behind it: sums are float32, the result is rounded once, the sum with the bias once more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from gpt2_jax.ops.threaded import WeightView, rounded

if TYPE_CHECKING:
    from gpt2_jax.compute.plan import Plan

WHY = "the form that jax-mps makes one operation with the bias"


def _forward(plan: Plan, x: jax.Array, w_OI: WeightView, b_O: WeightView | None, dtype: jnp.dtype) -> jax.Array:
    w_IO = lax.transpose(rounded(w_OI.array(), x.dtype), (1, 0))
    y = lax.dot_general(x, w_IO, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=x.dtype)
    if b_O is not None:
        b = rounded(b_O.array(), x.dtype)
        y = lax.add(y, lax.broadcast_in_dim(b, y.shape, (y.ndim - 1,)))
    return lax.convert_element_type(y, dtype)


def _dx(plan: Plan, dy: jax.Array, w_OI: WeightView) -> jax.Array:
    w = rounded(w_OI.array(), dy.dtype)
    return lax.dot_general(dy, w, (((dy.ndim - 1,), (0,)), ((), ())), preferred_element_type=dy.dtype)


def _dw(plan: Plan, dy: jax.Array, x: jax.Array) -> jax.Array:
    rows = tuple(range(x.ndim - 1))
    dw_OI = lax.dot_general(dy, x, ((rows, rows), ((), ())), preferred_element_type=x.dtype)
    return lax.convert_element_type(dw_OI, jnp.float32)


FUNCTIONS = (_forward, _dx, _dw)  # in the order of matmul.Products
