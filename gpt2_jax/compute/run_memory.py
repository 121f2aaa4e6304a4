"""What memory a run needs where it runs, and what it could do with less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gpt2_jax.buffer.layout import ParameterLayout
from gpt2_jax.compute.backend import Backend
from gpt2_jax.compute.memory import MemoryEstimate, estimate
from gpt2_jax.config import RunConfig
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.ops.in_place import writes_in_place


def recomputing_saves_memory(backend: Backend, matmul: str) -> bool:
    """Whether what a step is told to compute anew is not kept: jax.checkpoint's barriers must outlive the compiler."""
    return writes_in_place(matmul) or "barriers" not in backend.lacks


def memory_needed(config: RunConfig, backend: Backend, matmul: str, layout: ParameterLayout) -> MemoryEstimate:
    """The estimate for a step of a run on this backend with these products."""
    in_place = writes_in_place(matmul)
    return estimate(
        layout,
        config.data.batch_size,
        config.data.sequence_length,
        config.compute.dtype,
        gradient_buffers=1 if config.num_micro_batches == 1 or in_place else 2,
        donates=backend.donates,
        recompute=config.compute.recompute if recomputing_saves_memory(backend, matmul) else "none",
        in_place=in_place,
    )


def needing_less(config: RunConfig, backend: Backend, matmul: str) -> list[str]:
    """Settings that need less memory, the one that changes least first."""
    B, less = config.data.batch_size, []
    if B > 1:
        fewer = max(size for size in range(1, B) if B % size == 0)
        less.append(f"--batch-size {fewer} --total-batch-size {config.tokens_per_step}   (as many tokens a step)")
    if config.compute.recompute != "block" and recomputing_saves_memory(backend, matmul):
        less.append("--recompute block")
    if config.compute.dtype == "float32":
        less.append("--dtype bfloat16")
    return [*less, "a shorter --sequence-length", "a smaller model"]


@contextmanager
def out_of_memory_explained(needed: MemoryEstimate, less: list[str]) -> Iterator[None]:
    """XLA's error for memory that the device does not have becomes a Gpt2JaxError with what would need `less`."""
    try:
        yield
    except RuntimeError as error:
        # jax has one exception for all of XLA's failures; their text begins with the status code.
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        found = " ".join(str(error).split())[:200]
        raise Gpt2JaxError(f"memory: expected room for {needed} in a step, found: {found}", "; or ".join(less)) from error
