"""One system that generates text, timed, in a process of its own: what bench_generate.py starts for each.

python -m gpt2_jax.benchmark.generate_system REQUEST    REQUEST: the JSON object of a `Request`

After getting ready it prints {"ready": true}, or {"refused": the reason} and ends. Then it makes a turn for each line that it
reads, and prints {"seconds": those of each token after the first of its turn}. The system 'copy' times the machine's copies
instead: {"seconds": [of the fastest of some copies of COPIED_BYTES]}.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2_jax.compute.backend import select_backend
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2Config

if TYPE_CHECKING:
    import torch

SYSTEMS = ("gpt2_jax", "gpt2_jax_uncached", "transformers")
COPY = "copy"
COPIED_BYTES = 1 << 29
_COPIES = 8


@dataclass(frozen=True)
class Request:
    system: str  # of SYSTEMS, or COPY
    backend: str
    dtype: str
    model: dict[str, int]
    batch_size: int
    length: int  # of the texts at their end
    tokens: int  # that a turn times


def _weights(config: GPT2Config) -> np.ndarray:
    """Random ones of the usual size, for every system the same."""
    params = np.random.default_rng(0).standard_normal(config.layout.num_parameters, dtype=np.float32)
    params *= np.float32(0.02)
    params[slice(*config.layout["wte"].padding_span)] = 0
    return params


def _prompt(request: Request) -> list[int]:
    """So many ids that the texts have their length after one token that is not timed and those that are."""
    length = request.length - request.tokens - 1
    return np.random.default_rng(1).integers(0, request.model["vocab_size"], length).tolist()


def _between(times: list[float]) -> list[float]:
    return np.diff(times).tolist()


def _gpt2_jax(request: Request, *, cached: bool) -> Callable[[], list[float]]:
    backend = select_backend(request.backend)

    import jax.numpy as jnp

    from gpt2_jax.compute.backend import open_device
    from gpt2_jax.compute.decode import decoding_weights
    from gpt2_jax.compute.plan import make_plan
    from gpt2_jax.config import ComputeSettings
    from gpt2_jax.generate import Sampling, generate_samples

    open_device(backend)
    config = GPT2Config(**request.model)
    plan = make_plan(ComputeSettings(dtype=request.dtype), backend, config)  # type: ignore[arg-type]
    params_N = jnp.asarray(_weights(config))
    weights = decoding_weights(plan, params_N) if cached else params_N

    def turn() -> list[float]:
        tokens = generate_samples(
            plan,
            weights,
            _prompt(request),
            request.tokens + 1,
            num_samples=request.batch_size,
            sampling=Sampling(temperature=0),
            cached=cached,
        )
        return _between([time.perf_counter() for _ in tokens])

    return turn


def _transformers(request: Request) -> Callable[[], list[float]]:
    from gpt2_jax.interop.pytorch import make_pytorch_model

    config = GPT2Config(**request.model)
    model: Any = make_pytorch_model(config, _weights(config))

    import torch

    device = "cuda" if request.backend == "cuda" else "cpu"
    model = model.to(device=device, dtype={"float32": torch.float32, "bfloat16": torch.bfloat16}[request.dtype]).eval()
    prompt = torch.tensor([_prompt(request)] * request.batch_size, device=device)

    def turn() -> list[float]:
        clock = _Clock()
        with torch.no_grad():
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=request.tokens + 1,
                min_new_tokens=request.tokens + 1,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
                logits_processor=[clock],
            )
        return _between(clock.times)

    return turn


class _Clock:
    """Notes when the logits of each token are there; transformers hands them to such a function before it chooses."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if logits.is_cuda:
            import torch

            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return logits


def _copies(request: Request) -> Callable[[], list[float]]:
    select_backend(request.backend)

    import jax
    import jax.numpy as jnp

    a, b = (jnp.zeros(COPIED_BYTES // 4, jnp.float32) for _ in range(2))
    # Into memory that is there: new pages would cost more than the copy.
    copy = jax.jit(lambda a, b: a + 1.0, donate_argnums=1, keep_unused=True)

    def turn() -> list[float]:
        nonlocal b
        seconds = []
        for _ in range(_COPIES):
            started = time.perf_counter()
            b = jax.block_until_ready(copy(a, b))
            seconds.append(time.perf_counter() - started)
        return [min(seconds)]

    return turn


def main() -> None:
    request = Request(**json.loads(sys.argv[1]))
    make = {
        "gpt2_jax": lambda request: _gpt2_jax(request, cached=True),
        "gpt2_jax_uncached": lambda request: _gpt2_jax(request, cached=False),
        "transformers": _transformers,
        COPY: _copies,
    }[request.system]
    try:
        turn = make(request)
    except Gpt2JaxError as error:
        print(json.dumps({"refused": str(error)}), flush=True)
        return
    turn()  # compiles
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        print(json.dumps({"seconds": turn()}), flush=True)


if __name__ == "__main__":
    main()
