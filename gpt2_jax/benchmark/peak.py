"""The best rate of matrix products on a machine: what a training step's rate is held against.

python -m gpt2_jax.benchmark.peak REQUEST    REQUEST: the JSON object of a `Request`

Prints one JSON object last: {"gflops": the median, "of": who reached it, "rounds", "spread", "doubtful": whether it is the
extrapolation of a single round, "totals": bench_matmul.py's, "copy": GB/s, of an accelerator}.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

from gpt2_jax.benchmark.machine import spread
from gpt2_jax.compute.backend import select_backend
from gpt2_jax.families.gpt2 import GPT2Config

_ACCELERATOR_SIZE = 8192  # of a square product that fills an accelerator
_ACCELERATOR_PRODUCTS = 600  # about a second on the fastest cards, so that they are as warm as in training
_COPIED_BYTES = 2 << 30
_COPIES = 100


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
        rounds = _square_product_seconds(size, request.rounds)
        return {
            "gflops": 2 * size**3 * _ACCELERATOR_PRODUCTS / statistics.median(rounds) / 1e9,
            "of": f"XLA's bfloat16 product of {size} x {size}",
            "rounds": len(rounds),
            "spread": spread(rounds),
            "doubtful": False,
            "totals": [],
            "copy": _copy_rate(),
        }
    import jax

    from gpt2_jax.benchmark.matmul import is_doubtful, totals
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
    # A doubtful rate is taken only if there is no other.
    known = [total for total in measured if not is_doubtful(total)]
    best = max(known or measured, key=lambda total: total["gflops"])
    return {
        "gflops": best["gflops"],
        "of": f"{best['implementation']} {best['precision']}",
        "rounds": best["rounds"],
        "spread": best["spread"],
        "doubtful": is_doubtful(best),
        "totals": measured,
        "copy": None,
    }


def _square_product_seconds(size: int, rounds: int) -> list[float]:
    """Seconds of _ACCELERATOR_PRODUCTS products one after the other, for each round."""
    import jax
    import jax.numpy as jnp

    # Random, as equal numbers need less power; its powers keep their size.
    a = (jax.random.normal(jax.random.key(0), (size, size)) / size**0.5).astype(jnp.bfloat16)

    @jax.jit
    def products(a: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, _ACCELERATOR_PRODUCTS, lambda _, b: a @ b, a)

    products(a).block_until_ready()
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        products(a).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return seconds


def _copy_rate() -> float:
    """Gigabytes a second that a copy reads and writes together."""
    import jax
    import jax.numpy as jnp

    a = jnp.zeros(_COPIED_BYTES // 4, jnp.float32)
    copy = jax.jit(lambda a: a + 1.0, donate_argnums=())
    a.block_until_ready()
    copy(a).block_until_ready()
    started = time.perf_counter()
    for _ in range(_COPIES):
        b = copy(a)
    b.block_until_ready()
    return 2 * _COPIED_BYTES * _COPIES / (time.perf_counter() - started) / 1e9


def main() -> None:
    print(json.dumps(measure_peak(Request(**json.loads(sys.argv[1])))))


if __name__ == "__main__":
    main()
