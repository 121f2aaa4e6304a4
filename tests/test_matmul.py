"""One set of tests over every implementation of the matrix products, against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax import custom_calls, matmul
from gpt2_jax.backend import Backend
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.matmul import IMPLEMENTATIONS, RUNGS, choose_implementation, linear

CPU = Backend("cpu", "cpu", "test")
FLOAT32_ROUNDING, BFLOAT16_ROUNDING = 2.0**-24, 2.0**-9

implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


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
    for found, expected, magnitude, terms in (
        (y, x @ w.T + b, np.abs(x) @ np.abs(w).T + np.abs(b), 7),
        (dx, dy @ w, np.abs(dy) @ np.abs(w), 11),
        (dw, np.einsum("bto,bti->oi", dy, x), np.einsum("bto,bti->oi", np.abs(dy), np.abs(x)), 10),
        (db, dy.sum((0, 1)), np.abs(dy).sum((0, 1)), 10),
    ):
        # Two rounded operands, a rounded result and bias; float32 also rounds each partial sum.
        bound = (4 * rounding + (terms + 1) * FLOAT32_ROUNDING) * magnitude
        assert (np.abs(np.asarray(found).astype(np.float32) - expected) <= bound).all()


@pytest.mark.parametrize("implementation", RUNGS)
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


def test_auto_chooses_something_and_says_why():
    choice = choose_implementation("auto", CPU)
    assert choice.name in IMPLEMENTATIONS
    assert choice.reason


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


@pytest.mark.parametrize(("nproc", "threads"), [("1", 1), ("100000", None), ("many", None), ("0", None), (None, None)])
def test_threads_are_xlas(monkeypatch, nproc, threads):
    monkeypatch.delenv("NPROC", raising=False)
    everything = custom_calls.num_threads()
    if nproc is not None:
        monkeypatch.setenv("NPROC", nproc)
    assert custom_calls.num_threads() == (threads or everything) >= 1
