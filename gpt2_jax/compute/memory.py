"""The memory that a training step needs: estimated before it is compiled, counted by the compiler, and measured after."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jax

from gpt2_jax.compute.plan import Plan
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.machine import gigabytes, process_peak
from gpt2_jax.ops.attention import attention_of
from gpt2_jax.ops.classifier import classifier_of
from gpt2_jax.ops.norm import norms_of
from gpt2_jax.ops.recompute import saves_memory


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a training step by their use."""

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


def estimate(plan: Plan, batch_size: int, sequence_length: int, *, num_micro_batches: int = 1) -> MemoryEstimate:
    """The bytes that a step over micro-batches of B x T tokens has to keep on each device, for activations of s bytes an
    element.

    Parameters, gradients and each of the two moments are 4 N bytes; where the gradients of several micro-batches are
    not added up in place, two buffers of them are needed. A backend that cannot reuse the memory of the state it is given
    holds the old parameters and moments and the new ones. Activations are B T (L s (16 C + H T) + 2 s C + (4 + s) V)
    bytes: a layer's 16 C + H T elements a token are what its backward reads, both residuals, both LayerNorms' outputs, q,
    k, v, the softmax of every head, the attention's output, and the MLP's 4 C before and 4 C after GELU (Korthikanti et
    al. 2022, equation 1, without dropout); 2 C are the final LayerNorm's input and output, V the logits in float32 and
    their gradient. What is recomputed is there for one layer at a time. Attention that keeps no scores keeps one float32
    for every row of the softmax; where LayerNorm is folded into the weight behind it, its input is not kept, but the folded
    weights of q, k, v and the MLP's first layer are, 7 C s bytes a channel, unless the LayerNorms are made anew or weights
    are gathered; jax-mps's LayerNorm, which computes in float32, keeps its input so too; a classifier in chunks has the
    logits of one chunk, and may have their gradient in the same memory.

    Of D devices each has what --zero leaves it. From stage 1 on: its parts of parameters and moments, and weights that are
    gathered, all (stages 1, 2) or the largest op's. From stage 2 on: its part of the gradient (two where micro-batches are
    added up), and the whole gradients of the tensors that the model has once, until they are scattered. When the activations
    are gone, the gradient is put in the order of ranks (stage 1) or summed (stage 0), into memory that this may need instead.
    """
    config, s = plan.config, plan.compute_dtype.itemsize
    shares = plan.devices if plan.zero else 1  # a device keeps one of so many parts
    B, T, L, C, H = batch_size, sequence_length, config.num_layers, config.channels, config.num_heads
    buffer = 4 * plan.layout.num_parameters
    states = 1 if plan.backend.donates else 2
    # With dropout both what the softmax gave and what is left of it.
    softmax = s * H * T * (2 if plan.dropout else 1) if attention_of(plan).keeps_scores else 4 * H
    attention_and_mlp = (12 * s + 2 * norms_of(plan).keeps(s)) * C + softmax  # of one layer, bytes a token
    a_layer = {
        "none": attention_and_mlp,
        "gelu": attention_and_mlp - 4 * s * C,
        "layernorm": 10 * s * C + softmax,
        "block": s * C,
    }[plan.recompute if saves_memory(plan) else "none"]
    folds_anew = plan.zero == 3 or (saves_memory(plan) and plan.recompute in ("layernorm", "block"))
    folded = 7 * C * C * s * L if norms_of(plan).folds and not folds_anew else 0
    classifier = classifier_of(plan)
    a_row = classifier.bytes_of_logit(s) * config.padded_vocab_size
    activations = B * T * (L * a_layer + attention_and_mlp - a_layer + 2 * s * C) + folded
    activations += classifier.most_rows(B * T) * a_row
    gathered, exchanged = 0, 0
    gradients = buffer * (1 if plan.writes_in_place or num_micro_batches == 1 else 2)
    if plan.devices > 1:
        gathered = {0: 0, 3: 4 * max(tensor.layer_size for tensor in plan.layout.tensors)}.get(plan.zero, buffer)
        exchanged = buffer + (buffer // plan.devices if plan.zero else 0)
    if plan.zero >= 2:
        once = 4 * sum(tensor.size for tensor in plan.layout.tensors if not tensor.stacked)
        gradients = buffer // plan.devices * (1 if num_micro_batches == 1 else 2) + once
        exchanged = buffer // plan.devices
    return MemoryEstimate(
        parameters=buffer * states // shares + gathered,
        gradients=gradients,
        moments=2 * buffer * states // shares,
        activations=max(activations, exchanged - gathered),
    )


def compiled_memory(plan: Plan, compiled: jax.stages.Compiled) -> MemoryEstimate | None:
    """The bytes that the compiler assigned to a compiled step: arguments, results that are not arguments reused, temporaries.

    None where the backend does not tell.
    """
    try:
        analysis = compiled.memory_analysis()
    except (NotImplementedError, RuntimeError):
        return None
    if analysis is None:
        return None
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    total = int(analysis.argument_size_in_bytes + results + analysis.temp_size_in_bytes)
    buffer = 4 * plan.layout.num_parameters
    kept = buffer // plan.devices if plan.zero else buffer
    states = 1 if analysis.alias_size_in_bytes >= kept else 2
    gradient = buffer // plan.devices if plan.zero >= 2 else buffer
    return MemoryEstimate(kept * states, gradient, 2 * kept * states, total - 3 * kept * states - gradient)


def device_limit() -> int | None:
    """Bytes that a program may use on this process's first device; None where that is not known."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        return int(statistics["bytes_limit"])
    if jax.local_devices()[0].platform != "cpu" or not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def measured_peak() -> tuple[int, str]:
    """The most bytes in use so far, and of what: of the first device where its allocator counts, else of the process."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return int(statistics["peak_bytes_in_use"]), "on the device"
    return process_peak(), "of the process"


def needing_less(plan: Plan, batch_size: int, tokens_per_step: int) -> list[str]:
    """Settings that need less memory, the one that changes least first."""
    less = []
    if batch_size > 1:
        fewer = max(size for size in range(1, batch_size) if batch_size % size == 0)
        less.append(f"--batch-size {fewer} --total-batch-size {tokens_per_step}   (as many tokens a step)")
    if plan.recompute != "block" and saves_memory(plan):
        less.append("--recompute block")
    if plan.dtype == "float32":
        less.append("--dtype bfloat16")
    return [*less, "a shorter --sequence-length", "a smaller model"]


def check_memory(needed: MemoryEstimate, limit: int | None, less: list[str]) -> None:
    """Gpt2JaxError when a step needs more than the device has."""
    if limit is not None and needed.total > limit:
        raise Gpt2JaxError(
            f"memory: expected room for {needed} in a step, found {gigabytes(limit)} on the device", "; or ".join(less)
        )


@contextmanager
def out_of_memory_explained(needed: MemoryEstimate, less: list[str]) -> Iterator[None]:
    """XLA's error for memory that the device does not have becomes a Gpt2JaxError whose hint is the settings in `less`."""
    try:
        yield
    except RuntimeError as error:
        # jax has one exception for all of XLA's failures; their text begins with the status code.
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        found = " ".join(str(error).split())[:200]
        raise Gpt2JaxError(f"memory: expected room for {needed} in a step, found: {found}", "; or ".join(less)) from error
