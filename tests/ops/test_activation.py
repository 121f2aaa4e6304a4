"""GELU: its definition, and every implementation against it."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from gpt2_jax.ops.activation import activation_of, gelu
from tests.implementations import plan_with, rows_of
from tests.ops.seams import ROUNDING, in_dtype


def test_gelu_is_the_tanh_form():
    x = np.linspace(-6, 6, 101).astype(np.float32)
    expected = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x.astype(np.float64) ** 3)))
    np.testing.assert_allclose(gelu(x), expected, rtol=0, atol=4 * 6 * 2.0**-24)


def float64_value_and_slope(x):
    scale = np.sqrt(2 / np.pi)
    t = np.tanh(scale * (x + 0.044715 * x**3))
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * scale * (1 + 3 * 0.044715 * x * x)


@rows_of("activation")
@pytest.mark.parametrize("shape", [(2, 5, 13), (1, 1, 1), (3, 1, 67)], ids=str)
def test_value_and_derivative(implementation, dtype, shape):
    plan = plan_with("activation", implementation, dtype)
    size = int(np.prod(shape))
    x, dy = (in_dtype(each.reshape(shape), dtype) for each in (np.linspace(-6, 5, size), np.linspace(-1, 2, size)))
    y, pull_back = jax.vjp(jax.jit(activation_of(plan).function), x)
    (dx,) = pull_back(dy)
    assert y.dtype == dx.dtype == dtype
    x, dy = (np.asarray(each).astype(np.float64) for each in (x, dy))
    value, slope = float64_value_and_slope(x)
    # In bfloat16 XLA's reference rounds after each of some ten operations, whose values are up to |x|³ / 30 inside of tanh,
    # where they no longer count, and up to |x| outside.
    roundings = {"float32": 16, "bfloat16": 4}[dtype] * ROUNDING[dtype]
    np.testing.assert_allclose(np.asarray(y).astype(np.float64), value, rtol=0, atol=roundings * np.abs(x).max())
    # The slope has x times 1 - tanh² times up to 2.5 more: float32's roundings of tanh grow by 14 at |x| = 6.
    of_slope = {"float32": 4 * 14 * 2.0**-24, "bfloat16": roundings}[dtype]
    np.testing.assert_allclose(np.asarray(dx).astype(np.float64), dy * slope, rtol=0, atol=of_slope * np.abs(dy).max())


@rows_of("activation")
def test_far_from_zero_it_is_the_identity_or_nothing(implementation, dtype):
    """An exponential or a cube that overflows would be nan."""
    plan = plan_with("activation", implementation, dtype)
    x = in_dtype(np.array([-1e6, -100.0, -30.0, 0.0, 30.0, 100.0, 1e6]), dtype)
    y, pull_back = jax.vjp(activation_of(plan).function, x)
    slope = pull_back(x * 0 + 1)[0]
    x = np.asarray(x).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(y).astype(np.float32), np.where(x > 0, x, 0))
    np.testing.assert_array_equal(np.asarray(slope).astype(np.float32), np.where(x > 0, 1, np.where(x == 0, 0.5, 0)))
