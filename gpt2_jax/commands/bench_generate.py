"""Time the generating of text: this project with its cache and without, and transformers, beside the least time possible.

  python scripts/bench_generate.py                                    GPT-2 124M, texts of 512 tokens; minutes
  python scripts/bench_generate.py --dtype bfloat16 --batch-size 8
  python scripts/bench_generate.py --model d48 --backend cuda --dtype bfloat16 --length 1024

Each system runs in a process of its own; they take turns. The last line printed is one JSON object; exit status 1 when a
system failed that should have run. transformers needs pip install -e '.[test]'.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import Literal

from gpt2_jax.benchmark.machine import limit_threads
from gpt2_jax.commands.command_line import parse
from gpt2_jax.compute.backend import select_backend
from gpt2_jax.errors import Gpt2JaxError


@dataclass(frozen=True)
class Arguments:
    model: str = "d12"
    """Descriptor of the model: d6, d12, gpt3:c768 ..."""
    length: int = 512
    """Tokens of each text at its end."""
    tokens: int = 64
    """The last so many tokens of a text are timed; without a cache at most 8."""
    batch_size: int = 1
    """Texts that are generated together."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of products and activations, in every system."""
    backend: Literal["cpu", "cuda"] = "cpu"
    """Where all of them compute."""
    rounds: int = 3
    """Turns of each system, of which the median is taken."""


def main(words: list[str]) -> None:
    arguments = parse(Arguments, __doc__, words)
    if arguments.rounds < 1:
        raise Gpt2JaxError(f"--rounds: expected at least 1, found {arguments.rounds}", "--rounds 3")
    select_backend(arguments.backend)
    limit_threads()  # before anything imports numpy

    from gpt2_jax.benchmark.generate import Workload, bench_generate
    from gpt2_jax.families.gpt2 import config_from_descriptor

    work = Workload(
        arguments.model,
        config_from_descriptor(arguments.model),
        arguments.backend,
        arguments.dtype,
        arguments.batch_size,
        arguments.length,
        arguments.tokens,
    )
    sys.exit(0 if bench_generate(work, arguments.rounds, partial(print, flush=True)) else 1)
