"""The matrix products of the linear layers: a table of implementations behind one differentiable function.

'xla' is the reference, computes on every device and is always there. The others are the rungs of custom_calls/, on
the CPU. One that cannot serve a product raises NotImplementedError with the reason.

The arithmetic of a product is named as in jax.lax.DotAlgorithmPreset, or as XLA would (S8_S8_S32_X6). bfloat16 operands
are multiplied in BF16_BF16_F32. For float32 operands jax's own setting (jax.default_matmul_precision) is asked: without
one a rung takes its first of F32_F32_F32 and S8_S8_S32_X6 (custom_calls/README.md has its error); with 'highest' of
F32_F32_F32 and BF16_BF16_F32_X6; for 'high' of BF16_BF16_F32_X3 and F32_F32_F32. X3 is not the default, since with it
d12's gradients leave the tolerance of scripts/check_gradients.py. Only a weight's gradient, which no other product is
made of, takes X3 without a setting: all are within half of that tolerance.
"""

from __future__ import annotations

import dataclasses
import os
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gpt2_jax import jax_compat
from gpt2_jax.buffer.views import WeightView
from gpt2_jax.compute.backend import Backend
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.ops.cpu import library as custom_calls

RUNGS = ("naive", "blocked", "simd", "threaded", "amx", "accelerate", "openblas")
IMPLEMENTATIONS = ("xla", *RUNGS)

# For float32 operands: jax's setting -> the precisions that satisfy it, the best first.
_FLOAT32_PRECISIONS = {
    None: ("F32_F32_F32", "S8_S8_S32_X6"),
    "default": ("F32_F32_F32", "S8_S8_S32_X6"),
    "high": ("BF16_BF16_F32_X3", "F32_F32_F32"),
    "highest": ("F32_F32_F32", "BF16_BF16_F32_X6"),
    "float32": ("F32_F32_F32", "BF16_BF16_F32_X6"),
    "bfloat16": ("BF16_BF16_F32",),
}
_WEIGHT_GRADIENT_PRECISIONS = {
    **_FLOAT32_PRECISIONS,
    None: ("F32_F32_F32", "BF16_BF16_F32_X3"),
    "default": ("F32_F32_F32", "BF16_BF16_F32_X3"),
}
# The rungs that scripts/bench_train.py found faster than XLA's dot, fastest first.
_FASTER_THAN_XLA = ("amx", "threaded")


class Choice(NamedTuple):
    """The implementation of a run, why it was taken, and why others could not be."""

    name: str
    reason: str
    refusals: dict[str, str]

    def refusals_by_reason(self) -> list[str]:
        """'not a, b: reason' for people to read, a line a reason."""
        return [
            f"not {', '.join(name for name, why in self.refusals.items() if why == reason)}: {reason}"
            for reason in dict.fromkeys(self.refusals.values())
        ]


def choose_implementation(requested: str, backend: Backend) -> Choice:
    """Resolve 'auto' or a name for a run on `backend`.

    Gpt2JaxError with the reason for a name that cannot serve it, or for an unknown name in GPT2_JAX_DISABLE.
    """
    disabled = _disabled()
    refusals = {
        name: reason
        for name in RUNGS
        if (reason := "switched off by GPT2_JAX_DISABLE" if name in disabled else _refusal(name, backend))
    }
    if requested == "auto":
        for name in _FASTER_THAN_XLA:
            if name not in refusals:
                return Choice(name, "measured faster than XLA's dot", refusals)
        return Choice("xla", "the reference, on every device", refusals)
    if requested in refusals:
        raise Gpt2JaxError(f"--matmul {requested}: expected to use it, found: {refusals[requested]}", "--matmul auto")
    reason = f"asked for with --matmul {requested}"
    if requested != "xla" and not custom_calls.is_built():
        reason += ", and called from Python: without the library of custom calls all else is left to XLA"
    return Choice(requested, reason, refusals)


def precision_of(implementation: str, dtype: jnp.dtype) -> str:
    """The precision in which operands of this dtype are multiplied under jax's present setting, for people to read."""
    if implementation == "xla":
        return f"XLA's {_default_matmul_precision() or 'default'}"
    precision = rung_precision(implementation, dtype)
    gradients = rung_precision(implementation, dtype, weight_gradient=True)
    return precision if gradients == precision else f"{precision}, weights' gradients {gradients}"


