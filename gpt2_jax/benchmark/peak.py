"""The best rate of matrix products on a machine: what a training step's rate is held against.

python -m gpt2_jax.benchmark.peak REQUEST    REQUEST: the JSON object of a `Request`

Prints one JSON object last: {"gflops": the median, "of": who reached it, "rounds", "spread", "doubtful": whether it is the
extrapolation of a single round, "totals": bench_matmul.py's}; of an accelerator also "copy": GB/s, "attention": seconds of one
layer's, forward and backward, or None with "no_attention": the reason. Of a CPU "rates": those of `library.rates`, or None.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from gpt2_jax.benchmark.machine import spread
from gpt2_jax.compute.backend import select_backend
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.ops.cpu import library

_PRODUCTS_OF_CALL = 20
_COPIES = 100
_ATTENTIONS = 50


class _Sizes(NamedTuple):
    """What fills an accelerator, for about a second."""

    product: int  # rows and columns
    products: int  # of a round, so that the card is as warm as in training
    copied_bytes: int


# An Apple GPU has a hundredth of the rate of the fastest cards, and shares the machine's memory.
_SIZES = {"cuda": _Sizes(8192, 600, 2 << 30), "metal": _Sizes(2048, 200, 256 << 20)}


@dataclass(frozen=True)
class Request:
    backend: str
    model: dict[str, int]
    tokens: int
    implementations: list[str]
    rounds: int
    seconds: float  # of the process, after which what was not measured is left out
    batch_size: int = 1  # of one layer's attention, on an accelerator
    sequence_length: int = 1


def measure_peak(request: Request) -> dict[str, Any]:
    """On the CPU the fastest of the step's own products; on an accelerator a large square bfloat16 product."""
    if (backend := select_backend(request.backend).name) != "cpu":
        size, products, copied_bytes = _SIZES[backend]
        rounds = _square_product_seconds(size, products, request.rounds)
        return {
            "gflops": 2 * size**3 * products / statistics.median(rounds) / 1e9,
            "of": f"XLA's bfloat16 product of {size} x {size}",
            "rounds": len(rounds),
            "spread": spread(rounds),
            "doubtful": False,
            "totals": [],
            "copy": _copy_rate(copied_bytes),
            "rates": None,
            **_attention(request),
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
        "attention": None,
        "no_attention": "on the CPU there is no such kernel",
        "rates": library.rates(),
    }


def _square_product_seconds(size: int, count: int, rounds: int) -> list[float]:
    """Seconds of so many products one after the other, for each round."""
    import jax
    import jax.numpy as jnp

    # Random, as equal numbers need less power; its powers keep their size.
    a = (jax.random.normal(jax.random.key(0), (size, size)) / size**0.5).astype(jnp.bfloat16)
    products = _chained_products()
    b = products(a, a)
    _wait_for(b)
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(count // _PRODUCTS_OF_CALL):
            b = products(a, b)
        _wait_for(b)
        seconds.append(time.perf_counter() - started)
    return seconds


def _chained_products() -> Callable[[Any, Any], Any]:
    """The compiled a @ (a @ (... b)) of _PRODUCTS_OF_CALL products.

    Written out: a compiled loop copies what it carries in every pass, which is 6% of a product's time.
    """
    import jax

    @jax.jit
    def products(a: jax.Array, b: jax.Array) -> jax.Array:
        for _ in range(_PRODUCTS_OF_CALL):
            b = a @ b
        return b

    return products


def _copy_rate(copied_bytes: int) -> float:
    """Gigabytes a second that a copy reads and writes together."""
    import jax
    import jax.numpy as jnp

    a = jnp.zeros(copied_bytes // 4, jnp.float32)
    copy = jax.jit(lambda a: a + 1.0)
    seconds = _seconds_of(lambda: copy(a), _COPIES)
    return 2 * copied_bytes / seconds / 1e9


def _attention(request: Request) -> dict[str, Any]:
    """Seconds of one layer's causal attention by cuDNN in bfloat16, forward and backward."""
    import jax
    import jax.numpy as jnp

    config = GPT2Config(**request.model)
    shape = (request.batch_size, request.sequence_length, config.num_heads, config.channels // config.num_heads)
    q, k, v, gradient = (jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(1), 4))

    @jax.jit
    def both_ways(q: jax.Array, k: jax.Array, v: jax.Array, gradient: jax.Array) -> tuple[jax.Array, ...]:
        attend = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        return jax.vjp(attend, q, k, v)[1](gradient)

    try:
        return {"attention": _seconds_of(lambda: both_ways(q, k, v, gradient), _ATTENTIONS), "no_attention": ""}
    except Exception as error:  # the card, jax or cuDNN may lack it, and each says so in a class of its own
        return {"attention": None, "no_attention": f"{type(error).__name__}: {error}".splitlines()[0]}


def _seconds_of(call: Callable[[], Any], count: int) -> float:
    """Seconds of one of `count` calls, whose results are waited for at the end, after one that is not timed."""
    _wait_for(call())
    started = time.perf_counter()
    for _ in range(count):
        result = call()
    _wait_for(result)
    return (time.perf_counter() - started) / count


def _wait_for(result: Any) -> None:
    """Wait for arrays. Some plugins for the Apple GPU do not wait in block_until_ready: an element on the host is there when
    its array is."""
    import jax
    import numpy as np

    last = jax.tree_util.tree_leaves(jax.block_until_ready(result))[-1]
    np.asarray(last[(0,) * last.ndim])


def main() -> None:
    print(json.dumps(measure_peak(Request(**json.loads(sys.argv[1])))))


if __name__ == "__main__":
    main()
