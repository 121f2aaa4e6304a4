"""One set of tests over every implementation of the matrix products, against float64."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax.buffer.views import WeightView
from gpt2_jax.compute.backend import Backend
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.ops import in_place
from gpt2_jax.ops import linear as matmul
from gpt2_jax.ops.cpu import library as custom_calls
from gpt2_jax.ops.linear import IMPLEMENTATIONS, RUNGS, Choice, choose_implementation, linear
from tests.conftest import available

CPU = Backend("cpu", "cpu", "test")
FLOAT32_ROUNDING, BFLOAT16_ROUNDING = 2.0**-24, 2.0**-9

implementations = pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def left_out(implementation, a_MK, b_KN, *, weight_gradient=False, dtype="float32"):
    """What a rung leaves out of a product where it splits float32, at most; custom_calls/tests/problem.h says why."""
    a_MK, b_KN = np.abs(a_MK).astype(np.float64), np.abs(b_KN).astype(np.float64)
    precision = None
    if implementation != "xla":
        precision = matmul.rung_precision(implementation, jnp.dtype(dtype), weight_gradient=weight_gradient)
    if precision == "S8_S8_S32_X6":  # a row's, and a column's, largest integer is this at least
        a_unit, b_unit = (x.max(axis, keepdims=True, initial=0) / 0x3F8000 for x, axis in ((a_MK, 1), (b_KN, 0)))
        rounded = (a_MK.sum(1, keepdims=True) * b_unit + a_unit * b_KN.sum(0, keepdims=True)) / 2
        return rounded + len(b_KN) * 2.1 * 2.0**22 * a_unit * b_unit
    return (3.1 * 2.0**-16 if precision == "BF16_BF16_F32_X3" else 0.0) * (a_MK @ b_KN)


@implementations
@dtypes
@settings(max_examples=15)  # each is a compilation
@given(m=st.integers(0, 40), n=st.integers(0, 40), k=st.integers(0, 70), transposes=st.tuples(st.booleans(), st.booleans()))
def test_product_is_within_its_rounding_error(implementation, dtype, m, n, k, transposes):
    transpose_a, transpose_b = transposes
    a = random(0, *((k, m) if transpose_a else (m, k))).astype(jnp.dtype(dtype))
    b = random(1, *((n, k) if transpose_b else (k, n))).astype(jnp.dtype(dtype))
    found = matmul.matmul(
        a, b, transpose_a=transpose_a, transpose_b=transpose_b, out_dtype=jnp.dtype("float32"), implementation=implementation
    )
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    wide_a, wide_b = wide_a.T if transpose_a else wide_a, wide_b.T if transpose_b else wide_b
    # Products of bfloat16 are exact in float32; k roundings of the sum either way.
    bound = (k + 1) * FLOAT32_ROUNDING * (np.abs(wide_a) @ np.abs(wide_b))
    bound = bound + left_out(implementation, wide_a, wide_b, dtype=dtype)
    assert found.shape == (m, n)
    assert (np.abs(np.asarray(found) - wide_a @ wide_b) <= bound).all()


@implementations
@dtypes
def test_linear_and_its_derivatives(implementation, dtype):
    x, w, b, dy = random(0, 2, 5, 7), random(1, 11, 7), random(2, 11), random(3, 2, 5, 11)
    x_low = jnp.asarray(x).astype(dtype)
    y, pull_back = jax.vjp(lambda x, w, b: linear(x, w, b, implementation=implementation), x_low, w, b)
    dx, dw, db = pull_back(jnp.asarray(dy).astype(dtype))
    assert (y.dtype, dx.dtype, dw.dtype, db.dtype) == (dtype, dtype, jnp.float32, jnp.float32)
    rounding = FLOAT32_ROUNDING if dtype == "float32" else BFLOAT16_ROUNDING
    x, dy, dx, y = (each.reshape(10, -1) for each in (x, dy, dx, y))
    split = partial(left_out, implementation, dtype=dtype)
    for found, expected, magnitude, terms, more in (
        (y, x @ w.T + b, np.abs(x) @ np.abs(w).T + np.abs(b), 7, split(x, w.T)),
        (dx, dy @ w, np.abs(dy) @ np.abs(w), 11, split(dy, w)),
        (dw, dy.T @ x, np.abs(dy).T @ np.abs(x), 10, split(dy.T, x, weight_gradient=True)),
        (db, dy.sum(0), np.abs(dy).sum(0), 10, 0.0),
    ):
        # Two rounded operands, a rounded result and bias; float32 also rounds each partial sum.
        bound = (4 * rounding + (terms + 1) * FLOAT32_ROUNDING) * magnitude + more
        assert (np.abs(np.asarray(found).astype(np.float32) - expected) <= bound).all()


@implementations
@dtypes
def test_views_into_a_flat_buffer_are_read_and_differentiated_in_place(implementation, dtype):
    O, I, at, bias_at = 5, 6, 11, 47
    x, buffer = jnp.asarray(random(0, 4, I)).astype(dtype), jnp.asarray(random(1, 60))

    def of_views(x, buffer):
        return linear(x, WeightView(buffer, at, (O, I)), WeightView(buffer, bias_at, (O,)), implementation=implementation)

    def of_arrays(x, buffer):
        w, b = buffer[at : at + O * I].reshape(O, I), buffer[bias_at : bias_at + O]
        return linear(x, w, b, implementation=implementation)

    for found, expected in zip(jax.vjp(of_views, x, buffer), jax.vjp(of_arrays, x, buffer), strict=True):
        if callable(found):
            found, expected = (pull_back(jnp.ones((4, O), dtype)) for pull_back in (found, expected))
        jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("implementation", available(RUNGS))
@pytest.mark.parametrize("accumulate", [False, True])
def test_a_product_into_a_buffer_touches_its_place_alone(implementation, accumulate):
    a, b, buffer = random(0, 7, 3), random(1, 7, 4), random(2, 30)
    expected = buffer.copy()
    expected[9:21] = (buffer[9:21] if accumulate else 0) + (a.T @ b).reshape(-1)
    options = {"transpose_a": True, "accumulate": accumulate, "implementation": implementation}
    found, squares = jax.jit(lambda buffer: matmul.matmul_into(WeightView(buffer, 9, (3, 4)), a, b, **options))(buffer)
    # Seven products and the addition.
    atol = 8 * FLOAT32_ROUNDING * 8 * np.abs(a).max() * np.abs(b).max() + np.max(left_out(implementation, a.T, b))
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)
    np.testing.assert_array_equal(found[:9], buffer[:9])
    np.testing.assert_array_equal(found[21:], buffer[21:])
    assert float(squares) == pytest.approx(np.square(found[9:21], dtype=np.float64).sum(), rel=16 * FLOAT32_ROUNDING)
    with pytest.raises(ValueError, match=r"expected a product of shape \(4, 3\), found \(7, 3\) and \(7, 4\)"):
        matmul.matmul_into(WeightView(buffer, 9, (4, 3)), a, b, **options)


@pytest.mark.parametrize("implementation", available(RUNGS))
def test_custom_calls_work_under_vmap_scan_and_without_jit(implementation):
    x, w = random(0, 3, 4, 6), random(1, 5, 6)
    expected = np.einsum("bmi,oi->bmo", x, w)

    def product(x):
        return linear(x, w, implementation=implementation)

    np.testing.assert_allclose(jax.vmap(product)(x), expected, rtol=1e-5, atol=1e-5)
    scanned = jax.lax.scan(lambda carry, x: (carry, product(x)), 0, jnp.asarray(x))[1]
    np.testing.assert_allclose(scanned, expected, rtol=1e-5, atol=1e-5)
    with jax.disable_jit():
        np.testing.assert_allclose(product(x), expected, rtol=1e-5, atol=1e-5)


def test_linear_refuses_a_weight_of_another_width():
    with pytest.raises(ValueError, match=r"expected w of shape \(5, 6\) for x \(2, 6\), found \(5, 7\)"):
        linear(jnp.zeros((2, 6)), jnp.zeros((5, 7)))


def test_what_custom_calls_cannot_compute_is_an_error_with_both_shapes():
    library_call = partial(matmul.matmul, out_dtype=jnp.dtype("float32"), implementation="simd")
    for a, b, message in (
        (jnp.zeros((4, 6)), jnp.zeros((5, 7)), r"f32\[4,6\].*f32\[5,7\]"),
        (jnp.zeros((4, 6), jnp.int32), jnp.zeros((6, 7)), r"dtype f32 or bf16.*s32\[4,6\].*f32\[6,7\]"),
        (jnp.zeros((4, 6)), jnp.zeros((6, 1, 7)), r"f32\[4,6\].*f32\[6,1,7\]"),
    ):
        with pytest.raises(Exception, match=rf"(?is)INVALID_ARGUMENT.*{message}"):
            jax.block_until_ready(library_call(a, b))


@pytest.mark.parametrize(
    ("setting", "expected"),
    [(None, "F32_F32_F32"), ("highest", "F32_F32_F32"), ("float32", "F32_F32_F32"), ("bfloat16", "BF16_BF16_F32")],
)
def test_the_precision_of_float32_is_jaxs_setting(setting, expected):
    with jax.default_matmul_precision(setting):
        assert matmul.precision_of("threaded", jnp.dtype("float32")) == expected
        assert matmul.precision_of("threaded", jnp.dtype("bfloat16")) == "BF16_BF16_F32"


@pytest.mark.parametrize(
    ("setting", "precision", "of_gradients"),
    [
        (None, "S8_S8_S32_X6", "BF16_BF16_F32_X3"),
        ("default", "S8_S8_S32_X6", "BF16_BF16_F32_X3"),
        ("high", "BF16_BF16_F32_X3", "BF16_BF16_F32_X3"),
        ("highest", "BF16_BF16_F32_X6", "BF16_BF16_F32_X6"),
    ],
)
def test_only_a_weights_gradient_is_split_less_by_default(setting, precision, of_gradients, monkeypatch):
    """In what XLA is given, by differentiation and in place, for a rung that multiplies float32 in parts alone."""
    parts = {"available": True, "reason": "", "precisions": ["BF16_BF16_F32_X3", "BF16_BF16_F32_X6", "S8_S8_S32_X6"]}
    monkeypatch.setattr(custom_calls, "implementation", lambda rung: parts)
    layout = GPT2Config(8, 50, 1, 1, 16).layout
    params_N, tokens_BT = jnp.zeros(layout.num_parameters), jnp.zeros((2, 8), jnp.int32)

    def in_place_step(params_N, grads_N):
        options = {"dtype": jnp.dtype("float32"), "matmul": "amx"}
        return in_place.loss_and_gradient(params_N, grads_N, tokens_BT, tokens_BT, layout, **options)

    def loss(w_OI):
        return linear(jnp.ones((3, 16)), w_OI, implementation="amx").sum()

    with jax.default_matmul_precision(setting):
        lowered = [jax.jit(in_place_step).lower(params_N, params_N), jax.jit(jax.value_and_grad(loss)).lower(jnp.ones((5, 16)))]
        said = matmul.precision_of("amx", jnp.dtype("float32"))
    for program in lowered:
        calls = re.findall(r".*@gpt2_jax_(?:matmul|attention).*", program.as_text())
        found = {("transpose_a = 1" in call, re.search(r'precision = "(\w+)"', call)[1]) for call in calls}
        assert found == {(False, precision), (True, of_gradients)}
    gradients = "" if of_gradients == precision else f", weights' gradients {of_gradients}"
    assert said == precision + gradients


def test_a_precision_that_a_rung_lacks_is_refused_with_what_it_has():
    with (
        jax.default_matmul_precision("tensorfloat32"),
        pytest.raises(NotImplementedError, match=r"simd: expected to multiply in tensorfloat32, found that it offers F32"),
    ):
        matmul.matmul(jnp.zeros((2, 3)), jnp.zeros((3, 4)), out_dtype=jnp.dtype("float32"), implementation="simd")


def test_rungs_can_be_switched_off_by_name(monkeypatch):
    monkeypatch.setenv("GPT2_JAX_DISABLE", "threaded, simd")
    choice = choose_implementation("auto", CPU)
    assert choice.name != "threaded"
    assert choice.refusals["simd"] == choice.refusals["threaded"] == "switched off by GPT2_JAX_DISABLE"
    monkeypatch.setenv("GPT2_JAX_DISABLE", "simd,tilez")
    with pytest.raises(Gpt2JaxError, match=r"GPT2_JAX_DISABLE: expected names of naive, .*, found tilez"):
        choose_implementation("auto", CPU)


def test_auto_chooses_something_and_says_why():
    choice = choose_implementation("auto", CPU)
    assert choice.name in IMPLEMENTATIONS
    assert choice.reason


def test_refusals_of_one_reason_are_one_line():
    choice = Choice("xla", "", {"naive": "not built", "amx": "no AMX", "simd": "not built"})
    assert choice.refusals_by_reason() == ["not naive, simd: not built", "not amx: no AMX"]


@pytest.mark.parametrize("name", RUNGS)
def test_rungs_are_refused_on_an_accelerator(name):
    accelerator = Backend("cuda", "cuda", "test", frozenset({"custom_calls"}))
    assert name in choose_implementation("auto", accelerator).refusals
    with pytest.raises(Gpt2JaxError, match="custom calls run on the CPU, not on cuda"):
        choose_implementation(name, accelerator)


def test_a_missing_library_is_a_reason_not_a_crash(monkeypatch):
    def missing():
        raise NotImplementedError("it was not built")

    monkeypatch.setattr(custom_calls, "description", missing)
    assert choose_implementation("auto", CPU).name == "xla"
    with pytest.raises(Gpt2JaxError, match="it was not built"):
        choose_implementation("naive", CPU)


def test_the_library_is_in_the_installed_package():
    """A compile error must not be swallowed by the fallback."""
    assert {row["name"] for row in custom_calls.description()["implementations"]} >= set(RUNGS)


def test_only_what_needs_other_hardware_is_skipped_here():
    assert set(choose_implementation("auto", CPU).refusals) <= {"amx", "accelerate"}


def test_openblas_is_found_without_loading_it(monkeypatch):
    assert custom_calls.openblas_library().is_file()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert custom_calls.openblas_library() is None


@pytest.mark.parametrize(("nproc", "threads"), [("1", 1), ("100000", None), ("many", None), ("0", None), (None, None)])
def test_threads_are_xlas(monkeypatch, nproc, threads):
    monkeypatch.delenv("NPROC", raising=False)
    everything = custom_calls.num_threads()
    if nproc is not None:
        monkeypatch.setenv("NPROC", nproc)
    assert custom_calls.num_threads() == (threads or everything) >= 1


def test_calls_from_several_threads_end_on_a_pool_of_one_thread():
    """A custom call that waited for a task which needs the pool's only thread would never end."""
    program = """
import threading
import gpt2_jax
import jax, jax.numpy as jnp
from gpt2_jax.ops.linear import linear

x, w = jnp.ones((64, 200)), jnp.ones((300, 200))
product = jax.jit(jax.grad(lambda x: linear(x, w, implementation="threaded").sum()))
product(x)

def work():
    for _ in range(20):
        assert float(product(x)[0, 0]) == 300.0

threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print("ended")
"""
    environment = {**os.environ, "NPROC": "1"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "ended", run.stderr