def linear(
    x: jax.Array,
    w_OI: jax.Array | WeightView,
    b_O: jax.Array | WeightView | None = None,
    *,
    out_dtype: jnp.dtype | None = None,
    implementation: str = "xla",
) -> jax.Array:
    """x wᵀ + b: x (..., I) float32 or bfloat16, w (O, I) and b (O,) float32; (..., O) in `out_dtype`, by default x's.

    w and b are arrays, or WeightViews, which are read where they lie in the flat buffer. Products are made in x's dtype
    and summed in float32, the bias is added, and the sum is rounded once. Derivatives: dx in x's dtype, dw and db in
    float32.
    """
    I = x.shape[-1]
    O = w_OI.shape[0]
    if w_OI.shape != (O, I):
        raise ValueError(f"linear: expected w of shape ({O}, {I}) for x {x.shape}, found {w_OI.shape}")
    if b_O is not None and b_O.shape != (O,):
        raise ValueError(f"linear: expected b of shape ({O},) for w {w_OI.shape}, found {b_O.shape}")
    y_MO = _linear(x.reshape(-1, I), w_OI, b_O, jnp.dtype(out_dtype or x.dtype), implementation)
    return y_MO.reshape(*x.shape[:-1], O)


_Operands = tuple[jax.Array, jax.Array | WeightView, jax.Array | WeightView | None]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _linear(
    x_MI: jax.Array,
    w_OI: jax.Array | WeightView,
    b_O: jax.Array | WeightView | None,
    out_dtype: jnp.dtype,
    implementation: str,
) -> jax.Array:
    return matmul(x_MI, w_OI, transpose_b=True, bias=b_O, out_dtype=out_dtype, implementation=implementation)


def _linear_forward(
    x_MI: jax.Array,
    w_OI: jax.Array | WeightView,
    b_O: jax.Array | WeightView | None,
    out_dtype: jnp.dtype,
    implementation: str,
) -> tuple[jax.Array, _Operands]:
    return _linear(x_MI, w_OI, b_O, out_dtype, implementation), (x_MI, w_OI, b_O)


def _linear_backward(out_dtype: jnp.dtype, implementation: str, operands: _Operands, dy_MO: jax.Array) -> _Operands:
    x_MI, w_OI, b_O = operands
    db_O = None if b_O is None else _cotangent(b_O, jnp.sum(dy_MO.astype(jnp.float32), axis=0))
    dy_MO = dy_MO.astype(x_MI.dtype)
    dx_MI = matmul(dy_MO, w_OI, out_dtype=x_MI.dtype, implementation=implementation)
    dw_OI = matmul(
        dy_MO,
        x_MI,
        transpose_a=True,
        out_dtype=jnp.dtype(jnp.float32),
        implementation=implementation,
        precision=None if implementation == "xla" else rung_precision(implementation, x_MI.dtype, weight_gradient=True),
    )
    return dx_MI, _cotangent(w_OI, dw_OI), db_O


_linear.defvjp(_linear_forward, _linear_backward)


def _cotangent(operand: jax.Array | WeightView, gradient: jax.Array) -> Any:
    """A view's is a whole buffer, zeros but for its own part: right, but slow. in_place.py does without."""
    if not isinstance(operand, WeightView):
        return gradient
    zeros_N = jnp.zeros_like(operand.buffer)
    buffer_N = lax.dynamic_update_slice(zeros_N, gradient.reshape(-1).astype(zeros_N.dtype), (operand.offset,))
    return dataclasses.replace(operand, buffer=buffer_N)


def matmul(
    a: jax.Array,
    b: jax.Array | WeightView,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    bias: jax.Array | WeightView | None = None,
    out_dtype: jnp.dtype,
    implementation: str = "xla",
    precision: str | None = None,
) -> jax.Array:
    """The product (M, N) of two matrices, summed in float32, plus `bias` (N,), rounded once to `out_dtype`.

    a is (M, K), or (K, M) with `transpose_a`; b is (K, N), or (N, K) with `transpose_b`; each float32 or bfloat16.
    Without a `precision`, by name, a's dtype decides; the rungs read b as it is stored. Not differentiable itself for
    the custom calls; `linear` is. NotImplementedError when it cannot be served.
    """
    if implementation == "xla":
        product = _xla_product(a, _as_array(b), transpose_a, transpose_b, precision)
        return (product if bias is None else product + _as_array(bias)[None]).astype(out_dtype)
    attributes = _attributes(a, b, transpose_a, transpose_b, implementation, precision)
    result = jax.ShapeDtypeStruct((int(attributes["m"]), int(attributes["n"])), out_dtype)
    b_buffer, _ = _stored(b)
    if bias is None:
        return jax_compat.ffi_call(custom_calls.MATMUL, result, a, b_buffer, **attributes)
    bias_buffer, bias_offset = _stored(bias)
    return jax_compat.ffi_call(
        custom_calls.MATMUL_BIAS, result, a, b_buffer, bias_buffer, bias_offset=np.int64(bias_offset), **attributes
    )


