"""The JAX views over the flat parameter buffer, and their derivative.

`views` cuts every layer's tensors straight out of the buffer. Its derivative is written by hand: differentiating
plain slices would pad each gradient to the whole buffer's length and add them up, where one concatenation in file
order gives the same gradient buffer.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
from jax import lax

from gpt2_jax.layout import ParameterLayout


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
        tensor = layout[name]
        start = tensor.layer_offset(layer)
        size = 1
        for dimension in tensor.layer_shape:
            size *= dimension
        return lax.slice(params, (start,), (start + size,)).reshape(tensor.layer_shape)

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
