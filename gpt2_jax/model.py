"""GPT-2's forward pass: pure functions over the views of the flat buffer.

Dimensions, one letter each, in the names of arrays: B batch, T time, C channels, H heads, D head size, V padded
vocabulary, N all parameters, A micro-batches of one step; w_OI is a weight of O outputs and I inputs.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from gpt2_jax import classifier
from gpt2_jax.attention import causal_attention
from gpt2_jax.layout import ParameterLayout
from gpt2_jax.matmul import linear
from gpt2_jax.views import Layer, Parameters, views

LAYERNORM_EPSILON = 1e-5


def layer_norm(x_BTC: jax.Array, gain_C: jax.Array, bias_C: jax.Array) -> jax.Array:
    """(x - mean) / sqrt(variance + 1e-5) * gain + bias over the channels, in float32, returned in x's dtype."""
    x = x_BTC.astype(jnp.float32)
    centered = x - jnp.mean(x, axis=-1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + LAYERNORM_EPSILON)
    return (centered * rstd * gain_C[None, None] + bias_C[None, None]).astype(x_BTC.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """GPT-2's tanh approximation of GELU."""
    return 0.5 * x * (1.0 + jnp.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))


def block(residual_BTC: jax.Array, layer: Layer, num_heads: int, *, matmul: str = "xla") -> jax.Array:
    """One pre-LN transformer block: residual + attention, then residual + MLP."""
    B, T, C = residual_BTC.shape
    h_BTC = layer_norm(residual_BTC, layer.ln1w, layer.ln1b)
    qkv = linear(h_BTC, layer.qkvw, layer.qkvb, implementation=matmul)
    q_BTHD, k_BTHD, v_BTHD = (part.reshape(B, T, num_heads, C // num_heads) for part in jnp.split(qkv, 3, axis=-1))
    attention_BTC = causal_attention(q_BTHD, k_BTHD, v_BTHD).reshape(B, T, C)
    residual_BTC = residual_BTC + linear(attention_BTC, layer.attprojw, layer.attprojb, implementation=matmul)
    h_BTC = layer_norm(residual_BTC, layer.ln2w, layer.ln2b)
    hidden = gelu(linear(h_BTC, layer.fcw, layer.fcb, implementation=matmul))
    return residual_BTC + linear(hidden, layer.fcprojw, layer.fcprojb, implementation=matmul)


def hidden_states(tensors: Parameters, x_BT: jax.Array, num_heads: int, *, dtype: jnp.dtype, matmul: str = "xla") -> jax.Array:
    """The hidden states (B, T, C) that the classifier reads, in the compute dtype."""
    T = x_BT.shape[1]
    residual_BTC = (tensors.wte[x_BT] + tensors.wpe[:T][None]).astype(dtype)
    for layer in tensors.layers:
        residual_BTC = block(residual_BTC, layer, num_heads, matmul=matmul)
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
) -> jax.Array:
    """Mean cross-entropy, float32, of the targets y for the inputs x (int32, ids below the true vocabulary).

    `params_N` is the flat float32 buffer; `dtype` (float32 or bfloat16) is what the products and the residual stream
    are computed in. LayerNorm, softmax and the loss are in float32 in either.
    """
    tensors = views(params_N, layout)
    h_BTC = hidden_states(tensors, x_BT, layout.config.num_heads, dtype=dtype, matmul=matmul)
    return classifier.mean_loss(h_BTC, tensors.wte, y_BT, layout.config.vocab_size, matmul=matmul)
