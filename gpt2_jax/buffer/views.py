"""The JAX views over the flat parameter buffer, and their derivative.

`views` cuts every layer's tensors straight out of the buffer. Its derivative is written by hand: differentiating
plain slices would pad each gradient to the whole buffer's length and add them up, where one concatenation in file
order gives the same gradient buffer.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
from flax import struct
from jax import lax

from gpt2_jax.buffer.layout import ParameterLayout


@struct.dataclass
class WeightView:
    """A tensor by its place in a flat buffer: what a custom call needs to read or write it there, without a copy."""

    buffer: jax.Array  # (N,)
    offset: int = struct.field(pytree_node=False)  # elements
    shape: tuple[int, ...] = struct.field(pytree_node=False)

    def array(self) -> jax.Array:
        """The tensor as an array of its own: outside a fusion of XLA's, a copy."""
        return lax.slice(self.buffer, (self.offset,), (self.offset + math.prod(self.shape),)).reshape(self.shape)


def weight_view(buffer_N: jax.Array, layout: ParameterLayout, name: str, layer: int = 0) -> WeightView:
    """One tensor of a buffer, or one layer's part of a stacked one."""
    return WeightView(buffer_N, layout[name].layer_offset(layer), layout[name].shape)


class Layer(NamedTuple):
    """One transformer block's tensors, float32; O is the output dimension, I the input dimension."""

    ln1w: jax.Array  # (C,)
    ln1b: jax.Array  # (C,)
    qkvw: jax.Array  # (3C, C)
    qkvb: jax.Array  # (3C,)
    attprojw: jax.Array  # (C, C)
    attprojb: jax.Array  # (C,)
    ln2w: jax.Array  # (C,)
    ln2b: jax.Array  # (C,)
    fcw: jax.Array  # (4C, C)
    fcb: jax.Array  # (4C,)
    fcprojw: jax.Array  # (C, 4C)
    fcprojb: jax.Array  # (C,)


class Parameters(NamedTuple):
    """The 16 tensors of the flat buffer, the stacked ones split by layer."""

    wte: jax.Array  # (V, C), V the padded vocabulary
    wpe: jax.Array  # (T, C), T the longest sequence
    layers: tuple[Layer, ...]
    lnfw: jax.Array  # (C,)
    lnfb: jax.Array  # (C,)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def views(params: jax.Array, layout: ParameterLayout) -> Parameters:
    """The views over `params` (num_parameters,) float32. The derivative is one buffer of the same shape."""

    def view(name: str, layer: int = 0) -> jax.Array:
        return weight_view(params, layout, name, layer).array()

    return Parameters(
        wte=view("wte"),
        wpe=view("wpe"),
        layers=tuple(Layer(**{name: view(name, layer) for name in Layer._fields}) for layer in range(layout.config.num_layers)),
        lnfw=view("lnfw"),
        lnfb=view("lnfb"),
    )


def _views_forward(params: jax.Array, layout: ParameterLayout) -> tuple[Parameters, None]:
    return views(params, layout), None


def _views_backward(layout: ParameterLayout, _: None, grads: Parameters) -> tuple[jax.Array]:
    pieces: list[jax.Array] = []
    for tensor in layout.tensors:
        parts = [getattr(layer, tensor.name) for layer in grads.layers] if tensor.stacked else [getattr(grads, tensor.name)]
        pieces.extend(part.reshape(-1) for part in parts)
    # lax's, not jnp's, which in some versions of jax joins 16 pieces at a time.
    return (lax.concatenate(pieces, 0),)


views.defvjp(_views_forward, _views_backward)
