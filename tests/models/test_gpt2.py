"""The forward pass: causality, the padding rows, the dtypes, shorter sequences. Values are checked in tests/peers."""

from __future__ import annotations

import typing
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.compute.step import loss_and_gradient
from gpt2_jax.config import ComputeSettings
from gpt2_jax.models import gpt2 as model
from gpt2_jax.models.gpt2 import RECOMPUTED
from tests.conftest import TINY

FLOAT32, BFLOAT16 = jnp.dtype("float32"), jnp.dtype("bfloat16")


def gradient_function(layout, dtype):
    return jax.jit(lambda params, x, y: jax.value_and_grad(model.loss)(params, x, y, layout, dtype=dtype))


def test_layer_norm_against_float64():
    rng = np.random.default_rng(0)
    x, gain, bias = rng.normal(3, 5, (2, 3, 64)).astype(np.float32), *rng.normal(size=(2, 64)).astype(np.float32)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5) * gain + bias
    np.testing.assert_allclose(model.layer_norm(x, gain, bias), expected, rtol=0, atol=64 * 2.0**-24 * np.abs(expected).max())


def test_gelu_is_the_tanh_form():
    x = np.linspace(-6, 6, 101).astype(np.float32)
    expected = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x.astype(np.float64) ** 3)))
    np.testing.assert_allclose(model.gelu(x), expected, rtol=0, atol=4 * 6 * 2.0**-24)


def test_logits_do_not_see_later_tokens(tiny_layout, tiny_params, tiny_batch):
    x = tiny_batch[0].copy()
    logits_of = jax.jit(lambda x: model.logits(jnp.asarray(tiny_params), x, tiny_layout, dtype=FLOAT32))
    before = np.asarray(logits_of(x))  # waits: jax may still be reading x
    x[:, 9:] = 0
    after = np.asarray(logits_of(x))
    np.testing.assert_array_equal(before[:, :9], after[:, :9])
    assert (before[:, 9:, : TINY.vocab_size] != after[:, 9:, : TINY.vocab_size]).any()


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_gradient_is_one_float32_buffer_with_zero_padding_rows(tiny_layout, tiny_params, tiny_batch, dtype):
    loss, grads = gradient_function(tiny_layout, dtype)(tiny_params, *tiny_batch)
    assert loss.dtype == jnp.float32
    assert (grads.shape, grads.dtype) == ((tiny_layout.num_parameters,), jnp.float32)
    for name, tensor in tiny_layout.views(np.asarray(grads)).items():
        assert np.isfinite(tensor).all(), name
        assert (tensor[: TINY.vocab_size] != 0).any(), name
    assert (np.asarray(grads)[slice(*tiny_layout["wte"].padding_span)] == 0).all()


def test_positions_beyond_a_short_sequence_get_no_gradient(tiny_layout, tiny_params, tiny_batch):
    x, y = (tokens[:, :5] for tokens in tiny_batch)
    _, grads = gradient_function(tiny_layout, FLOAT32)(tiny_params, x, y)
    wpe = tiny_layout.views(np.asarray(grads))["wpe"]
    assert (wpe[5:] == 0).all()
    assert (wpe[:5] != 0).all(axis=1).all()


def test_bfloat16_loss_is_near_float32s(tiny_layout, tiny_params, tiny_batch):
    losses = [float(gradient_function(tiny_layout, dtype)(tiny_params, *tiny_batch)[0]) for dtype in (FLOAT32, BFLOAT16)]
    assert 0 < abs(losses[0] - losses[1]) < 0.05  # llm.c's tolerance; equal would mean that nothing was in bfloat16


def test_jitted_equals_unjitted(tiny_layout, tiny_params, tiny_batch):
    """jaxlib has had CPU fusions that computed wrong numbers only under jit."""

    function = gradient_function(tiny_layout, FLOAT32)
    jitted_loss, jitted = function(jnp.asarray(tiny_params), *tiny_batch)
    with jax.disable_jit():
        loss, grads = function(jnp.asarray(tiny_params), *tiny_batch)
    assert abs(float(jitted_loss) - float(loss)) < 1e-5
    np.testing.assert_allclose(jitted, grads, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("matmul", ["xla", "threaded"])
@pytest.mark.parametrize("recompute", RECOMPUTED)
def test_what_is_computed_anew_changes_the_gradient_by_roundings_at_most(
    tiny_layout, tiny_params, tiny_batch, matmul, recompute
):
    x_ABT, y_ABT = (part[None] for part in tiny_batch)

    def compiled(recompute):
        function = partial(loss_and_gradient, layout=tiny_layout, dtype=jnp.dtype("float32"), matmul=matmul)
        return jax.jit(partial(function, recompute=recompute)).lower(jnp.asarray(tiny_params), x_ABT, y_ABT).compile()

    def products(compiled):
        return compiled.as_text().count(" dot(" if matmul == "xla" else 'custom_call_target="gpt2_jax_matmul')

    plain, anew = compiled("none"), compiled(recompute)
    expected, found = (function(jnp.asarray(tiny_params), x_ABT, y_ABT) for function in (plain, anew))
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=2.0**-22)
    # One float32 operation more or less of every kind, relative to the largest gradient.
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=2.0**-20 * float(jnp.abs(expected[1]).max()))
    # Only a whole block makes products twice: those up to the last, whose result no derivative needs.
    assert (products(anew) > products(plain)) == (recompute == "block")


def test_recompute_has_the_levels_of_the_settings():
    """The settings are read before jax may be imported, so they name the choices a second time."""
    assert typing.get_args(typing.get_type_hints(ComputeSettings)["recompute"]) == tuple(RECOMPUTED)
