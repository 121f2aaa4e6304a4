"""GPT-2's forward pass over the flat buffer.

Dimensions, one letter each, in the names of arrays: B batch, T time, C channels, H heads, D head size, V padded
vocabulary, N all parameters, A micro-batches of one step; w_OI is a weight of O outputs and I inputs.
"""

from __future__ import annotations

import jax

from gpt2_jax.buffer.weights import Weights
from gpt2_jax.ops.summed import Summed

CLASSIFIER = "wte"  # the token table is the classifier's weight too


def hidden_states(w: Weights, x_BT: jax.Array) -> jax.Array:
    """The classifier's input (B, T, C) in the dtype of products, for tokens x (int32, below the true vocabulary)."""
    residual_BTC = w.dropout("embedding", w.embedding("wte", "wpe", x_BT))
    residual_BTC = w.layers(block, residual_BTC)
    return w.norm("lnf", residual_BTC)


def block(w: Weights, residual_BTC: Summed) -> Summed:
    """One pre-LN transformer block: residual + attention, then residual + MLP."""
    residual_BTC, *qkv = w.norm_linear("ln1", "qkv", residual_BTC, parts=w.attention_parts)
    residual_BTC = residual_BTC + w.dropout("attproj", w.linear("attproj", w.attention(*qkv)))
    residual_BTC, hidden = w.norm_linear("ln2", "fc", residual_BTC)
    return residual_BTC + w.dropout("fcproj", w.activation_linear("fcproj", hidden))
