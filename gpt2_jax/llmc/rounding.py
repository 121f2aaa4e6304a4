"""llm.c's stochastic rounding of float32 weights to bfloat16: which noise every element gets, to the bit.

The arithmetic is on arrays of uint32 and of NumPy's or jax's alike: the compiled step rounds with it on the device, the
checkpoint on the host (llm.c llmc/cuda_utils.cuh, llmc/adamw.cuh).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from gpt2_jax.buffer.layout import ParameterLayout
from gpt2_jax.families.gpt2 import NUM_TENSORS
from gpt2_jax.llmc.random import XorShift

Words: TypeAlias = Any  # an array of uint32, NumPy's or jax's

FIRST_STATE = 13371337  # of rank 0's stream; rank r begins r higher
_BLOCK = 512  # threads of llm.c's AdamW kernel
_PRIME = np.uint32(198491317)
_LOW_HALF = np.uint32(0xFFFF)
_CHUNK = 1 << 20  # elements rounded at a time on the host: bounds the temporaries; a multiple of the block


def squirrel_noise(position: Words, seed: Words) -> Words:
    """SquirrelNoise5 of 32-bit positions under a 32-bit seed."""
    bits = position * np.uint32(0xD2A80A3F) + seed
    bits = bits ^ (bits >> np.uint32(9))
    bits = bits + np.uint32(0xA884F197)
    bits = bits ^ (bits >> np.uint32(11))
    bits = bits * np.uint32(0x6C736F4B)
    bits = bits ^ (bits >> np.uint32(13))
    bits = bits + np.uint32(0xB79F3ABB)
    bits = bits ^ (bits >> np.uint32(15))
    bits = bits * np.uint32(0x1B56C4F5)
    return bits ^ (bits >> np.uint32(17))


def noise_position(x: Words, y: Words) -> Words:
    """The one position of a place in llm.c's grid."""
    return x + _PRIME * y


def element_position(index: Words, layer: Words) -> Words:
    """The noise position of an element in a layer's part of a tensor: x is its thread, y is its block's first element plus
    the layer."""
    return noise_position(index & np.uint32(_BLOCK - 1), (index & np.uint32(2**32 - _BLOCK)) + layer)


def rounded_bits(bits: Words, noise: Words) -> Words:
    """The float32 bits of the bfloat16 that float32 bits are rounded to: away from zero if the half that is cut off
    exceeds the noise's low half, else towards it. What bfloat16 can represent never moves."""
    rounds_up = ((bits & _LOW_HALF) > (noise & _LOW_HALF)).astype(np.uint32)
    return (bits & ~_LOW_HALF) + (rounds_up << np.uint32(16))


def stochastically_rounded(params: np.ndarray, layout: ParameterLayout, tensor_seeds: np.ndarray) -> np.ndarray:
    """`params` (num_parameters,) float32 rounded to bfloat16's values, still float32. One uint32 seed a tensor."""
    bits = np.ascontiguousarray(params, dtype=np.float32).view(np.uint32)
    rounded = np.empty_like(bits)
    for tensor, seed in zip(layout.tensors, tensor_seeds, strict=True):
        for layer in range(tensor.num_layers):
            for start in range(0, tensor.layer_size, _CHUNK):
                index = np.arange(start, min(start + _CHUNK, tensor.layer_size), dtype=np.uint32)
                span = slice(tensor.layer_offset(layer) + start, tensor.layer_offset(layer) + start + index.size)
                noise = squirrel_noise(element_position(index, np.uint32(layer)), np.uint32(seed))
                rounded[span] = rounded_bits(bits[span], noise)
    return rounded.view(np.float32)


def rounded_to_nearest(params: np.ndarray) -> np.ndarray:
    """`params` float32 rounded to the nearest of bfloat16's values, ties to even, still float32."""
    return params.astype(ml_dtypes.bfloat16).astype(np.float32)


@dataclass
class RoundingStream:
    """The xorshift stream that the seeds of a run's updates come from, as llm.c advances it: one draw for the embedding's
    gradient of every micro-batch, then, if the update is applied, one for each tensor in checkpoint order."""

    state: int = FIRST_STATE
    last_update_state: int = FIRST_STATE  # before the seeds of the last update were drawn
    num_tensors: int = NUM_TENSORS

    def next_seeds(self, num_micro_batches: int) -> np.ndarray:
        """The seeds (16,) uint32 of the next update, if it will be applied. The stream stays where it is."""
        return _tensor_seeds(_advanced(self.state, num_micro_batches), self.num_tensors)

    def last_seeds(self) -> np.ndarray:
        """The seeds (16,) uint32 of the last update that was applied."""
        return _tensor_seeds(self.last_update_state, self.num_tensors)

    def step_done(self, num_micro_batches: int, *, applied: bool) -> None:
        """Advance over one step."""
        self.state = _advanced(self.state, num_micro_batches)
        if applied:
            self.last_update_state = self.state
            self.state = _advanced(self.state, self.num_tensors)


def _advanced(state: int, draws: int) -> int:
    generator = XorShift(state)
    for _ in range(draws):
        generator.draw()
    return generator.state


def _tensor_seeds(state: int, num_tensors: int) -> np.ndarray:
    generator = XorShift(state)
    return np.array([generator.draw() for _ in range(num_tensors)], dtype=np.uint32)
