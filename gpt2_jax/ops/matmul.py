"""The matrix products of the linear layers: a table of implementations.

'xla' is the reference, computes on every device and is always there. 'cublas' is for NVIDIA GPUs in bfloat16. The others
are the custom calls of custom_calls/, on the CPU.

A product's arithmetic ("precision") is named as in jax.lax.DotAlgorithmPreset, or as XLA would (S8_S8_S32_X6). bfloat16
operands are multiplied in BF16_BF16_F32. For float32 operands a custom call takes the first that it offers:

| matmul_precision | most products | gradients of weights |
| --- | --- | --- |
| none | F32_F32_F32, S8_S8_S32_X6 | F32_F32_F32, BF16_BF16_F32_X3 |
| 'highest' | F32_F32_F32, BF16_BF16_F32_X6 | the same |
| 'high' | BF16_BF16_F32_X3, F32_F32_F32 | the same |

X3 for all products would leave the tolerance of check-gradients. For the gradients of weights alone, of which no other
product is made, everything stays within half of it. custom_calls/README.md has the errors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gpt2_jax import jax_compat
from gpt2_jax.ops.apple import plugin, products
from gpt2_jax.ops.cpu import library
from gpt2_jax.ops.table import Fallback, Implementation, always
from gpt2_jax.ops.threaded import WeightView, rounded

if TYPE_CHECKING:
    from gpt2_jax.compute.plan import Plan

CUSTOM_CALLS = ("naive", "blocked", "simd", "threaded", "amx", "accelerate", "openblas")
IMPLEMENTATIONS = ("xla", *CUSTOM_CALLS)  # what --matmul names
ON_NVIDIA_ONLY = "on NVIDIA GPUs only"
_FLOAT32 = jnp.dtype(jnp.float32)

_FULL, _SPLIT = ("F32_F32_F32", "BF16_BF16_F32_X6"), ("BF16_BF16_F32_X3", "F32_F32_F32")
# For float32 operands: jax's setting -> the precisions that satisfy it, the best first.
_FLOAT32_PRECISIONS = {
    None: ("F32_F32_F32", "S8_S8_S32_X6"),
    "default": ("F32_F32_F32", "S8_S8_S32_X6"),
    "high": _SPLIT,
    "tensorfloat32": _SPLIT,
    "bfloat16_3x": _SPLIT,
    "highest": _FULL,
    "float32": _FULL,
    "bfloat16_6x": _FULL,
    "bfloat16": ("BF16_BF16_F32",),
    "fastest": ("BF16_BF16_F32",),
}
_WEIGHT_GRADIENT_PRECISIONS = {
    **_FLOAT32_PRECISIONS,
    None: ("F32_F32_F32", "BF16_BF16_F32_X3"),
    "default": ("F32_F32_F32", "BF16_BF16_F32_X3"),
}


class Products(NamedTuple):
    """The three products of a linear layer."""

    # (plan, x_MI, w_OI, b_O or None, dtype of the result): x wᵀ + b
    forward: Callable[[Plan, jax.Array, WeightView, WeightView | None, jnp.dtype], jax.Array]
    # (plan, dy_MO, w_OI): dy w, in dy's dtype
    dx: Callable[[Plan, jax.Array, WeightView], jax.Array]
    # (plan, dy_MO, x_MI): dyᵀ x
    dw: Callable[[Plan, jax.Array, jax.Array], jax.Array]
    any_rank: bool = False  # forward and dx take x (..., I) and dy (..., O) as they are


def products_of(plan: Plan) -> Products:
    return next(row.functions for row in TABLE if row.name == plan.linear.name)


def weight_gradient(plan: Plan, dy_MO: jax.Array, x_MI: jax.Array) -> jax.Array:
    """dyᵀ x (O, I), the gradient of a weight: float32, or the dtype that the implementation gives it."""
    return products_of(plan).dw(plan, dy_MO, x_MI)


def product(plan: Plan, x: jax.Array, w_OI: WeightView, b_O: WeightView | None, out_dtype: jnp.dtype) -> jax.Array:
    """x wᵀ + b: x (..., I) float32 or bfloat16, w (O, I) and b (O,) float32; (..., O) in `out_dtype`."""
    chosen = products_of(plan)
    x_MI = x if chosen.any_rank else x.reshape(-1, x.shape[-1])
    return chosen.forward(plan, x_MI, w_OI, b_O, out_dtype).reshape(*x.shape[:-1], w_OI.shape[0])


def product_dx(plan: Plan, dy: jax.Array, w_OI: WeightView) -> jax.Array:
    """dy w: dy (..., O), w (O, I) float32; (..., I) in dy's dtype."""
    chosen = products_of(plan)
    dy_MO = dy if chosen.any_rank else dy.reshape(-1, dy.shape[-1])
    return chosen.dx(plan, dy_MO, w_OI).reshape(*dy.shape[:-1], w_OI.shape[1])


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
    `precision` is a name; XLA may do without one. Custom calls read b as it is stored, and jax cannot differentiate them.
    NotImplementedError when the product cannot be computed so.
    """
    if implementation == "xla":
        product = _xla_product(a, _as_array(b), transpose_a, transpose_b, precision)
        return (product if bias is None else product + _as_array(bias)[None]).astype(out_dtype)
    attributes = _attributes(a, b, transpose_a, transpose_b, implementation, precision)
    result = jax.ShapeDtypeStruct((int(attributes["m"]), int(attributes["n"])), out_dtype)
    b_buffer, _ = _stored(b)
    if bias is None:
        return jax_compat.ffi_call(library.MATMUL, result, a, b_buffer, **attributes)
    bias_buffer, bias_offset = _stored(bias)
    return jax_compat.ffi_call(
        library.MATMUL_BIAS, result, a, b_buffer, bias_buffer, bias_offset=np.int64(bias_offset), **attributes
    )


def custom_call_into(
    target: WeightView,
    a: jax.Array,
    b: jax.Array,
    *,
    transpose_a: bool = False,
    accumulate: bool = False,
    implementation: str,
    precision: str,
) -> tuple[jax.Array, jax.Array]:
    """Write the product of a and b to the place of `target` in its buffer, or add it there.

    Returns the buffer, and the sum of the squares of the new elements, a float32 scalar. Inside jit the buffer itself is
    written if nothing else needs its old content. Not for XLA.
    """
    library.load()
    attributes = _attributes(a, b, transpose_a, False, implementation, precision)
    if target.shape != (attributes["m"], attributes["n"]):
        raise ValueError(f"custom_call_into: expected a product of shape {target.shape}, found {a.shape} and {b.shape}")
    buffer, squares = jax_compat.ffi_call(
        library.MATMUL_INTO,
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
    a: jax.Array, b: jax.Array | WeightView, transpose_a: bool, transpose_b: bool, name: str, precision: str | None
) -> dict[str, Any]:
    """The attributes of every matmul target; custom_calls/src/custom_calls.h explains them."""
    library.load_products()
    if precision is None:
        raise ValueError(f"{name}: expected a precision, found none")
    m, k = a.shape[::-1] if transpose_a else a.shape
    integers = {
        "m": m,
        "n": b.shape[0] if transpose_b else b.shape[1],
        "k": k,
        "transpose_a": transpose_a,
        "transpose_b": transpose_b,
        "a_offset": 0,
        "b_offset": _stored(b)[1],
        "num_threads": library.num_threads(),
    }
    names = {"implementation": name, "precision": precision}
    return {name: np.int64(value) for name, value in integers.items()} | names


def matmul_into(
    plan: Plan, target: WeightView, dy_MO: jax.Array, x_MI: jax.Array, *, accumulate: bool
) -> tuple[jax.Array, jax.Array]:
    """Write dyᵀ x to the place of `target` in its buffer, or add it there; returns as `custom_call_into`."""
    name, precision = plan.linear.name, plan.weight_gradient_precision
    assert precision is not None  # every custom call has one
    return custom_call_into(
        target, dy_MO, x_MI, transpose_a=True, accumulate=accumulate, implementation=name, precision=precision
    )


def custom_call_precision(name: str, dtype: jnp.dtype, setting: str | None, *, weight_gradient: bool = False) -> str:
    """The precision in which a custom call multiplies operands of this dtype under jax's `setting`.

    NotImplementedError with the reason when it offers none that the setting allows.
    """
    if dtype == jnp.bfloat16:
        return "BF16_BF16_F32"
    wanted = (_WEIGHT_GRADIENT_PRECISIONS if weight_gradient else _FLOAT32_PRECISIONS).get(setting, (setting,))
    offered: list[str] = library.implementation(name)["precisions"]
    for precision in wanted:
        if precision in offered:
            return precision
    raise NotImplementedError(
        f"{name}: expected to multiply in {' or '.join(map(str, wanted))}, found that it offers {', '.join(offered)}"
    )


def _call_forward(plan: Plan, x_MI: jax.Array, w_OI: WeightView, b_O: WeightView | None, dtype: jnp.dtype) -> jax.Array:
    name, precision = plan.linear.name, plan.product_precision
    return matmul(x_MI, w_OI, transpose_b=True, bias=b_O, out_dtype=dtype, implementation=name, precision=precision)


def _call_dx(plan: Plan, dy_MO: jax.Array, w_OI: WeightView) -> jax.Array:
    name, precision = plan.linear.name, plan.product_precision
    return matmul(dy_MO, w_OI, out_dtype=dy_MO.dtype, implementation=name, precision=precision)


def _call_dw(plan: Plan, dy_MO: jax.Array, x_MI: jax.Array) -> jax.Array:
    name, precision = plan.linear.name, plan.weight_gradient_precision
    return matmul(dy_MO, x_MI, transpose_a=True, out_dtype=_FLOAT32, implementation=name, precision=precision)


def _xla_forward(plan: Plan, x_MI: jax.Array, w_OI: WeightView, b_O: WeightView | None, dtype: jnp.dtype) -> jax.Array:
    return matmul(x_MI, w_OI, transpose_b=True, bias=b_O, out_dtype=dtype)


def _xla_dx(plan: Plan, dy_MO: jax.Array, w_OI: WeightView) -> jax.Array:
    return matmul(dy_MO, w_OI, out_dtype=dy_MO.dtype)


def _xla_dw(plan: Plan, dy_MO: jax.Array, x_MI: jax.Array) -> jax.Array:
    return matmul(dy_MO, x_MI, transpose_a=True, out_dtype=_FLOAT32)


# cuBLAS adds the bias itself where products leave it in bfloat16; a float32 result would be written and read once more.


def _cublas_forward(plan: Plan, x_MI: jax.Array, w_OI: WeightView, b_O: WeightView | None, dtype: jnp.dtype) -> jax.Array:
    y_MO = lax.dot_general(x_MI, rounded(w_OI.array(), x_MI.dtype), (((1,), (1,)), ((), ())), preferred_element_type=dtype)
    return y_MO if b_O is None else y_MO + rounded(b_O.array(), dtype)[None]


def _cublas_dx(plan: Plan, dy_MO: jax.Array, w_OI: WeightView) -> jax.Array:
    return lax.dot_general(
        dy_MO, rounded(w_OI.array(), dy_MO.dtype), (((1,), (0,)), ((), ())), preferred_element_type=dy_MO.dtype
    )


def _cublas_dw(plan: Plan, dy_MO: jax.Array, x_MI: jax.Array) -> jax.Array:
    return lax.dot_general(dy_MO, x_MI, (((0,), (0,)), ((), ())), preferred_element_type=x_MI.dtype)


def _refuses_call(name: str, plan: Plan) -> str | None:
    """Why a custom call cannot serve this backend, machine and precision; None when it can."""
    if "custom_calls" in plan.backend.lacks:
        return f"custom calls run on the CPU, not on {plan.backend.name}"
    try:
        row = library.implementation(name)
        if not row["available"]:
            return str(row["reason"])
        for weight_gradient in (False, True):
            custom_call_precision(name, plan.compute_dtype, plan.matmul_precision, weight_gradient=weight_gradient)
    except NotImplementedError as error:
        return str(error) if library.is_built() else Fallback(error)
    return None


def _refuses_cublas(plan: Plan) -> str | None:
    if "cuda_libraries" in plan.backend.lacks:
        return ON_NVIDIA_ONLY
    return None if plan.dtype == "bfloat16" else "in bfloat16 only"


_CALL = Products(_call_forward, _call_dx, _call_dw)
TABLE = (
    # The custom calls that bench-train found faster than XLA's dot, fastest first; then those that are there to be measured.
    *(
        Implementation(name, partial(_refuses_call, name), "measured faster than XLA's dot", functions=_CALL)
        for name in ("amx", "threaded")
    ),
    *(
        Implementation(name, partial(_refuses_call, name), only_by_name=True, functions=_CALL)
        for name in ("simd", "blocked", "naive", "accelerate", "openblas")
    ),
    Implementation(
        "cublas", _refuses_cublas, "adds the bias itself", functions=Products(_cublas_forward, _cublas_dx, _cublas_dw)
    ),
    Implementation("apple", plugin.refuses("bias"), products.WHY, functions=Products(*products.FUNCTIONS, any_rank=True)),
    Implementation("xla", always, "the reference, on every device", functions=Products(_xla_forward, _xla_dx, _xla_dw)),
)
