"""The activation of the MLP, GPT-2's GELU: a table of implementations, functions of one array."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from gpt2_jax.ops.apple import fused, plugin
from gpt2_jax.ops.cpu import library
from gpt2_jax.ops.matmul import ON_NVIDIA_ONLY
from gpt2_jax.ops.table import Implementation, always

if TYPE_CHECKING:
    from gpt2_jax.compute.plan import Plan

_SCALE, _CUBIC = math.sqrt(2.0 / math.pi), 0.044715


def activation_of(plan: Plan) -> Callable[[jax.Array], jax.Array]:
    return next(row.functions for row in TABLE if row.name == plan.activation.name)


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


def _refuses_one_pass(plan: Plan) -> str | None:
    return ON_NVIDIA_ONLY if "cuda_libraries" in plan.backend.lacks else None


TABLE = (
    Implementation("custom_call", library.refusal, "one exponential an element", functions=_custom_call),
    Implementation("one_pass", _refuses_one_pass, "keeps no float32 copy", functions=_one_pass),
    Implementation("apple", plugin.refuses("gelu"), "one operation, keeps its input only", functions=fused.gelu),
    Implementation("xla", always, "the reference, on every device", functions=gelu),
)
