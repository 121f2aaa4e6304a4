"""GPT-2 once more, in plain jax.numpy and by automatic differentiation: every way to compute is compared with this one.

It shares nothing with gpt2_jax.ops. Products are of operands in `dtype` and summed in float32; LayerNorm, softmax and the
loss are in float32.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from gpt2_jax.families.gpt2 import GPT2Config

Tensors = dict[str, jax.Array]


def tensors_of(params_N: jax.Array, config: GPT2Config) -> Tensors:
    """All tensors by name, stacked over layers as in the file."""
    return {t.name: params_N[t.offset : t.offset + t.size].reshape(t.full_shape) for t in config.layout.tensors}


def _linear(x: jax.Array, w_OI: jax.Array, b_O: jax.Array) -> jax.Array:
    product = jnp.einsum("bti,oi->bto", x, w_OI.astype(x.dtype), preferred_element_type=jnp.float32)
    return (product + b_O[None, None]).astype(x.dtype)


def _layer_norm(x: jax.Array, gain_C: jax.Array, shift_C: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    centered = wide - wide.mean(-1, keepdims=True)
    deviation = jnp.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5)
    return (centered / deviation * gain_C[None, None] + shift_C[None, None]).astype(x.dtype)


def _attention(qkv_BTC: jax.Array, num_heads: int) -> jax.Array:
    B, T, C = qkv_BTC.shape
    q, k, v = jnp.moveaxis(qkv_BTC.reshape(B, T, 3, num_heads, C // 3 // num_heads), (2, 3), (0, 2))  # each (B, H, T, D)
    scores = jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=jnp.float32) / q.shape[-1] ** 0.5
    later = jnp.arange(T)[:, None] < jnp.arange(T)[None]
    weights = jax.nn.softmax(jnp.where(later[None, None], -1e30, scores), axis=-1)
    return jnp.moveaxis(weights.astype(v.dtype) @ v, 1, 2).reshape(B, T, C // 3)


def _gelu(x: jax.Array) -> jax.Array:
    return x / 2 * (1 + jnp.tanh((2 / jnp.pi) ** 0.5 * (x + 0.044715 * x**3)))


def logits(params_N: jax.Array, x_BT: jax.Array, config: GPT2Config, dtype: str) -> jax.Array:
    """Logits (B, T, vocab_size) float32."""
    w = tensors_of(params_N, config)
    x = (w["wte"][x_BT] + w["wpe"][: x_BT.shape[1]][None]).astype(dtype)
    for layer in range(config.num_layers):
        h = {name: tensor[layer] for name, tensor in w.items() if config.layout[name].stacked}
        qkv = _linear(_layer_norm(x, h["ln1w"], h["ln1b"]), h["qkvw"], h["qkvb"])
        x = x + _linear(_attention(qkv, config.num_heads), h["attprojw"], h["attprojb"])
        hidden = _linear(_layer_norm(x, h["ln2w"], h["ln2b"]), h["fcw"], h["fcb"])
        x = x + _linear(_gelu(hidden), h["fcprojw"], h["fcprojb"])
    x = _layer_norm(x, w["lnfw"], w["lnfb"])
    return jnp.einsum("btc,vc->btv", x, w["wte"][: config.vocab_size].astype(x.dtype), preferred_element_type=jnp.float32)


def token_losses(params_N: jax.Array, x_BT: jax.Array, y_BT: jax.Array, config: GPT2Config, dtype: str) -> jax.Array:
    """Cross-entropy of every target, (B, T) float32."""
    log_probabilities = jax.nn.log_softmax(logits(params_N, x_BT, config, dtype), axis=-1)
    return -jnp.take_along_axis(log_probabilities, y_BT[..., None], axis=-1)[..., 0]


def loss(params_N: jax.Array, x_BT: jax.Array, y_BT: jax.Array, config: GPT2Config, dtype: str) -> jax.Array:
    """The mean loss, float32."""
    return token_losses(params_N, x_BT, y_BT, config, dtype).mean()


@cache
def _compiled(name: str, config: GPT2Config, dtype: str, shape: tuple[int, ...]) -> jax.stages.Compiled:
    functions = {
        "loss_and_gradient": lambda p, x, y: jax.value_and_grad(loss)(p, x, y, config, dtype),
        "token_losses": lambda p, x, y: token_losses(p, x, y, config, dtype),
        "logits": lambda p, x, y: logits(p, x, config, dtype),
    }
    params, tokens = jax.ShapeDtypeStruct((config.layout.num_parameters,), jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32)
    with jax.default_matmul_precision("highest"):
        return compiled_quickly(jax.jit(functions[name]).lower(params, tokens, tokens))


def expected(name: str, config: GPT2Config, dtype: str, params_N: Any, x_BT: Any, y_BT: Any) -> Any:
    """What one of this file's functions gives: 'loss_and_gradient', 'token_losses' or 'logits'."""
    return _compiled(name, config, dtype, x_BT.shape)(jnp.asarray(params_N), jnp.asarray(x_BT), jnp.asarray(y_BT))


def compiled_quickly(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiled without LLVM's optimizations: half the time, and the same numbers but for roundings."""
    return lowered.compile(compiler_options={"xla_backend_optimization_level": 0})
