"""The flat AdamW against optax's and PyTorch's on a tree of tensors; the schedules against llm.c's formulas."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_jax.buffer.adamw import SCHEDULES, AdamWState, adamw, clip_scale, global_norm, learning_rate_schedule
from tests.conftest import TINY

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


def test_global_norm_of_a_long_buffer_is_accurate():
    grads = np.random.default_rng(0).normal(size=4_000_000).astype(np.float32)
    expected = np.linalg.norm(grads.astype(np.float64))
    # A sum in one running float32 would be off by 1e-4 here.
    assert abs(float(jax.jit(global_norm)(grads)) - expected) <= 1e-6 * expected


def llmc_learning_rate(kind, lr, step, steps, warmup, final):
    """llm.c llmc/schedulers.h in float64."""
    lowest = lr * final
    if kind == "constant":
        return lr
    if step < warmup:
        return lr * (step + 1) / warmup
    if kind == "wsd":
        decay_point = int(0.8 * steps)
        if step < decay_point:
            return lr
        return lowest + (1 - math.sqrt((step - decay_point) / (steps - decay_point))) * (lr - lowest)
    ratio = (step - warmup) / (steps - warmup)
    if kind == "cosine":
        return lowest + 0.5 * (1 + math.cos(math.pi * ratio)) * (lr - lowest)
    return lr - ratio * (lr - lowest)


@given(
    kind=st.sampled_from(SCHEDULES),
    steps=st.integers(2, 200_000),
    warmup_fraction=st.floats(0, 0.7),
    position=st.floats(0, 1, exclude_max=True),
    final=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_schedules_are_llmcs(kind, steps, warmup_fraction, position, final):
    lr, warmup, step = 6e-4, int(steps * warmup_fraction), int(position * steps)
    schedule = learning_rate_schedule(kind, lr, steps=steps, warmup_steps=warmup, final_fraction=final)
    found = schedule(jnp.int32(step))
    assert found.dtype == jnp.float32
    # A few float32 operations on numbers up to lr; sqrt is steep at the start of wsd's decay.
    np.testing.assert_allclose(found, llmc_learning_rate(kind, lr, step, steps, warmup, final), rtol=0, atol=lr * 1e-5)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="expected one of"):
        learning_rate_schedule("cosin", 1e-3, steps=10)


def test_tiny_has_both_kinds_of_two_dimensional_tensors(tiny_layout):
    """Else the comparisons above could not tell a decay mask by tensor from one by dimensions."""
    decays = {len(tensor.full_shape): set() for tensor in tiny_layout.tensors}
    for tensor in tiny_layout.tensors:
        decays[len(tensor.full_shape)].add(tensor.decays)
    assert decays[2] == {True, False}
    assert TINY.num_layers > 1


def test_the_custom_call_equals_the_reference(tiny_layout, tiny_params, gradients, trained):
    optimizer = adamw(lambda count: jnp.float32(LEARNING_RATE), tiny_layout, weight_decay=WEIGHT_DECAY, custom_call=True)
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


@pytest.mark.parametrize("custom_call", [False, True])
def test_an_update_that_is_refused_counts_and_changes_nothing(tiny_layout, tiny_params, gradients, custom_call):
    optimizer = adamw(lambda count: jnp.float32(0.1), tiny_layout, weight_decay=WEIGHT_DECAY, custom_call=custom_call)
    params, m, v = (jnp.array(gradients[i]) for i in range(3))
    grads = jnp.full_like(params, jnp.nan)
    apply = jax.jit(lambda *arguments: optimizer.apply(grads, jnp.float32(jnp.nan), jnp.array(False), *arguments))
    new_params, new = apply(AdamWState(jnp.array(4, jnp.int32), m, v), params)
    for found, before in ((new_params, params), (new.m, m), (new.v, v)):
        np.testing.assert_array_equal(found, before)
    assert int(new.step) == 5
