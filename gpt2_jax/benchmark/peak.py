"""The best rate of matrix products on a machine: what a training step's rate is held against.

python -m gpt2_jax.benchmark.peak REQUEST    REQUEST: the JSON object of a `Request`

Prints one JSON object last: {"gflops", "of": who reached it, "totals": bench_matmul.py's}.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from typing import Any

from gpt2_jax.compute.backend import select_backend
from gpt2_jax.families.gpt2 import GPT2Config

_ACCELERATOR_SIZE = 8192  # of a square product that fills an accelerator
_ACCELERATOR_PRODUCTS = 20


@dataclass(frozen=True)
class Request:
    backend: str
    model: dict[str, int]
    tokens: int
    implementations: list[str]
    rounds: int
    seconds: float  # of the process, after which what was not measured is left out


def measure_peak(request: Request) -> dict[str, Any]:
    """On the CPU the fastest of the step's own products; on an accelerator a large square bfloat16 product."""
    if select_backend(request.backend).name != "cpu":
        size = _ACCELERATOR_SIZE
        return {"gflops": _square_product_gflops(size), "of": f"XLA's bfloat16 product of {size} x {size}", "totals": []}
    import jax

    from gpt2_jax.benchmark.matmul import totals
    from gpt2_jax.benchmark.matmul_timing import measure

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    runs, _ = measure(
        GPT2Config(**request.model),
        request.tokens,
        request.implementations,
        rounds=request.rounds,
        seconds=request.seconds,
    )
    measured = totals(runs)
    # A rate from a slice in a single round is taken only if there is no other.
    known = [total for total in measured if "extrapolated" not in total or total["rounds"] > 1]
    best = max(known or measured, key=lambda total: total["gflops"])
    return {"gflops": best["gflops"], "of": f"{best['implementation']} {best['precision']}", "totals": measured}


def _square_product_gflops(size: int) -> float:
    import jax
    import jax.numpy as jnp

    a = jnp.full((size, size), 1.0 / size, jnp.bfloat16)

    @jax.jit
    def products(a: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, _ACCELERATOR_PRODUCTS, lambda _, b: a @ b, a)

    products(a).block_until_ready()
    started = time.perf_counter()
    products(a).block_until_ready()
    return 2 * size**3 * _ACCELERATOR_PRODUCTS / (time.perf_counter() - started) / 1e9


def main() -> None:
    print(json.dumps(measure_peak(Request(**json.loads(sys.argv[1])))))


if __name__ == "__main__":
    main()
