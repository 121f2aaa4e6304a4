"""One set of tests over every implementation of the matrix products, against float64."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.ops import matmul
from gpt2_jax.ops.cpu import library as custom_calls
from gpt2_jax.ops.matmul import CUSTOM_CALLS, IMPLEMENTATIONS
from gpt2_jax.ops.threaded import WeightView
from tests.conftest import available, plan_of

FLOAT32_ROUNDING = 2.0**-24
FLOAT32 = jnp.dtype("float32")

implementations = pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def precision_of(implementation, dtype, setting=None, *, weight_gradient=False):
    if implementation not in CUSTOM_CALLS:
        return None
    return matmul.custom_call_precision(implementation, jnp.dtype(dtype), setting, weight_gradient=weight_gradient)


def left_out(implementation, a_MK, b_KN, *, weight_gradient=False, dtype="float32"):
    """What a custom call leaves out of a product where it splits float32, at most; custom_calls/tests/problem.h says why."""
    a_MK, b_KN = np.abs(a_MK).astype(np.float64), np.abs(b_KN).astype(np.float64)
    precision = precision_of(implementation, dtype, weight_gradient=weight_gradient)
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
    options = {"implementation": implementation, "precision": precision_of(implementation, dtype)}
    found = matmul.matmul(a, b, transpose_a=transpose_a, transpose_b=transpose_b, out_dtype=FLOAT32, **options)
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    wide_a, wide_b = wide_a.T if transpose_a else wide_a, wide_b.T if transpose_b else wide_b
    # Products of bfloat16 are exact in float32; k roundings of the sum either way.
    bound = (k + 1) * FLOAT32_ROUNDING * (np.abs(wide_a) @ np.abs(wide_b))
    bound = bound + left_out(implementation, wide_a, wide_b, dtype=dtype)
    assert found.shape == (m, n)
    assert (np.abs(np.asarray(found) - wide_a @ wide_b) <= bound).all()


@implementations
@dtypes
@pytest.mark.parametrize("m", [1, 8, 9])
def test_few_rows(implementation, dtype, m):
    """The products of generated tokens: weights of several work items, read in place in their own dtype."""
    n, k, at = 700, 131, 13
    x, w = (random(seed, *shape).astype(jnp.dtype(dtype)) for seed, shape in ((0, (m, k)), (1, (n, k))))
    buffer = jnp.concatenate([jnp.zeros(at, dtype), jnp.asarray(w).reshape(-1)])
    bias = jnp.asarray(random(2, n))
    options = {"implementation": implementation, "precision": precision_of(implementation, dtype), "transpose_b": True}
    found = matmul.matmul(jnp.asarray(x), WeightView(buffer, at, (n, k)), bias=bias, out_dtype=FLOAT32, **options)
    wide_x, wide_w = x.astype(np.float64), w.astype(np.float64)
    bound = (k + 2) * FLOAT32_ROUNDING * (np.abs(wide_x) @ np.abs(wide_w).T + np.abs(bias)[None])
    bound = bound + left_out(implementation, wide_x, wide_w.T, dtype=dtype)
    assert (np.abs(np.asarray(found) - (wide_x @ wide_w.T + np.asarray(bias)[None])) <= bound).all()


@implementations
@dtypes
@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16"])
def test_views_into_a_flat_buffer_are_read_in_place(implementation, dtype, out_dtype):
    O, I, at, bias_at = 5, 6, 11, 47
    x, buffer = jnp.asarray(random(0, 4, I)).astype(dtype), jnp.asarray(random(1, 60))
    options = {"implementation": implementation, "precision": precision_of(implementation, dtype), "transpose_b": True}

    def product(w, b):
        return matmul.matmul(x, w, bias=b, out_dtype=jnp.dtype(out_dtype), **options)

    found = product(WeightView(buffer, at, (O, I)), WeightView(buffer, bias_at, (O,)))
    assert (found.shape, found.dtype) == ((4, O), out_dtype)
    w, b = buffer[at : at + O * I].reshape(O, I), buffer[bias_at : bias_at + O]
    np.testing.assert_array_equal(found, product(w, b))
    without = np.asarray(product(w, None)).astype(np.float64)
    bound = (2 * 2.0**-8 if out_dtype == "bfloat16" else 2 * FLOAT32_ROUNDING) * (np.abs(without) + np.abs(b))
    assert (np.abs(np.asarray(found).astype(np.float64) - without - np.asarray(b)) <= bound).all()


@pytest.mark.parametrize("implementation", available(CUSTOM_CALLS))
@pytest.mark.parametrize("accumulate", [False, True])
def test_a_product_into_a_buffer_touches_its_place_alone(implementation, accumulate):
    a, b, buffer = random(0, 7, 3), random(1, 7, 4), random(2, 30)
    expected = buffer.copy()
    expected[9:21] = (buffer[9:21] if accumulate else 0) + (a.T @ b).reshape(-1)
    precision = precision_of(implementation, "float32", weight_gradient=True)
    options = {"transpose_a": True, "accumulate": accumulate, "implementation": implementation, "precision": precision}
    found, squares = jax.jit(lambda buffer: matmul.custom_call_into(WeightView(buffer, 9, (3, 4)), a, b, **options))(buffer)
    # Seven products and the addition.
    atol = 8 * FLOAT32_ROUNDING * 8 * np.abs(a).max() * np.abs(b).max() + np.max(
        left_out(implementation, a.T, b, weight_gradient=True)
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)
    np.testing.assert_array_equal(found[:9], buffer[:9])
    np.testing.assert_array_equal(found[21:], buffer[21:])
    assert float(squares) == pytest.approx(np.square(found[9:21], dtype=np.float64).sum(), rel=16 * FLOAT32_ROUNDING)
    with pytest.raises(ValueError, match=r"expected a product of shape \(4, 3\), found \(7, 3\) and \(7, 4\)"):
        matmul.custom_call_into(WeightView(buffer, 9, (4, 3)), a, b, **options)


@pytest.mark.parametrize("implementation", available(CUSTOM_CALLS))
def test_custom_calls_work_under_vmap_scan_and_without_jit(implementation):
    x, w = random(0, 3, 4, 6), random(1, 5, 6)
    expected = np.einsum("bmi,oi->bmo", x, w)

    options = {"implementation": implementation, "precision": precision_of(implementation, "float32")}

    def product(x):
        return matmul.matmul(x, w, transpose_b=True, out_dtype=FLOAT32, **options)

    np.testing.assert_allclose(jax.vmap(product)(x), expected, rtol=1e-5, atol=1e-5)
    scanned = jax.lax.scan(lambda carry, x: (carry, product(x)), 0, jnp.asarray(x))[1]
    np.testing.assert_allclose(scanned, expected, rtol=1e-5, atol=1e-5)
    with jax.disable_jit():
        np.testing.assert_allclose(product(x[0]), expected[0], rtol=1e-5, atol=1e-5)


def test_what_custom_calls_cannot_compute_is_an_error_with_both_shapes():
    library_call = partial(matmul.matmul, out_dtype=FLOAT32, implementation="simd", precision="F32_F32_F32")
    for a, b, message in (
        (jnp.zeros((4, 6)), jnp.zeros((5, 7)), r"f32\[4,6\].*f32\[5,7\]"),
        (jnp.zeros((4, 6), jnp.int32), jnp.zeros((6, 7)), r"dtype f32 or bf16.*s32\[4,6\].*f32\[6,7\]"),
        (jnp.zeros((4, 6)), jnp.zeros((6, 1, 7)), r"f32\[4,6\].*f32\[6,1,7\]"),
    ):
        with pytest.raises(Exception, match=rf"(?is)INVALID_ARGUMENT.*{message}"):
            jax.block_until_ready(library_call(a, b))


def test_a_custom_call_is_told_its_precision():
    with pytest.raises(ValueError, match="simd: expected a precision, found none"):
        matmul.matmul(jnp.zeros((2, 3)), jnp.zeros((3, 4)), out_dtype=FLOAT32, implementation="simd")


def test_xla_multiplies_in_the_precision_that_it_is_told():
    a, b = random(0, 3, 5), random(1, 5, 4)
    low_a, low_b = (each.astype(jnp.bfloat16).astype(np.float32) for each in (a, b))
    found = matmul.matmul(jnp.asarray(a), jnp.asarray(b), out_dtype=FLOAT32, precision="BF16_BF16_F32")
    np.testing.assert_allclose(found, low_a @ low_b, rtol=0, atol=6 * FLOAT32_ROUNDING * 5 * np.abs(a).max() * np.abs(b).max())
    with pytest.raises(NotImplementedError, match="xla: expected precision F32_F32_F32 or BF16_BF16_F32, found S8"):
        matmul.matmul(jnp.asarray(a), jnp.asarray(b), out_dtype=FLOAT32, precision="S8_S8_S32_X6")


@pytest.mark.parametrize(
    ("setting", "expected"),
    [(None, "F32_F32_F32"), ("highest", "F32_F32_F32"), ("float32", "F32_F32_F32"), ("bfloat16", "BF16_BF16_F32")],
)
def test_the_precision_of_float32_is_jaxs_setting(setting, expected):
    with jax.default_matmul_precision(setting):
        assert plan_of(matmul="threaded").describe_precision() == expected
        assert plan_of(matmul="threaded", dtype="bfloat16").describe_precision() == "BF16_BF16_F32"


def test_the_runs_setting_of_the_precision_comes_before_jaxs():
    with jax.default_matmul_precision("bfloat16"):
        assert plan_of(matmul="threaded", matmul_precision="highest").product_precision == "F32_F32_F32"


def test_a_precision_that_a_custom_call_lacks_is_refused_with_what_it_has():
    message = r"simd: expected to multiply in magic, found that it offers F32_F32_F32"
    with pytest.raises(NotImplementedError, match=message):
        matmul.custom_call_precision("simd", FLOAT32, "magic")
    precisions = {"available": True, "reason": "", "precisions": ["BF16_BF16_F32_X3"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(custom_calls, "implementation", lambda name: precisions)
        with pytest.raises(Gpt2JaxError, match=r"--matmul simd: .*F32_F32_F32 or BF16_BF16_F32_X6, found that it offers"):
            plan_of(matmul="simd", matmul_precision="highest")


def test_the_library_is_in_the_installed_package():
    """A compile error must not be swallowed by the fallback."""
    assert {row["name"] for row in custom_calls.description()["implementations"]} >= set(CUSTOM_CALLS)


def test_only_what_needs_other_hardware_is_skipped_here():
    assert {name for name, _ in plan_of(matmul="auto").linear.refusals} <= {"amx", "accelerate", "cublas", "apple"}


def test_openblas_is_found_without_loading_it(monkeypatch):
    assert custom_calls.openblas_library().is_file()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert custom_calls.openblas_library() is None


@pytest.mark.parametrize(("nproc", "threads"), [("1", 1), ("100000", None), ("many", None), ("0", None), (None, None)])
def test_threads_are_xlas(monkeypatch, nproc, threads):
    monkeypatch.delenv("NPROC", raising=False)
    monkeypatch.setattr(custom_calls, "cpu_quota", lambda: None)
    everything = custom_calls.num_threads()
    if nproc is not None:
        monkeypatch.setenv("NPROC", nproc)
    assert custom_calls.num_threads() == (threads or everything) >= 1


@implementations
def test_four_threads_with_two_dtypes_at_once_get_what_one_gets(implementation):
    """Products at the same time must share no panels, sums or copies, whatever their types."""
    x, w = random(0, 70, 130), random(1, 130, 90)

    def compiled(dtype):
        precision = precision_of(implementation, dtype)
        options = {"out_dtype": jnp.dtype(dtype), "implementation": implementation, "precision": precision}
        product = jax.jit(partial(matmul.matmul, **options))
        return lambda: np.asarray(product(jnp.asarray(x, dtype), jnp.asarray(w, dtype)))

    dtypes = ["float32", "bfloat16"] * 20
    # Compiled before the threads begin: they would all read and write one entry of the cache of compiled programs.
    products = {dtype: compiled(dtype) for dtype in dtypes[:2]}
    alone = {dtype: product() for dtype, product in products.items()}
    with ThreadPoolExecutor(4) as threads:
        for dtype, found in zip(dtypes, threads.map(lambda dtype: products[dtype](), dtypes), strict=True):
            if implementation in ("openblas", "accelerate"):  # which do not promise the same bits
                np.testing.assert_allclose(found.astype(np.float32), alone[dtype].astype(np.float32), rtol=2.0**-7, atol=1e-4)
            else:
                assert found.tobytes() == alone[dtype].tobytes(), dtype


def test_calls_from_several_threads_end_on_a_pool_of_one_thread():
    """A custom call that waited for a task which needs the pool's only thread would never end."""
    program = """
import threading
import gpt2_jax
import jax, jax.numpy as jnp
from gpt2_jax.ops.matmul import matmul

x, w = jnp.ones((64, 300)), jnp.ones((300, 200))
options = {"out_dtype": jnp.dtype("float32"), "implementation": "threaded", "precision": "F32_F32_F32"}
product = jax.jit(lambda x: matmul(x, w, **options))
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
