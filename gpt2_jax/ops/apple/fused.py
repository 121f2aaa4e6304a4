"""LayerNorm, GELU and attention as jax-mps takes them: one operation each, forward and backward, that keeps its inputs.

The functions of jax.nn are taken as attributes when a program is traced, since the plugin replaces them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gpt2_jax.ops.apple.plugin import loaded_operations
from gpt2_jax.ops.threaded import Site, Slots, ThreadedOp, threaded
from gpt2_jax.ops.writer import write_gradient

_FLOAT32 = jnp.dtype(jnp.float32)
_EPSILON = 1e-5  # of GPT-2's LayerNorm
_Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
_LayerNorm = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def attention(twin: _Attention, q_BTHD: jax.Array, k_BTHD: jax.Array, v_BTHD: jax.Array) -> jax.Array:
    """Causal attention of all heads, (B, T, H, D) in the dtype of q. `twin` stands in where the plugin is not loaded."""
    if loaded_operations() is None:
        # In float32, since a program for the plugin holds no product whose type is not its operands'.
        return twin(*(part.astype(_FLOAT32) for part in (q_BTHD, k_BTHD, v_BTHD))).astype(q_BTHD.dtype)
    # With any other argument the plugin would leave it to jax's own form.
    return jax.nn.dot_product_attention(q_BTHD, k_BTHD, v_BTHD, is_causal=True)


def gelu(x: jax.Array) -> jax.Array:
    """The tanh approximation of GELU."""
    return jax.nn.gelu(x, approximate=True)


def layer_norm_op(twin: _LayerNorm) -> ThreadedOp:
    """The threaded op x (..., C) -> (x, its LayerNorm); names: gain, shift. `twin` stands in where the plugin is not loaded.

    MLX computes in the widest dtype of all operands. So x is made float32 for it and the result rounded once, rather than
    gain and shift rounded: their gradients are then sums of float32.
    """

    def norm(x: jax.Array, gain_C: jax.Array, shift_C: jax.Array) -> jax.Array:
        operations = loaded_operations()
        if operations is None:
            return twin(x, gain_C, shift_C)
        y: jax.Array = operations.layer_norm(x.astype(_FLOAT32), gain_C, shift_C, eps=_EPSILON)
        return y.astype(x.dtype)

    def forward(site: Site, x: jax.Array, flat_N: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Any]:
        gain_C, shift_C = (site.view(flat_N, name).array() for name in site.names)
        # Differentiated here: in the backward pass the operation would stand in the program a second time.
        y, pull_back = jax.vjp(norm, x, gain_C, shift_C)
        return (x, y), pull_back

    def backward(
        site: Site, pull_back: Any, flat_N: jax.Array, dy: tuple[jax.Array, jax.Array], gradient_N: jax.Array
    ) -> tuple[jax.Array, jax.Array, Slots]:
        dresidual, dnorm = dy
        dx, dgain_C, dshift_C = pull_back(dnorm)
        slots = {}
        for name, gradient in zip(site.names, (dgain_C, dshift_C), strict=True):
            gradient_N, slots[name] = write_gradient(site, gradient_N, name, gradient)
        return dresidual + dx, gradient_N, slots

    return threaded(forward, backward)
