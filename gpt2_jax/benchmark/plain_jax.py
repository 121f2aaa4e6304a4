"""A GPT-2 training step as one writes it in JAX without this project: a pytree of parameters, optax, XLA's own dot.

The peer that bench_train.py calls jax_plain. It computes what this project computes, but for the padding of the
vocabulary, which is part of the softmax here.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gpt2_jax.buffer.adamw import BETA1, BETA2, EPSILON, GRADIENT_CLIP
from gpt2_jax.buffer.layout import ParameterLayout

Parameters = dict[str, Any]
Attention = Literal["xla", "cudnn"] | None


def parameters_from_buffer(params_N: np.ndarray, layout: ParameterLayout) -> Parameters:
    """The flat buffer's tensors as a pytree: those of the layers stacked, their weights (layers, inputs, outputs)."""
    tensors = layout.views(params_N)
    layers = {name: jnp.array(np.moveaxis(tensor, 1, -1)) for name, tensor in tensors.items() if layout[name].stacked}
    return {"layers": layers} | {name: jnp.array(tensor) for name, tensor in tensors.items() if not layout[name].stacked}


def make_optimizer(learning_rate: float, weight_decay: float) -> optax.GradientTransformation:
    """AdamW with clipping; matrices and embeddings decay."""

    def decays(params: Parameters) -> Parameters:
        # Of the stacked tensors the first dimension is the layer.
        stacked = {name: tensor.ndim > 2 for name, tensor in params["layers"].items()}
        return {name: stacked if name == "layers" else tensor.ndim >= 2 for name, tensor in params.items()}

    adamw = optax.adamw(learning_rate, b1=BETA1, b2=BETA2, eps=EPSILON, weight_decay=weight_decay, mask=decays)
    return optax.chain(optax.clip_by_global_norm(GRADIENT_CLIP), adamw)


def make_train_step(
    optimizer: optax.GradientTransformation,
    *,
    num_heads: int,
    dtype: jnp.dtype,
    attention: Attention = None,
    unroll: bool = False,
) -> jax.stages.Wrapped:
    """The compiled step: (params, optimizer state, x, y) -> (params, optimizer state, loss), the first two donated.

    x and y are (B, T) int32; `attention` is an implementation of jax.nn.dot_product_attention. The layers are scanned,
    or with `unroll`, which GPUs are faster with, written out.
    """

    def loss_of(params: Parameters, x_BT: jax.Array, y_BT: jax.Array) -> jax.Array:
        def body(h_BTC: jax.Array, layer: Parameters) -> tuple[jax.Array, None]:
            return _block(h_BTC, layer, num_heads, attention), None

        h_BTC = (params["wte"][x_BT] + params["wpe"][: x_BT.shape[1]]).astype(dtype)
        h_BTC, _ = jax.lax.scan(body, h_BTC, params["layers"], unroll=unroll)
        h_BTC = _layer_norm(h_BTC, params["lnfw"], params["lnfb"])
        logits_BTV = jnp.einsum("btc,vc->btv", h_BTC, params["wte"].astype(dtype), preferred_element_type=jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, y_BT).mean()

    def step(params: Parameters, state: Any, x_BT: jax.Array, y_BT: jax.Array) -> tuple[Parameters, Any, jax.Array]:
        loss, grads = jax.value_and_grad(loss_of)(params, x_BT, y_BT)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def _block(h_BTC: jax.Array, layer: Parameters, num_heads: int, attention: Attention) -> jax.Array:
    B, T, C = h_BTC.shape
    qkv = _linear(_layer_norm(h_BTC, layer["ln1w"], layer["ln1b"]), layer["qkvw"], layer["qkvb"])
    q, k, v = (part.reshape(B, T, num_heads, C // num_heads) for part in jnp.split(qkv, 3, axis=-1))
    a_BTC = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=attention).reshape(B, T, C)
    h_BTC = h_BTC + _linear(a_BTC, layer["attprojw"], layer["attprojb"])
    hidden = _linear(_layer_norm(h_BTC, layer["ln2w"], layer["ln2b"]), layer["fcw"], layer["fcb"])
    return h_BTC + _linear(jax.nn.gelu(hidden, approximate=True), layer["fcprojw"], layer["fcprojb"])


def _linear(x: jax.Array, w_IO: jax.Array, b_O: jax.Array) -> jax.Array:
    return x @ w_IO.astype(x.dtype) + b_O.astype(x.dtype)


def _layer_norm(x: jax.Array, gain_C: jax.Array, bias_C: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    mean, variance = wide.mean(axis=-1, keepdims=True), wide.var(axis=-1, keepdims=True)
    return ((wide - mean) * jax.lax.rsqrt(variance + 1e-5) * gain_C + bias_C).astype(x.dtype)
