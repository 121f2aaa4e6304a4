"""The compiled step: accumulation, what it donates, what it returns."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt2_jax.buffer.adamw import BETA1, BETA2, EPSILON, GRADIENT_CLIP
from gpt2_jax.compute import step as compute
from gpt2_jax.compute.plan import Plan
from gpt2_jax.compute.step import accumulated_gradient, compile_step, create_state, state_shapes
from gpt2_jax.config import OptimizerSettings
from gpt2_jax.gradient_check import compare_losses
from gpt2_jax.jax_compat import on_host
from gpt2_jax.llmc.rounding import RoundingStream, rounded_to_nearest, stochastically_rounded
from gpt2_jax.ops.matmul import IMPLEMENTATIONS
from tests.conftest import CPU, TINY, available, plan_of

SETTINGS = OptimizerSettings(schedule="linear", learning_rate=1e-2, final_learning_rate_fraction=0.5, weight_decay=0.1)
WITHOUT_LOOPS = dataclasses.replace(CPU, lacks=CPU.lacks | {"loops"})
WITHOUT_DONATION = dataclasses.replace(CPU, lacks=CPU.lacks | {"donation"})


def make_step(plan: Plan, **settings):
    return compute.make_step(plan, dataclasses.replace(SETTINGS, **settings), 20)


@pytest.mark.parametrize("matmul", available(["xla", "threaded"]))
def test_micro_batches_sum_to_the_whole_batchs_gradient(tiny_params, tiny_batch, matmul):
    x, y = tiny_batch
    gradient = jax.jit(partial(accumulated_gradient, plan_of(matmul=matmul)))
    params, garbage = jnp.asarray(tiny_params), jnp.full(tiny_params.shape, np.nan, jnp.float32)
    loss, grads, squares = gradient(params, garbage, x[None], y[None])
    accumulated = gradient(params, garbage, x[:, None], y[:, None])
    assert abs(float(loss) - float(accumulated[0])) < 1e-6
    # Three terms in another order: a few roundings of the largest elements.
    np.testing.assert_allclose(accumulated[1], grads, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(accumulated[2], squares, rtol=1e-4)


def test_micro_batches_written_out_give_the_same_as_the_loop(tiny_params, tiny_batch):
    x, y = (batch[:, None] for batch in tiny_batch)
    results = []
    for loops in (True, False):
        gradient = jax.jit(partial(accumulated_gradient, plan_of(backend=CPU if loops else WITHOUT_LOOPS)))
        assert ("stablehlo.while" in gradient.lower(tiny_params, None, x, y).as_text()) == loops
        results.append(gradient(tiny_params, None, x, y))
    assert abs(float(results[0][0]) - float(results[1][0])) < 1e-6
    # The compiler may fuse the two differently: a rounding of the largest terms.
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-5, atol=1e-7)


def test_training_learns_and_reports(tiny_layout, tiny_params, tiny_batch):
    plan = plan_of()
    step, state = make_step(plan), create_state(plan, tiny_params)
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
def test_twenty_steps_losses_are_those_of_xla(tiny_params, implementation, dtype):
    tokens_SBT = np.random.default_rng(1).integers(0, 10, (20, 2, 17)).astype(np.int32)  # few, which is to be learned
    losses: dict[str, list[float]] = {}
    for matmul in ("xla", implementation):
        plan = plan_of(matmul=matmul, dtype=dtype)
        step, state = make_step(plan), create_state(plan, tiny_params)
        losses[matmul] = []
        for tokens_BT in tokens_SBT:
            state, metrics = step(state, tokens_BT[None, :, :-1], tokens_BT[None, :, 1:])
            losses[matmul].append(float(metrics.loss))
    assert max(losses["xla"]) - min(losses["xla"]) > 1
    compared = compare_losses(losses[implementation], losses["xla"], TINY, dtype)
    assert compared.passed, (compared, losses)


@pytest.mark.parametrize("donate", [True, False])
def test_the_old_state_is_donated_only_where_the_backend_can(tiny_params, tiny_batch, donate):
    plan = plan_of(backend=CPU if donate else WITHOUT_DONATION)
    state = create_state(plan, tiny_params)
    make_step(plan)(state, tiny_batch[0][None], tiny_batch[1][None])
    leaves = (state.params, state.optimizer.m, state.optimizer.v)
    assert all(leaf.is_deleted() == donate for leaf in leaves)


@pytest.mark.parametrize("matmul", available(["xla", "threaded"]))
def test_the_same_steps_give_the_same_bits(tiny_params, tiny_batch, matmul):
    plan, results = plan_of(matmul=matmul), []
    for _ in range(2):
        step, state = make_step(plan), create_state(plan, tiny_params)
        for _ in range(3):
            state, _ = step(state, tiny_batch[0][:, None], tiny_batch[1][:, None])
        results.append(np.asarray(state.params))
    np.testing.assert_array_equal(*results)


def test_the_caller_keeps_its_own_buffer(tiny_params, tiny_batch):
    params, plan = tiny_params.copy(), plan_of()
    jax.block_until_ready(make_step(plan)(create_state(plan, params), tiny_batch[0][None], tiny_batch[1][None]))
    np.testing.assert_array_equal(params, tiny_params)


def buffers(state):
    return [np.asarray(buffer) for buffer in (state.params, state.optimizer.m, state.optimizer.v)]


@pytest.mark.parametrize("outlier", ["not finite", "z-score"])
def test_a_refused_update_changes_nothing_but_the_count(tiny_layout, tiny_params, tiny_batch, outlier):
    x, y = tiny_batch[0][None], tiny_batch[1][None]
    params = tiny_params.copy()
    if outlier == "not finite":
        tiny_layout.views(params)["qkvw"][1, 5, 5] = np.inf
    plan = plan_of(backend=WITHOUT_DONATION)
    step, state = make_step(plan, skip_gradient_z=2.0), create_state(plan, params)
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
    plan = plan_of(backend=WITHOUT_DONATION)
    step, state = make_step(plan), create_state(plan, rounded_to_nearest(tiny_params))
    plain, _ = step(state, x, y)
    rounded, _ = step(state, x, y, seeds)
    expected = stochastically_rounded(np.asarray(plain.params), tiny_layout, seeds)
    np.testing.assert_array_equal(np.asarray(rounded.params), expected)
    np.testing.assert_array_equal(np.asarray(rounded.optimizer.m), np.asarray(plain.optimizer.m))
    assert (expected != np.asarray(plain.params)).any()


@pytest.mark.parametrize("matmul", available(["xla", "threaded"]))
@pytest.mark.parametrize("rounds", [False, True])
def test_a_step_is_compiled_from_the_shapes_of_the_state_it_is_given(tiny_params, tiny_batch, matmul, rounds):
    """Shapes that were another state's would be refused by the compiled step, or compiled a second time."""
    plan = plan_of(matmul=matmul)
    state = create_state(plan, tiny_params)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state_shapes(plan)) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    compiled = compile_step(plan, SETTINGS, 20, (1, *tiny_batch[0].shape), rounds=rounds)
    seeds = (RoundingStream().next_seeds(1),) if rounds else ()
    _, metrics = compiled(state, tiny_batch[0][None], tiny_batch[1][None], *seeds)
    expected = make_step(plan)(create_state(plan, tiny_params), tiny_batch[0][None], tiny_batch[1][None])[1]
    assert float(metrics.loss) == pytest.approx(float(expected.loss), rel=1e-6)