def matmul_into(
    target: WeightView,
    a: jax.Array,
    b: jax.Array,
    *,
    transpose_a: bool = False,
    accumulate: bool = False,
    implementation: str,
    precision: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`target`'s buffer with the product of a and b written to the view's place, or added to what is there; and the sum
    of the squares of what is there then, a float32 scalar.

    `precision` as matmul's. For the custom calls alone. Inside jit they write into the buffer itself if nothing else needs
    its old content.
    """
    custom_calls.load()
    attributes = _attributes(a, b, transpose_a, False, implementation, precision)
    if target.shape != (attributes["m"], attributes["n"]):
        raise ValueError(f"matmul_into: expected a product of shape {target.shape}, found {a.shape} and {b.shape}")
    buffer, squares = jax_compat.ffi_call(
        custom_calls.MATMUL_INTO,
        (jax.ShapeDtypeStruct(target.buffer.shape, target.buffer.dtype), jax.ShapeDtypeStruct((), jnp.float32)),
        a,
        b,
        target.buffer,
        aliases={2: 0},
        out_offset=np.int64(target.offset),
        accumulate=np.int64(accumulate),
        **attributes,
    )
    return buffer, squares


def _xla_product(a: jax.Array, b: jax.Array, transpose_a: bool, transpose_b: bool, precision: str | None) -> jax.Array:
    if precision == "BF16_BF16_F32":
        a = a.astype(jnp.bfloat16)
    elif precision not in (None, "F32_F32_F32"):
        raise NotImplementedError(f"xla: expected precision F32_F32_F32 or BF16_BF16_F32, found {precision}")
    contracting = ((0 if transpose_a else 1,), (1 if transpose_b else 0,))
    return lax.dot_general(a, b.astype(a.dtype), (contracting, ((), ())), preferred_element_type=jnp.float32)


def _as_array(operand: jax.Array | WeightView) -> jax.Array:
    return operand.array() if isinstance(operand, WeightView) else operand


def _stored(operand: jax.Array | WeightView) -> tuple[jax.Array, int]:
    """The buffer that holds an operand, and the element that it begins at."""
    return (operand.buffer, operand.offset) if isinstance(operand, WeightView) else (operand, 0)


def _attributes(
    a: jax.Array, b: jax.Array | WeightView, transpose_a: bool, transpose_b: bool, rung: str, precision: str | None
) -> dict[str, Any]:
    """What every matmul target is told; custom_calls/src/custom_calls.h explains it."""
    custom_calls.load_products()
    m, k = a.shape[::-1] if transpose_a else a.shape
    integers = {
        "m": m,
        "n": b.shape[0] if transpose_b else b.shape[1],
        "k": k,
        "transpose_a": transpose_a,
        "transpose_b": transpose_b,
        "a_offset": 0,
        "b_offset": _stored(b)[1],
        "num_threads": custom_calls.num_threads(),
    }
    names = {"implementation": rung, "precision": precision or rung_precision(rung, a.dtype)}
    return {name: np.int64(value) for name, value in integers.items()} | names


def _default_matmul_precision() -> str | None:
    return jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]


def rung_precision(rung: str, dtype: jnp.dtype, *, weight_gradient: bool = False) -> str:
    """What a rung multiplies operands of this dtype in under jax's present setting; of a weight's gradient or all else.

    NotImplementedError with the reason where it offers nothing that would do.
    """
    if dtype == jnp.bfloat16:
        return "BF16_BF16_F32"
    setting = _default_matmul_precision()
    wanted = (_WEIGHT_GRADIENT_PRECISIONS if weight_gradient else _FLOAT32_PRECISIONS).get(setting, (setting,))
    offered: list[str] = custom_calls.implementation(rung)["precisions"]
    for precision in wanted:
        if precision in offered:
            return precision
    raise NotImplementedError(
        f"{rung}: expected to multiply in {' or '.join(map(str, wanted))}, found that it offers {', '.join(offered)}"
    )


def _refusal(rung: str, backend: Backend) -> str | None:
    """Why a rung cannot serve this backend and machine; None when it can."""
    if "custom_calls" in backend.lacks:
        return f"custom calls run on the CPU, not on {backend.name}"
    try:
        row = custom_calls.implementation(rung)
    except NotImplementedError as error:
        return str(error)
    return None if row["available"] else row["reason"]


def _disabled() -> set[str]:
    """The rungs that GPT2_JAX_DISABLE names."""
    names = {name.strip() for name in os.environ.get("GPT2_JAX_DISABLE", "").split(",")} - {""}
    if unknown := sorted(names - set(RUNGS)):
        raise Gpt2JaxError(f"GPT2_JAX_DISABLE: expected names of {', '.join(RUNGS)}, found {', '.join(unknown)}")
    return names
