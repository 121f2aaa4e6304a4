"""The compiled step: accumulation, what it donates, what it returns."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.buffer.adamw import adamw, learning_rate_schedule
from gpt2_jax.compute.step import create_state, loss_and_gradient, make_train_step
from gpt2_jax.gradient_check import compare_losses
from gpt2_jax.llmc.rounding import RoundingStream, rounded_to_nearest, stochastically_rounded
from gpt2_jax.ops.cpu import library as custom_calls
from gpt2_jax.ops.linear import IMPLEMENTATIONS
from tests.conftest import TINY, available

FLOAT32 = jnp.dtype("float32")


def make_step(layout, *, matmul="xla", dtype=FLOAT32, **options):
    schedule = learning_rate_schedule("linear", 1e-2, steps=20, final_fraction=0.5)
    optimizer = adamw(schedule, layout, weight_decay=0.1, custom_call=custom_calls.serve(matmul))
    return optimizer, make_train_step(layout, optimizer, schedule, dtype=dtype, matmul=matmul, **options)


def test_micro_batches_sum_to_the_whole_batchs_gradient(tiny_layout, tiny_params, tiny_batch):
    x, y = tiny_batch
    params = jnp.asarray(tiny_params)
    loss, grads, _ = loss_and_gradient(params, x[None], y[None], tiny_layout, dtype=FLOAT32, matmul="xla")
    accumulated = loss_and_gradient(params, x[:, None], y[:, None], tiny_layout, dtype=FLOAT32, matmul="xla")
    assert abs(float(loss) - float(accumulated[0])) < 1e-6
    # Three terms in another order: a few roundings of the largest elements.
    np.testing.assert_allclose(accumulated[1], grads, rtol=1e-5, atol=1e-7)


def test_micro_batches_written_out_give_the_same_as_the_loop(tiny_layout, tiny_params, tiny_batch):
    x, y = (batch[:, None] for batch in tiny_batch)
    results = []
    for loops in (True, False):
        step = jax.jit(partial(loss_and_gradient, layout=tiny_layout, dtype=FLOAT32, matmul="xla", loops=loops))
        assert ("stablehlo.while" in step.lower(tiny_params, x, y).as_text()) == loops
        results.append(step(tiny_params, x, y))
    assert abs(float(results[0][0]) - float(results[1][0])) < 1e-6
    # The compiler may fuse the two differently: a rounding of the largest terms.
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-5, atol=1e-7)


def test_training_learns_and_reports(tiny_layout, tiny_params, tiny_batch):
    optimizer, step = make_step(tiny_layout)
    state = create_state(tiny_params, optimizer)
    losses, rates = [], []
    for _ in range(15):
        state, metrics = step(state, tiny_batch[0][None], tiny_batch[1][None])
        losses.append(float(metrics.loss))
        rates.append(float(metrics.learning_rate))
        assert float(metrics.gradient_norm) > 0
    assert losses[-1] < losses[0] - 1
    np.testing.assert_allclose(rates, [1e-2 - 5e-3 * i / 20 for i in range(15)], rtol=1e-5)
    assert int(state.optimizer.step) == 15
    for buffer in (state.params, state.optimizer.m, state.optimizer.v):
        assert (np.asarray(buffer)[slice(*tiny_layout["wte"].padding_span)] == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", available(name for name in IMPLEMENTATIONS if name != "xla"))
def test_twenty_steps_losses_are_those_of_xla(tiny_layout, tiny_params, implementation, dtype):
    tokens_SBT = np.random.default_rng(1).integers(0, 10, (20, 2, 17)).astype(np.int32)  # few, which is to be learned
    losses: dict[str, list[float]] = {}
    for matmul in ("xla", implementation):
        optimizer, step = make_step(tiny_layout, matmul=matmul, dtype=jnp.dtype(dtype))
        state = create_state(tiny_params, optimizer, matmul=matmul)
        losses[matmul] = []
        for tokens_BT in tokens_SBT:
            state, metrics = step(state, tokens_BT[None, :, :-1], tokens_BT[None, :, 1:])
            losses[matmul].append(float(metrics.loss))
    assert max(losses["xla"]) - min(losses["xla"]) > 1
    compared = compare_losses(losses[implementation], losses["xla"], TINY, dtype)
    assert compared.passed, (compared, losses)


@pytest.mark.parametrize("donate", [True, False])
def test_the_old_state_is_donated_only_where_asked(tiny_layout, tiny_params, tiny_batch, donate):
    optimizer, step = make_step(tiny_layout, donate=donate)
    state = create_state(tiny_params, optimizer)
    step(state, tiny_batch[0][None], tiny_batch[1][None])
    leaves = (state.params, state.optimizer.m, state.optimizer.v)
    assert all(leaf.is_deleted() == donate for leaf in leaves)


def test_the_same_steps_give_the_same_bits(tiny_layout, tiny_params, tiny_batch):
    results = []
    for _ in range(2):
        optimizer, step = make_step(tiny_layout)
        state = create_state(tiny_params, optimizer)
        for _ in range(3):
            state, _ = step(state, tiny_batch[0][:, None], tiny_batch[1][:, None])
        results.append(np.asarray(state.params))
    np.testing.assert_array_equal(*results)


def test_the_caller_keeps_its_own_buffer(tiny_layout, tiny_params, tiny_batch):
    params = tiny_params.copy()
    optimizer, step = make_step(tiny_layout)
    jax.block_until_ready(step(create_state(params, optimizer), tiny_batch[0][None], tiny_batch[1][None]))
    np.testing.assert_array_equal(params, tiny_params)


def buffers(state):
    return [np.asarray(buffer) for buffer in (state.params, state.optimizer.m, state.optimizer.v)]


@pytest.mark.parametrize("outlier", ["not finite", "z-score"])
def test_a_refused_update_changes_nothing_but_the_count(tiny_layout, tiny_params, tiny_batch, outlier):
    x, y = tiny_batch[0][None], tiny_batch[1][None]
    params = tiny_params.copy()
    if outlier == "not finite":
        tiny_layout.views(params)["qkvw"][1, 5, 5] = np.inf
    optimizer, step = make_step(tiny_layout, max_gradient_z=2.0, donate=False)
    state = create_state(params, optimizer)
    state = state.replace(optimizer=state.optimizer._replace(m=state.params * 2, v=jnp.square(state.params)))
    if outlier == "z-score":
        windows = np.random.default_rng(0).normal(5.0, 0.1, (2, 128)).astype(np.float32)
        windows[1] = np.linspace(1e-4, 2e-4, 128)  # a gradient like this one's was never seen
        state = state.replace(windows=jnp.asarray(windows))
    new, metrics = step(state, x, y)
    assert not metrics.verdict.applies
    assert bool(metrics.verdict.is_finite) == (outlier == "z-score")
    for found, before in zip(buffers(new), buffers(state), strict=True):
        np.testing.assert_array_equal(found, before)
    assert (int(state.optimizer.step), int(new.optimizer.step)) == (0, 1)
    unchanged = np.array_equal(new.windows, state.windows, equal_nan=True)
    assert unchanged == (outlier == "not finite")


def test_with_seeds_the_new_parameters_are_the_rounded_ones(tiny_layout, tiny_params, tiny_batch):
    x, y = tiny_batch[0][None], tiny_batch[1][None]
    seeds = RoundingStream().next_seeds(1)
    optimizer, step = make_step(tiny_layout, donate=False)
    state = create_state(rounded_to_nearest(tiny_params), optimizer)
    plain, _ = step(state, x, y)
    rounded, _ = step(state, x, y, seeds)
    expected = stochastically_rounded(np.asarray(plain.params), tiny_layout, seeds)
    np.testing.assert_array_equal(np.asarray(rounded.params), expected)
    np.testing.assert_array_equal(np.asarray(rounded.optimizer.m), np.asarray(plain.optimizer.m))
    assert (expected != np.asarray(plain.params)).any()
