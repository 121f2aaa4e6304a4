"""The forward pass and its gradient: causality, the padding rows, the dtypes, shorter sequences.

Values are checked in tests/compute/test_gradient.py and tests/peers.
"""

from __future__ import annotations

import typing
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.compute.forward import all_logits
from gpt2_jax.compute.step import loss_and_gradient
from gpt2_jax.config import ComputeSettings
from gpt2_jax.ops.recompute import RECOMPUTED
from tests.conftest import TINY, available
from tests.implementations import dtypes, kinds, plan_of_kind

some_kinds = pytest.mark.parametrize("kind", ["xla", *available(["threaded"]), "nvidia"])


def gradient_of(kind, dtype, params, x, y):
    plan = plan_of_kind(kind, dtype)
    return jax.jit(partial(loss_and_gradient, plan))(jnp.asarray(params), jnp.full(params.shape, jnp.nan), x, y)


@kinds
@dtypes
def test_logits_do_not_see_later_tokens(kind, dtype, tiny_params, tiny_batch):
    x = tiny_batch[0].copy()
    plan = plan_of_kind(kind, dtype)
    logits_of = jax.jit(partial(all_logits, plan, jnp.asarray(tiny_params)))
    before = np.asarray(logits_of(x))  # waits: jax may still be reading x
    x[:, 9:] = 0
    after = np.asarray(logits_of(x))
    # Integers share their unit with all positions of a sequence, which a later token may change.
    in_integers = plan.product_precision == "S8_S8_S32_X6"
    atol = 64 * 2.0**-24 * np.abs(before).max() if in_integers else 0
    np.testing.assert_allclose(before[:, :9], after[:, :9], rtol=0, atol=atol)
    assert (before[:, 9:] != after[:, 9:]).any()


@some_kinds
@dtypes
def test_every_tensor_has_a_gradient_in_one_float32_buffer(kind, dtype, tiny_params, tiny_batch):
    loss, grads, squares = gradient_of(kind, dtype, tiny_params, *tiny_batch)
    assert loss.dtype == squares.dtype == jnp.float32
    assert (grads.shape, grads.dtype) == ((TINY.layout.num_parameters,), jnp.float32)
    for name, tensor in TINY.layout.views(np.asarray(grads)).items():
        assert np.isfinite(tensor).all(), name
        of_layers = tensor if TINY.layout[name].stacked else tensor[None, : TINY.vocab_size]
        assert all((layer != 0).any() for layer in of_layers), name
    assert (np.asarray(grads)[slice(*TINY.layout["wte"].padding_span)] == 0).all()


@some_kinds
def test_positions_beyond_a_short_sequence_get_no_gradient(kind, tiny_params, tiny_batch):
    x, y = (tokens[:, :5] for tokens in tiny_batch)
    _, grads, _ = gradient_of(kind, "float32", tiny_params, x, y)
    wpe = TINY.layout.views(np.asarray(grads))["wpe"]
    assert (wpe[5:] == 0).all()
    assert (wpe[:5] != 0).all(axis=1).all()


@some_kinds
def test_bfloat16_loss_is_near_float32s(kind, tiny_params, tiny_batch):
    losses = [float(gradient_of(kind, dtype, tiny_params, *tiny_batch)[0]) for dtype in ("float32", "bfloat16")]
    assert 0 < abs(losses[0] - losses[1]) < 0.05  # llm.c's tolerance; equal would mean that nothing was in bfloat16


def test_jitted_equals_unjitted(tiny_params, tiny_batch):
    """jaxlib has had CPU fusions that computed wrong numbers only under jit."""
    plan, params = plan_of_kind("xla"), jnp.asarray(tiny_params)
    jitted_loss, jitted, _ = jax.jit(partial(loss_and_gradient, plan))(params, None, *tiny_batch)
    with jax.disable_jit():
        loss, grads, _ = loss_and_gradient(plan, params, None, *map(jnp.asarray, tiny_batch))
    assert abs(float(jitted_loss) - float(loss)) < 1e-5
    np.testing.assert_allclose(jitted, grads, rtol=1e-3, atol=1e-6)


def test_recompute_has_the_levels_of_the_settings():
    """The settings are read before jax may be imported, so they name the choices a second time."""
    assert typing.get_args(typing.get_type_hints(ComputeSettings)["recompute"]) == tuple(RECOMPUTED)
