"""What a training step needs of memory: estimated before it starts, counted in the compiled step, and measured after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpt2_jax.buffer.layout import ParameterLayout
from gpt2_jax.machine import gigabytes, process_peak

if TYPE_CHECKING:
    import jax

# So many rows of the logits the step in place makes at once: at 8192 tokens all of them would be 1.6 GB, and their
# gradient as much again.
CLASSIFIER_ROWS = 1024
_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a training step, by what they hold."""

    parameters: int
    gradients: int
    moments: int
    activations: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.moments + self.activations

    def __str__(self) -> str:
        parts = ", ".join(
            f"{getattr(self, part) / 1e9:.2f} {part}" for part in ("parameters", "gradients", "moments", "activations")
        )
        return f"{gigabytes(self.total)} ({parts})"


def estimate(
    layout: ParameterLayout,
    batch_size: int,
    sequence_length: int,
    dtype: str,
    *,
    gradient_buffers: int = 1,
    donates: bool = True,
    recompute: str = "none",
    in_place: bool = False,
) -> MemoryEstimate:
    """What a step over micro-batches of B x T tokens has to keep; activations in `dtype`, s bytes an element.

    Parameters, gradients and each of the two moments are 4 N bytes; where the gradients of several micro-batches are
    not added up in place, two buffers of them are needed. A backend that cannot reuse the memory of the state it is given
    (`donates`) holds the old parameters and moments and the new ones. Activations are
    B T (L s (16 C + H T) + 2 s C + (4 + s) V) bytes: a layer's 16 C + H T elements a token are what its backward reads,
    both residuals, both LayerNorms' outputs, q, k, v, the softmax of every head, the attention's output, and the MLP's
    4 C before and 4 C after GELU (Korthikanti et al. 2022, equation 1, without dropout); 2 C are the final LayerNorm's
    input and output, V the logits in float32 and their gradient. What `recompute` does not keep is there for one layer at
    a time. The step `in_place` keeps one float32 of every row of the softmax, has logits of CLASSIFIER_ROWS
    tokens at a time, and in float32 their gradient in the same memory.
    """
    config, s = layout.config, _BYTES[dtype]
    B, T, L, C, H = batch_size, sequence_length, config.num_layers, config.channels, config.num_heads
    buffer = 4 * layout.num_parameters
    states = 1 if donates else 2
    softmax = 4 * H if in_place else s * H * T
    attention_and_mlp = 16 * s * C + softmax  # of one layer, bytes a token
    a_layer = {
        "none": attention_and_mlp,
        "gelu": attention_and_mlp - 4 * s * C,
        "layernorm": attention_and_mlp - 6 * s * C,
        "block": s * C,
    }[recompute]
    logits = B * T * (4 + s) * config.padded_vocab_size
    if in_place:
        rows = min(B * T, CLASSIFIER_ROWS)
        logits = rows * (4 if dtype == "float32" else 4 + s) * config.padded_vocab_size
    return MemoryEstimate(
        parameters=buffer * states,
        gradients=buffer * gradient_buffers,
        moments=2 * buffer * states,
        activations=B * T * (L * a_layer + attention_and_mlp - a_layer + 2 * s * C) + logits,
    )


def compiled_bytes(compiled: jax.stages.Compiled) -> int | None:
    """What the compiler assigned to a compiled function: arguments, results that are not arguments reused, temporaries.

    None where the backend does not tell.
    """
    try:
        analysis = compiled.memory_analysis()
    except (NotImplementedError, RuntimeError):
        return None
    if analysis is None:
        return None
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return int(analysis.argument_size_in_bytes + results + analysis.temp_size_in_bytes)


def measured_peak() -> tuple[int, str]:
    """The most bytes in use so far, and of what: of the first device where its allocator counts, else of the process."""
    import jax

    statistics = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return int(statistics["peak_bytes_in_use"]), "on the device"
    return process_peak(), "of the process"
