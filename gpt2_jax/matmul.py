"""The matrix products of the linear layers: a table of implementations behind one differentiable function.

'xla' is the reference, computes on every device and is always there. The others are the rungs of custom_calls/, on
the CPU. An implementation that cannot serve a product raises NotImplementedError with the reason.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gpt2_jax import custom_calls, jax_compat
from gpt2_jax.backend import Backend
from gpt2_jax.errors import Gpt2JaxError

RUNGS = ("naive", "blocked", "simd", "threaded")
IMPLEMENTATIONS = ("xla", *RUNGS)


class Choice(NamedTuple):
    """The implementation of a run, why it was taken, and why others could not be."""

    name: str
    reason: str
    refusals: dict[str, str]


def choose_implementation(requested: str, backend: Backend) -> Choice:
    """Resolve 'auto' or a name for a run on `backend`; Gpt2JaxError with the reason for a name that cannot serve it."""
    refusals = {name: reason for name in RUNGS if (reason := _refusal(name, backend))}
    if requested == "auto":
        return Choice("xla", "the reference, on every device; the others are taken by name", refusals)
    if requested in refusals:
        raise Gpt2JaxError(f"--matmul {requested}: expected to use it, found: {refusals[requested]}", "--matmul auto")
    return Choice(requested, f"asked for with --matmul {requested}", refusals)


def linear(
    x: jax.Array,
    w_OI: jax.Array,
    b_O: jax.Array | None = None,
    *,
    out_dtype: jnp.dtype | None = None,
    implementation: str = "xla",
) -> jax.Array:
    """x wᵀ + b: x (..., I) float32 or bfloat16, w (O, I) and b (O,) float32; (..., O) in `out_dtype`, by default x's.

    Products are made in x's dtype and summed in float32; w is rounded to that dtype for them. Derivatives: dx in x's
    dtype, dw and db in float32.
    """
    I = x.shape[-1]
    O = w_OI.shape[0]
    if w_OI.shape != (O, I):
        raise ValueError(f"linear: expected w of shape ({O}, {I}) for x {x.shape}, found {w_OI.shape}")
    y_MO = _linear(x.reshape(-1, I), w_OI, jnp.dtype(out_dtype or x.dtype), implementation)
    if b_O is not None:
        y_MO = (y_MO.astype(jnp.float32) + b_O[None]).astype(y_MO.dtype)
    return y_MO.reshape(*x.shape[:-1], O)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _linear(x_MI: jax.Array, w_OI: jax.Array, out_dtype: jnp.dtype, implementation: str) -> jax.Array:
    return matmul(x_MI, w_OI.astype(x_MI.dtype), transpose_b=True, out_dtype=out_dtype, implementation=implementation)


def _linear_forward(
    x_MI: jax.Array, w_OI: jax.Array, out_dtype: jnp.dtype, implementation: str
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _linear(x_MI, w_OI, out_dtype, implementation), (x_MI, w_OI)


def _linear_backward(
    out_dtype: jnp.dtype, implementation: str, saved: tuple[jax.Array, jax.Array], dy_MO: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x_MI, w_OI = saved
    dy_MO = dy_MO.astype(x_MI.dtype)
    dx_MI = matmul(dy_MO, w_OI.astype(x_MI.dtype), out_dtype=x_MI.dtype, implementation=implementation)
    dw_OI = matmul(dy_MO, x_MI, transpose_a=True, out_dtype=jnp.dtype(jnp.float32), implementation=implementation)
    return dx_MI, dw_OI


_linear.defvjp(_linear_forward, _linear_backward)


def matmul(
    a: jax.Array,
    b: jax.Array,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    out_dtype: jnp.dtype,
    implementation: str = "xla",
) -> jax.Array:
    """The product (M, N) of two matrices of one dtype, float32 or bfloat16, summed in float32.

    a is (M, K), or (K, M) with `transpose_a`; b is (K, N), or (N, K) with `transpose_b`. Not differentiable itself for
    the custom calls; `linear` is.
    """
    if implementation == "xla":
        contracting = ((0 if transpose_a else 1,), (1 if transpose_b else 0,))
        product = lax.dot_general(a, b, (contracting, ((), ())), preferred_element_type=jnp.float32)
        return product.astype(out_dtype)
    custom_calls.load()
    m, k = a.shape[::-1] if transpose_a else a.shape
    n = b.shape[0] if transpose_b else b.shape[1]
    integers = {"m": m, "n": n, "k": k, "transpose_a": transpose_a, "transpose_b": transpose_b, "a_offset": 0, "b_offset": 0}
    return jax_compat.ffi_call(
        custom_calls.MATMUL_TARGET,
        jax.ShapeDtypeStruct((m, n), out_dtype),
        a,
        b,
        **{name: np.int64(value) for name, value in integers.items()},
        num_threads=np.int64(custom_calls.num_threads()),
        implementation=implementation,
        precision="BF16_BF16_F32" if a.dtype == jnp.bfloat16 else "F32_F32_F32",
    )


def _refusal(rung: str, backend: Backend) -> str | None:
    """Why a rung cannot serve this backend and machine; None when it can."""
    if "custom_calls" in backend.lacks:
        return f"custom calls run on the CPU, not on {backend.name}"
    try:
        rungs = {row["name"]: row for row in custom_calls.description()["implementations"]}
    except NotImplementedError as error:
        return str(error)
    return None if rungs[rung]["available"] else rungs[rung]["reason"]
