"""What a training step needs of memory: estimated before it starts, counted in the compiled step, and measured after."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2_jax.buffer.layout import ParameterLayout

if TYPE_CHECKING:
    import jax

# So many rows of the logits the step in place makes at once: at 8192 tokens all of them would be 1.6 GB, and their
# gradient as much again.
CLASSIFIER_ROWS = 1024
_BYTES = {"float32": 4, "bfloat16": 2}
_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14  # sys/mman.h


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


def process_peak() -> int:
    """The most memory that this process has had resident, in bytes (its libraries included)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, kibibytes on Linux


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the next step, where it can (glibc); before XLA starts its threads.

    XLA frees a step's temporary memory and takes it anew: without this every page of it is mapped and zeroed again in
    every step. The pages may be huge ones. False where nothing was changed.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    mallopt = getattr(libc, "mallopt", None)
    if libc is None or mallopt is None:
        return False
    # malloc.h's M_ARENA_MAX, M_MMAP_MAX and M_TRIM_THRESHOLD: one heap for all threads, also for large blocks, never cut.
    if not all(mallopt(option, value) for option, value in ((-8, 1), (-4, 0), (-1, -1))):
        return False
    _ask_for_huge_pages(libc)
    return True


def _ask_for_huge_pages(libc: ctypes.CDLL) -> None:
    """Grow the heap by half of the machine's memory, of addresses alone, that the kernel may back by pages of 2 MiB.

    A step reads and writes its buffers from end to end: with pages of 4 KiB it waits for their addresses. Where the
    kernel has none to give, or counts addresses as if they were memory, all is as it was.
    """
    limits = [resource.getrlimit(limit)[0] for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    try:
        counts_addresses = Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2"
    except OSError:
        counts_addresses = False
    if counts_addresses or any(limit != resource.RLIM_INFINITY for limit in limits):
        return
    libc.malloc.restype = ctypes.c_void_p
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    block = libc.malloc(ctypes.c_size_t(size))
    if block is None:
        return
    start = -(-block // _HUGE_PAGE) * _HUGE_PAGE
    libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t((block + size - start) // _HUGE_PAGE * _HUGE_PAGE), _MADV_HUGEPAGE)
    libc.free(ctypes.c_void_p(block))


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
