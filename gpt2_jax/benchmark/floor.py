"""The least time that a training step can take, part by part: held against what was measured.

On an accelerator products take their operations over the card's own sustained rate, attention what cuDNN's takes alone, and
everything else the bytes that must be read and written once over the card's own rate of copying. What a product's kernel does
on the way (biases, GELU forward, the addition to the residual stream) costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpt2_jax.families.gpt2 import GPT2Config

_BF16, _FLOAT32 = 2, 4  # bytes


@dataclass(frozen=True)
class Rates:
    """Of one card, measured."""

    flops: float  # operations a second of large bfloat16 products
    bytes: float  # a second, read and written together, of a copy
    attention_seconds: float  # of one layer's attention for one micro-batch, forward and backward


def floor_seconds(
    config: GPT2Config, batch_size: int, sequence_length: int, micro_batches: int, rates: Rates
) -> dict[str, float]:
    """Seconds of each part of one step in bfloat16 with float32 masters, clipping and AdamW; their sum is the floor."""
    tokens = batch_size * sequence_length
    C, L, vocabulary = config.channels, config.num_layers, config.padded_vocab_size
    matrices = 12 * L * C * C + vocabulary * C
    activation = tokens * C * _BF16  # bytes of one
    num_parameters = config.layout.num_parameters
    of_micro_batch = {
        "products": 6 * tokens * matrices / rates.flops,
        "attention": L * rates.attention_seconds,
        "classifier": 2 * tokens * vocabulary * _BF16 / rates.bytes,  # logits read, their gradient written
        "GELU backward": 3 * L * 4 * activation / rates.bytes,  # its input, the gradient of its output; that of its input
        "norms forward": 2 * (2 * L + 1) * activation / rates.bytes,
        # The normalized input, the output's gradient and the residual stream's; the sum of the last.
        "norms backward": 4 * (2 * L + 1) * activation / rates.bytes,
        "bias gradients": 3 * L * activation / rates.bytes,  # of q, k and v; those of the others lie on other parts' way
        # Rows read in float32 and written in bfloat16; their gradient read, and added to what is there.
        "embedding": tokens * C * (2 * _BF16 + 3 * _FLOAT32) / rates.bytes,
    }
    of_step = {
        # Parameters, gradient, m and v; all but the gradient written. Before it the gradient's norm.
        "AdamW, norm": (7 + 1) * num_parameters * _FLOAT32 / rates.bytes,
        "casts": matrices * (_FLOAT32 + _BF16) / rates.bytes,
        "gradients added up": 2 * (micro_batches - 1) * num_parameters * _FLOAT32 / rates.bytes,
    }
    parts = {name: micro_batches * seconds for name, seconds in of_micro_batch.items()} | of_step
    return {name: seconds for name, seconds in parts.items() if seconds > 0}


def floor_seconds_on_cpu(
    config: GPT2Config, batch_size: int, sequence_length: int, micro_batches: int, flops: float, memory: float
) -> dict[str, float]:
    """The same on a CPU, where `flops` operations a second are possible and `memory` bytes a second, read and written together.

    Attention's two products forward and five backward are at half of their scores, as the mask hides the others. Activations
    stay in the caches, and weights are read and gradients written beside the products: that counts nothing.
    """
    tokens = batch_size * sequence_length
    C, L = config.channels, config.num_layers
    matrices = 12 * L * C * C + config.padded_vocab_size * C
    return {
        "products": micro_batches * 6 * tokens * matrices / flops,
        "attention": micro_batches * L * 7 * tokens * sequence_length * C / flops,
        # Parameters, gradient, m and v; all but the gradient written.
        "AdamW": 7 * config.layout.num_parameters * _FLOAT32 / memory,
    }
