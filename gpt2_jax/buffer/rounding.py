"""llm.c's stochastic rounding of the updated parameters, on the device: training without float32 master weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from gpt2_jax.buffer.layout import ParameterLayout
from gpt2_jax.llmc.rounding import element_position, rounded_bits, squirrel_noise


def stochastically_rounded(params_N: jax.Array, layout: ParameterLayout, tensor_seeds: jax.Array) -> jax.Array:
    """`params_N` (num_parameters,) float32 rounded to bfloat16's values, still float32: the same bits as
    llmc.rounding.stochastically_rounded. `tensor_seeds` (16,) uint32."""
    pieces = []
    for number, tensor in enumerate(layout.tensors):
        shape = (tensor.num_layers, tensor.layer_size)
        bits = lax.bitcast_convert_type(lax.slice(params_N, (tensor.offset,), (tensor.stop,)), jnp.uint32).reshape(shape)
        position = element_position(lax.broadcasted_iota(jnp.uint32, shape, 1), lax.broadcasted_iota(jnp.uint32, shape, 0))
        pieces.append(rounded_bits(bits, squirrel_noise(position, tensor_seeds[number])).reshape(-1))
    return lax.bitcast_convert_type(lax.concatenate(pieces, 0), jnp.float32)
