"""The flat AdamW, by every implementation, against optax's and PyTorch's on a tree of tensors."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt2_jax.buffer.adamw import AdamWState, adamw, clip_scale, global_norm
from gpt2_jax.buffer.layout import ParameterLayout, Tensor
from gpt2_jax.compute.plan import SEAMS
from gpt2_jax.compute.step import make_step, state_shapes
from gpt2_jax.config import OptimizerSettings
from gpt2_jax.families.gpt2 import config_from_descriptor
from tests.conftest import TINY
from tests.implementations import plan_of_kind, plan_with

STEPS, LEARNING_RATE, WEIGHT_DECAY = 5, 1e-2, 0.1
# Each step rounds a handful of float32 operations; parameters are below 2.
TOLERANCE = STEPS * 8 * 2 * 2.0**-24


@pytest.fixture(scope="module")
def gradients(tiny_layout):
    """Gradients of five steps, with norms on both sides of the clipping threshold, and zero padding rows."""
    scales = np.array([1e-4, 1e-1, 3.0, 1e-3, 1.0], dtype=np.float32)
    grads = np.random.default_rng(5).normal(size=(STEPS, tiny_layout.num_parameters)).astype(np.float32)
    grads *= (scales / np.linalg.norm(grads, axis=1))[:, None]
    grads[:, slice(*tiny_layout["wte"].padding_span)] = 0
    return grads


@pytest.fixture(scope="module")
def trained(tiny_layout, tiny_params, gradients):
    optimizer = adamw(lambda count: jnp.float32(LEARNING_RATE), tiny_layout, weight_decay=WEIGHT_DECAY)
    params = jnp.asarray(tiny_params)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for grads in gradients:
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return np.asarray(params), state


def test_equals_optaxs_adamw(tiny_layout, tiny_params, gradients, trained):
    mask = {tensor.name: tensor.decays for tensor in tiny_layout.tensors}
    reference = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(LEARNING_RATE, b1=0.9, b2=0.95, eps=1e-8, weight_decay=WEIGHT_DECAY, mask=mask),
    )
    params = {name: jnp.asarray(tensor) for name, tensor in tiny_layout.views(tiny_params).items()}
    state = reference.init(params)
    update = jax.jit(reference.update)
    for grads in gradients:
        tree = {name: jnp.asarray(tensor) for name, tensor in tiny_layout.views(grads).items()}
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
            updates, state = update(tree, state, params)
        params = optax.apply_updates(params, updates)
    found = tiny_layout.views(trained[0])
    for name, expected in params.items():
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=TOLERANCE, err_msg=name)


@pytest.mark.torch
def test_equals_pytorchs_adamw(tiny_layout, tiny_params, gradients, trained):
    import torch

    tensors = {name: torch.nn.Parameter(torch.tensor(tensor)) for name, tensor in tiny_layout.views(tiny_params).items()}
    groups = [
        {"params": [tensors[t.name] for t in tiny_layout.tensors if t.decays == decays], "weight_decay": WEIGHT_DECAY * decays}
        for decays in (True, False)
    ]
    reference = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8)
    for grads in gradients:
        scale = 1 / max(1.0, float(np.linalg.norm(grads.astype(np.float64))))
        for name, tensor in tiny_layout.views(grads).items():
            tensors[name].grad = torch.tensor(tensor * np.float32(scale))
        reference.step()
    found = tiny_layout.views(trained[0])
    for name, expected in tensors.items():
        np.testing.assert_allclose(found[name], expected.detach().numpy(), rtol=0, atol=TOLERANCE, err_msg=name)


def test_padding_rows_stay_exactly_zero(tiny_layout, trained):
    params, state = trained
    for buffer in (params, np.asarray(state.m), np.asarray(state.v)):
        assert (buffer[slice(*tiny_layout["wte"].padding_span)] == 0).all()
        assert (buffer[: tiny_layout["wte"].padding_span[0]] != 0).any()


def test_state_is_flat_and_counts(tiny_layout, trained):
    state = trained[1]
    assert int(state.step) == STEPS
    assert state.m.shape == state.v.shape == (tiny_layout.num_parameters,)
    assert state.m.dtype == state.v.dtype == jnp.float32


def test_parameters_are_required(tiny_layout, tiny_params):
    optimizer = adamw(lambda count: jnp.float32(1), tiny_layout, weight_decay=0.0)
    with pytest.raises(ValueError, match="params"):
        optimizer.update(jnp.asarray(tiny_params), optimizer.init(jnp.asarray(tiny_params)))


def test_clipping_has_no_epsilon():
    assert float(clip_scale(jnp.float32(0.5))) == 1.0
    assert float(clip_scale(jnp.float32(1.0))) == 1.0
    assert float(clip_scale(jnp.float32(4.0))) == 0.25


def test_no_limit_clips_nothing():
    assert float(clip_scale(jnp.float32(4.0), math.inf)) == 1.0
    assert float(clip_scale(jnp.float32(4.0), 2.0)) == 0.5


def test_global_norm_of_a_long_buffer_is_accurate():
    grads = np.random.default_rng(0).normal(size=4_000_000).astype(np.float32)
    expected = np.linalg.norm(grads.astype(np.float64))
    # A sum in one running float32 would be off by 1e-4 here.
    assert abs(float(jax.jit(global_norm)(grads)) - expected) <= 1e-6 * expected


def test_tiny_has_both_kinds_of_two_dimensional_tensors(tiny_layout):
    """Else the comparisons above could not tell a decay mask by tensor from one by dimensions."""
    decays = {len(tensor.full_shape): set() for tensor in tiny_layout.tensors}
    for tensor in tiny_layout.tensors:
        decays[len(tensor.full_shape)].add(tensor.decays)
    assert decays[2] == {True, False}
    assert TINY.num_layers > 1


implementations = pytest.mark.parametrize("implementation", [row.name for row in SEAMS["adamw"]])


def optimizer_of(implementation, layout, learning_rate=LEARNING_RATE):
    plan_with("adamw", implementation)  # or the test is skipped
    by_custom_call = implementation == "custom_call"
    return adamw(lambda count: jnp.float32(learning_rate), layout, weight_decay=WEIGHT_DECAY, custom_call=by_custom_call)


@implementations
def test_applying_equals_the_updates(implementation, tiny_layout, tiny_params, gradients, trained):
    optimizer = optimizer_of(implementation, tiny_layout)
    params = jnp.array(tiny_params)
    state = optimizer.init(params)
    apply = jax.jit(
        lambda grads, state, params: optimizer.apply(grads, global_norm(grads), jnp.array(True), state, params),
        donate_argnums=(1, 2),
    )
    for grads in gradients:
        params, state = apply(grads, state, params)
    np.testing.assert_allclose(params, trained[0], rtol=0, atol=TOLERANCE)
    for found, expected in ((state.m, trained[1].m), (state.v, trained[1].v)):
        atol = STEPS * 8 * 2.0**-24 * float(jnp.abs(expected).max())
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol)
    assert int(state.step) == STEPS
    start, stop = tiny_layout["wte"].padding_span
    assert (np.asarray(params)[start:stop] == 0).all()


@implementations
def test_an_update_that_is_refused_counts_and_changes_nothing(implementation, tiny_layout, gradients):
    optimizer = optimizer_of(implementation, tiny_layout, 0.1)
    params, m, v = (jnp.array(gradients[i]) for i in range(3))
    grads = jnp.full_like(params, jnp.nan)
    apply = jax.jit(lambda *arguments: optimizer.apply(grads, jnp.float32(jnp.nan), jnp.array(False), *arguments))
    new_params, new = apply(AdamWState(jnp.array(4, jnp.int32), m, v), params)
    for found, before in ((new_params, params), (new.m, m), (new.v, v)):
        np.testing.assert_array_equal(found, before)
    assert int(new.step) == 5


@implementations
@pytest.mark.parametrize(
    "sizes", [(3,), (1, 1, 1), (7, 5, 9, 2), (6, 4, 10), (1025, 7, 64)], ids=lambda sizes: "-".join(map(str, sizes))
)
@pytest.mark.parametrize("first_decays", [False, True])
def test_every_second_tensor_decays_and_no_element_of_another(implementation, sizes, first_decays):
    """Spans that begin, end and touch anywhere, and lengths without a common divisor."""
    layout = ParameterLayout(tuple(Tensor(f"t{i}", (size,), decays=i % 2 != first_decays) for i, size in enumerate(sizes)))
    optimizer = optimizer_of(implementation, layout)
    params = jnp.ones(layout.num_parameters)
    moved, _ = jax.jit(
        lambda params: optimizer.apply(0 * params, jnp.float32(0), jnp.array(True), optimizer.init(params), params)
    )(params)
    expected = np.concatenate([np.full(t.size, 1 - LEARNING_RATE * WEIGHT_DECAY * t.decays) for t in layout.tensors])
    np.testing.assert_allclose(moved, expected, rtol=2 * 2.0**-24)


# 175 billion parameters: more than 32 bits count. A step of them is traced, not run.
HUGE = config_from_descriptor("gpt3:c12288")
LARGE = config_from_descriptor("gpt3:c2560")  # 2.7 billion: more than int32 counts, and an 80 GB GPU trains it


@implementations
def test_more_parameters_than_32_bits_count(implementation):
    layout = HUGE.layout
    assert layout.num_parameters > 2**37
    optimizer = optimizer_of(implementation, layout)
    buffer = jax.ShapeDtypeStruct((layout.num_parameters,), jnp.float32)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    state = jax.eval_shape(optimizer.init, buffer)
    applies = jax.ShapeDtypeStruct((), jnp.bool_)
    params, new = jax.eval_shape(optimizer.apply, buffer, scalar, applies, state, buffer)
    assert params.shape == new.m.shape == new.v.shape == (layout.num_parameters,)


@pytest.mark.parametrize("config", [LARGE, HUGE], ids=["c2560", "c12288"])
@pytest.mark.parametrize(("kind", "dtype"), [("xla", "float32"), ("threaded", "float32"), ("nvidia", "bfloat16")])
def test_a_step_of_more_parameters_than_32_bits_count(kind, dtype, config):
    plan = plan_of_kind(kind, dtype, config)
    tokens = jax.ShapeDtypeStruct((2, 1, 8), jnp.int32)
    state, metrics = jax.eval_shape(make_step(plan, OptimizerSettings(), 10), state_shapes(plan), tokens, tokens)
    assert state.params.shape == (config.layout.num_parameters,)
    assert metrics.loss.shape == ()