@pytest.mark.parametrize("matmul", available(["xla", "threaded"]))
def test_looking_at_a_state_on_the_host_does_not_keep_its_memory_from_the_next_step(tiny_params, tiny_batch, matmul):
    """Otherwise every checkpoint would cost a copy of the whole state."""
    plan = plan_of(matmul=matmul)
    step, state = make_step(plan), create_state(plan, tiny_params)
    for _ in range(3):
        saved = [on_host(buffer).copy() for buffer in (state.params, state.optimizer.m, state.optimizer.v)]
        buffers = (state.params, state.optimizer.m, state.optimizer.v)
        places = {buffer.unsafe_buffer_pointer() for buffer in buffers}
        state, _ = jax.block_until_ready(step(state, tiny_batch[0][None], tiny_batch[1][None]))
        assert all(buffer.is_deleted() for buffer in buffers)
        # XLA may hand the buffers on in another order.
        assert {buffer.unsafe_buffer_pointer() for buffer in (state.params, state.optimizer.m, state.optimizer.v)} == places
        assert (saved[0] != np.asarray(state.params.copy())).any()


@pytest.mark.parametrize("implementation", available(["xla", "threaded"]))
@pytest.mark.parametrize("clip", [0.0, 0.25])
def test_adamws_settings_are_optaxs(tiny_params, tiny_batch, implementation, clip):
    """Two steps against optax; float32, so some roundings of an update that is at most the learning rate."""
    plan, rate = plan_of(matmul=implementation), 1e-2
    chosen = {"beta1": 0.7, "beta2": 0.8, "epsilon": 1e-3, "gradient_clip": clip}
    step = make_step(plan, schedule="constant", learning_rate=rate, weight_decay=0.0, **chosen)
    adam = optax.adam(rate, b1=0.7, b2=0.8, eps=1e-3)
    twin = optax.chain(optax.clip_by_global_norm(clip), adam) if clip else adam
    state, params, moments = create_state(plan, tiny_params), jnp.asarray(tiny_params), twin.init(jnp.asarray(tiny_params))
    x, y = tiny_batch[0][None], tiny_batch[1][None]
    for _ in range(2):
        grads = accumulated_gradient(plan, params, None, x, y)[1]
        assert float(jnp.linalg.norm(grads)) > 0.5  # else nothing is clipped
        with jax.numpy_dtype_promotion("standard"):  # optax needs it
            updates, moments = twin.update(grads, moments)
        params = optax.apply_updates(params, updates)
        state, _ = step(state, x, y)
    np.testing.assert_allclose(np.asarray(state.params), np.asarray(params), rtol=0, atol=rate * 1e-4)


def test_the_settings_defaults_are_llmcs():
    settings = OptimizerSettings()
    assert (settings.beta1, settings.beta2, settings.epsilon) == (BETA1, BETA2, EPSILON) == (0.9, 0.95, 1e-8)
    assert settings.gradient_clip == GRADIENT_CLIP == 1.0
