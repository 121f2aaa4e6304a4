"""Products by ctypes, as where the library of custom calls was not built: on Linux by OpenBLAS, held against NumPy."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt2_jax.compute.step import create_state, make_step
from gpt2_jax.config import OptimizerSettings
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.ops.cpu import ctypes_blas
from gpt2_jax.ops.cpu import library as custom_calls
from gpt2_jax.ops.matmul import matmul
from gpt2_jax.ops.threaded import WeightView
from tests.conftest import plan_of

FLOAT32_ROUNDING = 2.0**-24
FLOAT32 = jnp.dtype("float32")
NAME = custom_calls._name_for_ctypes()
OPTIONS = {"out_dtype": FLOAT32, "implementation": NAME, "precision": "F32_F32_F32"}


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
            implementation=NAME,
            precision="BF16_BF16_F32" if dtype == jnp.bfloat16 else "F32_F32_F32",
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


def test_one_product_is_served_and_all_else_is_left_to_xla():
    plan = plan_of(matmul=NAME)
    assert plan.linear.name == NAME
    assert {choice.name for seam, choice in plan.choices() if seam != "linear"} == {"xla", "concatenate"}
    assert dict(plan.linear.refusals)["threaded"] == "it was not built"
    assert "adamw: not custom_call: it was not built" in plan.fallbacks()
    assert plan_of(matmul="auto").linear.name == "xla"
    with pytest.raises(Gpt2JaxError, match="it was not built"):
        plan_of(matmul="naive")


def test_without_a_blas_nothing_is_served(monkeypatch):
    monkeypatch.setattr(custom_calls, "_name_for_ctypes", lambda: None)
    assert dict(plan_of(matmul="auto").linear.refusals)[NAME] == "it was not built"
    with pytest.raises(NotImplementedError, match="it was not built"):
        matmul(jnp.ones((2, 2)), jnp.ones((2, 2)), out_dtype=FLOAT32, implementation=NAME, precision="F32_F32_F32")


def test_training_needs_nothing_else_of_the_library(tiny_params, tiny_batch):
    x, y = tiny_batch

    def losses(matmul):
        plan = plan_of(matmul=matmul)
        step = make_step(plan, OptimizerSettings(learning_rate=1e-3, schedule="constant", warmup_steps=0), 3)
        state = create_state(plan, tiny_params)
        for _ in range(3):
            state, metrics = step(state, x[None], y[None])
            yield float(metrics.loss)

    # The products differ from XLA's in the order of their sums alone.
    np.testing.assert_allclose(list(losses(NAME)), list(losses("xla")), rtol=0, atol=2e-5)


def test_calls_from_several_threads_and_under_vmap():
    x, w = random(0, 3, 40, 60), random(1, 50, 60)
    product = jax.jit(jax.vmap(lambda x: matmul(x, w, transpose_b=True, **OPTIONS)))
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(lambda _: np.asarray(product(x)), range(40)):
            np.testing.assert_allclose(found, np.einsum("bmi,oi->bmo", x, w), rtol=1e-5, atol=1e-4)


def test_an_operand_that_is_too_short_is_an_error():
    b = WeightView(jnp.ones(20), 10, (3, 4))
    with pytest.raises(Exception, match=r"by ctypes: ValueError: cannot reshape array of size 10 into shape \(3,4\)"):
        jax.block_until_ready(matmul(jnp.ones((2, 3)), b, **OPTIONS))


def test_whatever_stops_a_product_fails_the_call(monkeypatch):
    """A result that was not computed must not be taken for one: Ctrl-C may come while Python is in the handler."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ctypes_blas, "_multiply", interrupted)
    with pytest.raises(Exception, match="by ctypes: KeyboardInterrupt"):
        jax.block_until_ready(matmul(jnp.ones((2, 3)), jnp.ones((3, 4)), **OPTIONS))


def test_a_size_beyond_32_bits_is_refused():
    """cblas_sgemm takes C ints, and ctypes cuts off what is beyond them: 2^31 + 1 rows would become a negative number."""
    called = []
    sizes = {"m": 2**31 + 1, "n": 0, "k": 0, "a_offset": 0, "b_offset": 0, "transpose_a": 0, "transpose_b": 0}
    nothing = np.empty(0, np.float32)
    with pytest.raises(ValueError, match="sizes of 32 bits, this product has 2147483649"):
        ctypes_blas._multiply(
            lambda *sizes: called.append(sizes),
            threading.Lock(),
            [nothing, nothing],
            nothing,
            sizes | {"precision": "F32_F32_F32"},
        )
    assert not called
