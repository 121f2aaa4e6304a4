"""LayerNorm, alone and in front of a linear layer: every implementation against the reference and float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.ops.layer_norm import layer_norm
from gpt2_jax.ops.norm import norms_of
from gpt2_jax.ops.threaded import Site
from tests.implementations import dtypes, plan_of_kind, plan_with, rows_of
from tests.ops.seams import ROUNDING, assert_within, differentiate, in_dtype, parameters, random

ODD = GPT2Config(max_sequence_length=8, vocab_size=5, num_layers=2, num_heads=1, channels=21)
shapes = pytest.mark.parametrize("leading", [(2, 7), (1, 1), (65,)], ids=str)


def test_layer_norm_against_float64():
    x, gain, bias = 5 * random(0, 2, 3, 64) + 3, *random(1, 2, 64)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5) * gain + bias
    np.testing.assert_allclose(layer_norm(x, gain, bias), expected, rtol=0, atol=64 * 2.0**-24 * np.abs(expected).max())


def test_a_constant_row_is_its_shift():
    """Its variance is zero: without epsilon that would be nan."""
    found = layer_norm(jnp.full((1, 8), 3.0), jnp.ones(8), jnp.arange(8.0))
    np.testing.assert_array_equal(found[0], np.arange(8.0))


@rows_of("norm_linear")
@shapes
def test_norm(implementation, dtype, leading):
    """The residual stream comes through, and takes the gradient around the norm with it."""
    plan = plan_with("norm_linear", implementation, dtype, ODD)
    reference = plan_of_kind("xla", config=ODD)
    params, names = parameters(plan), ("ln2w", "ln2b")
    x, *dy = (in_dtype(3 * random(seed, *leading, 21) + 1, dtype) for seed in range(3))
    found = differentiate(norms_of(plan).norm, Site(plan, names, layer=1), x, params, tuple(dy))
    wide = [each.astype(jnp.float32) for each in (x, *dy)]
    wanted = differentiate(norms_of(reference).norm, Site(reference, names, layer=1), wide[0], params, tuple(wide[1:]))
    assert found.y[0].dtype == found.y[1].dtype == found.dx.dtype == dtype
    np.testing.assert_array_equal(found.y[0], x)
    # A result is rounded once to bfloat16 (twice where XLA adds the residual's gradient after that of the norm); in
    # float32 a dozen operations, and sums over 21 channels or all rows.
    roundings = 32 if dtype == "float32" else 2
    assert_within((found.y[1], found.dx), (wanted.y[1], wanted.dx), roundings, dtype)
    # The gradients of gain and shift are sums of float32.
    assert_within(found.weights, wanted.weights, 128, "float32")


@rows_of("norm_linear")
@shapes
@pytest.mark.parametrize("parts", [1, 3])
def test_norm_linear(implementation, dtype, leading, parts):
    plan = plan_with("norm_linear", implementation, dtype, ODD)
    reference = plan_of_kind("xla", config=ODD, matmul_precision="highest")
    params, names = parameters(plan), ("ln1w", "ln1b", "qkvw", "qkvb")
    x, dresidual = (in_dtype(3 * random(seed, *leading, 21) + 1, dtype) for seed in range(2))
    dparts = tuple(in_dtype(random(10 + part, *leading, 63 // parts), dtype) for part in range(parts))

    def run(plan, x, dresidual, dparts):
        site = Site(plan, names, layer=1, parts=parts)
        return differentiate(norms_of(plan).norm_linear, site, x, params, (dresidual, dparts))

    found = run(plan, x, dresidual, dparts)
    wanted = run(reference, *jax.tree.map(lambda each: each.astype(jnp.float32), (x, dresidual, dparts)))
    assert len(found.y[1]) == parts
    assert {each.dtype for each in (*found.y[1], found.dx)} == {jnp.dtype(dtype)}
    np.testing.assert_array_equal(found.y[0], x)
    # bfloat16: both operands of a product may be rounded (the norm; the weight times its gain), the product, and the sum
    # with the bias; those of operands are divided among many terms. Where parts are products of their own, so are their
    # parts of x's gradient, with two roundings each in the running sum. float32: 21 or 63 terms.
    roundings = 64 if dtype == "float32" else 2 + parts
    assert_within((found.y[1], found.dx, found.weights), (wanted.y[1], wanted.dx, wanted.weights), roundings, dtype)


@dtypes
def test_parts_are_the_whole_in_pieces(dtype):
    """q, k and v in this order, by the implementation that makes them one by one."""
    plan = plan_of_kind("nvidia", dtype, config=ODD)
    params, x = parameters(plan), in_dtype(random(0, 2, 3, 21), dtype)
    slots = {name: jnp.zeros(()) for name in ("ln1w", "ln1b", "qkvw", "qkvb")}
    site = Site(plan, tuple(slots))
    (_, (whole,)), _ = norms_of(plan).norm_linear(site, x, jnp.asarray(params), slots)
    (_, parts), _ = norms_of(plan).norm_linear(site._replace(parts=3), x, jnp.asarray(params), slots)
    assert [part.shape for part in parts] == [(2, 3, 21)] * 3
    atol = ROUNDING[dtype] * float(jnp.abs(whole).max())
    joined = jnp.concatenate(parts, axis=-1).astype(jnp.float32)
    np.testing.assert_allclose(joined, whole.astype(jnp.float32), rtol=0, atol=atol)
