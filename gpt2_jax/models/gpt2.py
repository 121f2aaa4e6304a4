"""GPT-2's forward pass: pure functions over the views of the flat buffer.

Dimensions, one letter each, in the names of arrays: B batch, T time, C channels, H heads, D head size, V padded
vocabulary, N all parameters, A micro-batches of one step; w_OI is a weight of O outputs and I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from gpt2_jax.buffer.layout import ParameterLayout
from gpt2_jax.buffer.views import Layer, Parameters, views
from gpt2_jax.ops import classifier
from gpt2_jax.ops.attention import causal_attention
from gpt2_jax.ops.linear import linear

LAYERNORM_EPSILON = 1e-5
# For each choice of --recompute the parts of a block that the backward pass computes anew from their inputs. "gelu" and
# "layer_norm" go up to the product behind them, which keeps its input otherwise and is itself not made twice.
RECOMPUTED: dict[str, tuple[str, ...]] = {
    "none": (),
    "gelu": ("gelu",),
    "layernorm": ("gelu", "layer_norm"),
    "block": ("block",),
}


def layer_norm(x_BTC: jax.Array, gain_C: jax.Array, bias_C: jax.Array) -> jax.Array:
    """(x - mean) / sqrt(variance + 1e-5) * gain + bias over the channels, in float32, returned in x's dtype."""
    x = x_BTC.astype(jnp.float32)
    centered = x - jnp.mean(x, axis=-1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + LAYERNORM_EPSILON)
    return (centered * rstd * gain_C[None, None] + bias_C[None, None]).astype(x_BTC.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """GPT-2's tanh approximation of GELU."""
    return 0.5 * x * (1.0 + jnp.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))


def block(residual_BTC: jax.Array, layer: Layer, num_heads: int, *, matmul: str = "xla", recompute: str = "none") -> jax.Array:
    """One pre-LN transformer block: residual + attention, then residual + MLP."""
    B, T, C = residual_BTC.shape
    recomputed = RECOMPUTED[recompute]

    def normed_linear(x_BTC: jax.Array, gain_C: jax.Array, bias_C: jax.Array, w_OI: jax.Array, b_O: jax.Array) -> jax.Array:
        return linear(layer_norm(x_BTC, gain_C, bias_C), w_OI, b_O, implementation=matmul)

    def gelu_linear(hidden: jax.Array, w_OI: jax.Array, b_O: jax.Array) -> jax.Array:
        return linear(gelu(hidden), w_OI, b_O, implementation=matmul)

    after_norm = jax.checkpoint(normed_linear) if "layer_norm" in recomputed else normed_linear
    after_gelu = jax.checkpoint(gelu_linear) if "gelu" in recomputed else gelu_linear
    qkv = after_norm(residual_BTC, layer.ln1w, layer.ln1b, layer.qkvw, layer.qkvb)
    q_BTHD, k_BTHD, v_BTHD = (part.reshape(B, T, num_heads, C // num_heads) for part in jnp.split(qkv, 3, axis=-1))
    attention_BTC = causal_attention(q_BTHD, k_BTHD, v_BTHD).reshape(B, T, C)
    residual_BTC = residual_BTC + linear(attention_BTC, layer.attprojw, layer.attprojb, implementation=matmul)
    hidden = after_norm(residual_BTC, layer.ln2w, layer.ln2b, layer.fcw, layer.fcb)
    return residual_BTC + after_gelu(hidden, layer.fcprojw, layer.fcprojb)


def hidden_states(
    tensors: Parameters,
    x_BT: jax.Array,
    num_heads: int,
    *,
    dtype: jnp.dtype,
    matmul: str = "xla",
    recompute: str = "none",
) -> jax.Array:
    """The hidden states (B, T, C) that the classifier reads, in the compute dtype."""
    T = x_BT.shape[1]
    residual_BTC = (tensors.wte[x_BT] + tensors.wpe[:T][None]).astype(dtype)
    one_block: Callable[[jax.Array, Layer], jax.Array] = partial(block, num_heads=num_heads, matmul=matmul, recompute=recompute)
    if "block" in RECOMPUTED[recompute]:
        one_block = jax.checkpoint(one_block)
    for layer in tensors.layers:
        residual_BTC = one_block(residual_BTC, layer)
    return layer_norm(residual_BTC, tensors.lnfw, tensors.lnfb)


def logits(
    params_N: jax.Array, x_BT: jax.Array, layout: ParameterLayout, *, dtype: jnp.dtype, matmul: str = "xla"
) -> jax.Array:
    """Logits (B, T, V) float32; the columns from layout.config.vocab_size on are padding and hold -inf."""
    tensors = views(params_N, layout)
    h_BTC = hidden_states(tensors, x_BT, layout.config.num_heads, dtype=dtype, matmul=matmul)
    return classifier.logits(h_BTC, tensors.wte, layout.config.vocab_size, matmul=matmul)


def loss(
    params_N: jax.Array,
    x_BT: jax.Array,
    y_BT: jax.Array,
    layout: ParameterLayout,
    *,
    dtype: jnp.dtype,
    matmul: str = "xla",
    recompute: str = "none",
) -> jax.Array:
    """Mean cross-entropy, float32, of the targets y for the inputs x (int32, ids below the true vocabulary).

    `params_N` is the flat float32 buffer; `dtype` (float32 or bfloat16) is what the products and the residual stream
    are computed in. LayerNorm, softmax and the loss are in float32 in either. `recompute` (of RECOMPUTED) is what the
    backward pass computes anew.
    """
    tensors = views(params_N, layout)
    h_BTC = hidden_states(tensors, x_BT, layout.config.num_heads, dtype=dtype, matmul=matmul, recompute=recompute)
    return classifier.mean_loss(h_BTC, tensors.wte, y_BT, layout.config.vocab_size, matmul=matmul)
