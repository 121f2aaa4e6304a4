"""The activation of the MLP, GPT-2's GELU, alone and joined with the linear layer behind it.

The two are one seam, since some devices multiply by the activation's derivative in the linear layer's own product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gpt2_jax.ops.apple import fused, plugin
from gpt2_jax.ops.cpu import library
from gpt2_jax.ops.cuda import cublas
from gpt2_jax.ops.linear import linear, linear_forward, linear_gradients
from gpt2_jax.ops.matmul import ON_NVIDIA_ONLY
from gpt2_jax.ops.summed import Summed, is_summed, mapped
from gpt2_jax.ops.table import Implementation, always
from gpt2_jax.ops.threaded import Site, Slots, ThreadedOp, rounded, threaded

if TYPE_CHECKING:
    from gpt2_jax.compute.plan import Plan

_SCALE, _CUBIC = math.sqrt(2.0 / math.pi), 0.044715


class Activation(NamedTuple):
    function: Callable[[jax.Array], jax.Array]
    linear: ThreadedOp  # names: weight (O, I), bias (O,); x (..., I) -> the linear layer of its activation (..., O)


def activation_of(plan: Plan) -> Activation:
    return next(row.functions for row in TABLE if row.name == plan.activation.name)


def before_linear(function: Callable[[jax.Array], jax.Array]) -> Activation:
    """A function of one array, whose linear layer is an op of its own."""

    def op(site: Site, x: Any, flat_N: jax.Array, slots: Slots) -> tuple[Any, jax.Array]:
        return linear(site, mapped(site.plan, function, x) if is_summed(x) else function(x), flat_N, slots)

    return Activation(function, op)


def gelu(x: jax.Array) -> jax.Array:
    """GPT-2's tanh approximation of GELU."""
    return 0.5 * x * (1.0 + jnp.tanh(_SCALE * (x + _CUBIC * x * x * x)))


@jax.custom_vjp
def _custom_call(x: jax.Array) -> jax.Array:
    return library.call(library.GELU, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


_custom_call.defvjp(
    lambda x: (_custom_call(x), x),
    lambda x, dy: (library.call(library.GELU_BACKWARD, jax.ShapeDtypeStruct(x.shape, x.dtype), x, dy),),
)


@jax.custom_vjp
def _one_pass(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def _one_pass_backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    wide = x.astype(jnp.float32)
    t = jnp.tanh(_SCALE * (wide + _CUBIC * wide * wide * wide))
    slope = 0.5 * (1.0 + t) + 0.5 * wide * (1.0 - t * t) * _SCALE * (1.0 + 3 * _CUBIC * wide * wide)
    # Without the barrier XLA keeps a float32 copy of dx for the bias's gradient.
    return (lax.optimization_barrier((dy.astype(jnp.float32) * slope).astype(x.dtype)),)


_one_pass.defvjp(lambda x: (_one_pass(x), x), _one_pass_backward)


# By cuBLASLt, whose product of the linear layer's backward multiplies by the derivative before it writes.


def _cublas_forward(site: Site, x: jax.Array, flat_N: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    hidden = jax.nn.gelu(x, approximate=True)
    return linear_forward(site, hidden, flat_N)[0], (x, hidden)


def _cublas_backward(
    site: Site, saved: tuple[jax.Array, jax.Array], flat_N: jax.Array, dy: Summed, gradient_N: jax.Array
) -> tuple[jax.Array, jax.Array, Slots]:
    x, hidden = saved
    gradient_N, slots = linear_gradients(site, hidden, dy, gradient_N)
    w_OI = rounded(site.view(flat_N, site.names[0]).array(), x.dtype)
    dx_MI = cublas.gelu_backward(site.plan, dy.value.reshape(-1, w_OI.shape[0]), w_OI, x.reshape(-1, x.shape[-1]))
    return dx_MI.reshape(x.shape), gradient_N, slots


def _refuses_cublas(plan: Plan) -> str | None:
    if reason := cublas.refusal(plan):
        return reason
    C = plan.config.channels
    return None if C % 8 == 0 else f"cuBLASLt wants a multiple of 8 channels, not {C}"


def _refuses_one_pass(plan: Plan) -> str | None:
    return ON_NVIDIA_ONLY if "cuda_libraries" in plan.backend.lacks else None


TABLE = (
    Implementation("custom_call", library.refusal, "one exponential an element", functions=before_linear(_custom_call)),
    Implementation(
        "cublas",
        _refuses_cublas,
        "the product multiplies by GELU's derivative itself",
        functions=Activation(_one_pass, threaded(_cublas_forward, _cublas_backward, knows_sums=True)),
    ),
    Implementation("one_pass", _refuses_one_pass, "keeps no float32 copy", functions=before_linear(_one_pass)),
    Implementation("apple", plugin.refuses("gelu"), "one operation, keeps its input only", functions=before_linear(fused.gelu)),
    Implementation("xla", always, "the reference, on every device", functions=before_linear(gelu)),
)
