"""Products by ctypes, as where the library of custom calls was not built: on Linux by OpenBLAS, held against NumPy."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpt2_jax.buffer.views import WeightView
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt2_jax.buffer.adamw import adamw, learning_rate_schedule
from gpt2_jax.compute.backend import Backend
from gpt2_jax.compute.step import create_state, make_train_step
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.ops.cpu import library as custom_calls
from gpt2_jax.ops.linear import choose_implementation, linear, matmul

FLOAT32_ROUNDING = 2.0**-24
CPU = Backend("cpu", "cpu", "test")
RUNG = custom_calls._rung_of_ctypes()


@pytest.fixture(autouse=True)
def no_library(monkeypatch):
    """jax keeps a target for as long as the process lives, so these have names of their own."""

    def missing():
        raise NotImplementedError("it was not built")

    monkeypatch.setattr(custom_calls, "load", missing)
    monkeypatch.setattr(custom_calls, "description", missing)
    monkeypatch.setattr(custom_calls, "MATMUL", "test_ctypes_matmul")
    monkeypatch.setattr(custom_calls, "MATMUL_BIAS", "test_ctypes_matmul_bias")


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 70)),
    transposes=st.tuples(st.booleans(), st.booleans()),
    dtypes=st.tuples(*[st.sampled_from(["float32", "bfloat16"])] * 2),
    offset=st.integers(0, 9),
    has_bias=st.booleans(),
)
def test_product_is_within_its_rounding_error(sizes, transposes, dtypes, offset, has_bias):
    (m, n, k), (transpose_a, transpose_b) = sizes, transposes
    dtype, out_dtype = map(jnp.dtype, dtypes)
    a = random(0, *((k, m) if transpose_a else (m, k))).astype(dtype)
    buffer = random(1, offset + k * n + n)
    b = WeightView(jnp.asarray(buffer), offset, (n, k) if transpose_b else (k, n))
    bias = WeightView(jnp.asarray(buffer), offset + k * n, (n,)) if has_bias else None

    @jax.jit
    def product(a):
        return matmul(
            a,
            b,
            transpose_a=transpose_a,
            transpose_b=transpose_b,
            bias=bias,
            out_dtype=out_dtype,
            implementation=RUNG,
        )

    found = np.asarray(product(a)).astype(np.float64)
    wide_a = a.astype(np.float64)
    wide_b = buffer[offset : offset + k * n].reshape(b.shape).astype(dtype).astype(np.float64)
    wide_a, wide_b = wide_a.T if transpose_a else wide_a, wide_b.T if transpose_b else wide_b
    added = buffer[offset + k * n :][None].astype(np.float64) if has_bias else np.zeros((1, n))
    expected = wide_a @ wide_b + added
    bound = (k + 2) * FLOAT32_ROUNDING * (np.abs(wide_a) @ np.abs(wide_b) + np.abs(added))
    if out_dtype == jnp.bfloat16:
        bound += 2.0**-8 * (np.abs(expected) + bound)
    assert found.shape == (m, n)
    assert (np.abs(found - expected) <= bound).all()


def test_one_rung_is_served_and_said_to_be_called_from_python():
    choice = choose_implementation(RUNG, CPU)
    assert "called from Python" in choice.reason
    assert choice.refusals["threaded"] == "it was not built"
    assert choose_implementation("auto", CPU).name == "xla"
    with pytest.raises(Gpt2JaxError, match="it was not built"):
        choose_implementation("naive", CPU)


def test_without_a_blas_nothing_is_served(monkeypatch):
    monkeypatch.setattr(custom_calls, "_rung_of_ctypes", lambda: None)
    assert choose_implementation("auto", CPU).refusals[RUNG] == "it was not built"
    with pytest.raises(NotImplementedError, match="it was not built"):
        matmul(jnp.ones((2, 2)), jnp.ones((2, 2)), out_dtype=jnp.dtype("float32"), implementation=RUNG)


def test_training_needs_nothing_else_of_the_library(tiny_layout, tiny_params, tiny_batch):
    x, y = tiny_batch

    def losses(implementation):
        schedule = learning_rate_schedule("constant", 1e-3, steps=3)
        optimizer = adamw(schedule, tiny_layout, weight_decay=0.1, custom_call=custom_calls.serve(implementation))
        step = make_train_step(tiny_layout, optimizer, schedule, dtype=jnp.dtype("float32"), matmul=implementation)
        state = create_state(tiny_params, optimizer, matmul=implementation)
        for _ in range(3):
            state, metrics = step(state, x[None], y[None])
            yield float(metrics.loss)

    # The products differ from XLA's in the order of their sums alone.
    np.testing.assert_allclose(list(losses(RUNG)), list(losses("xla")), rtol=0, atol=2e-5)


def test_calls_from_several_threads_and_under_vmap():
    x, w = random(0, 3, 40, 60), random(1, 50, 60)
    product = jax.jit(jax.vmap(lambda x: linear(x, w, implementation=RUNG)))
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(lambda _: np.asarray(product(x)), range(40)):
            np.testing.assert_allclose(found, np.einsum("bmi,oi->bmo", x, w), rtol=1e-5, atol=1e-4)


def test_an_operand_that_is_too_short_is_an_error():
    b = WeightView(jnp.ones(20), 10, (3, 4))
    with pytest.raises(Exception, match=r"by ctypes: ValueError: cannot reshape array of size 10 into shape \(3,4\)"):
        jax.block_until_ready(matmul(jnp.ones((2, 3)), b, out_dtype=jnp.dtype("float32"), implementation=RUNG))
