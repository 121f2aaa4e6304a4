"""Time the matrix products of a GPT-2 124M training step by all of this project's implementations, XLA, numpy, PyTorch.

  python scripts/bench_matmul.py                                      all of them; minutes
  python scripts/bench_matmul.py --quick                              within 50 seconds
  python scripts/bench_matmul.py --tokens 2048 --plot rates.png
  python scripts/bench_matmul.py --implementations threaded xla pytorch --rounds 9

On a Mac the table and the picture have the published figures of a port to Swift beside them. The last line printed is one
JSON object. PyTorch needs pip install -e '.[test]'.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated

import tyro

from gpt2_jax.benchmark.machine import limit_threads
from gpt2_jax.commands.command_line import parse
from gpt2_jax.files import FilePath


@dataclass(frozen=True)
class Arguments:
    tokens: int = 256
    """Tokens of the step, B * T."""
    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """One layer a round and few rounds: for a first look, not for a claim."""
    plot: FilePath | None = None
    """PNG file to draw the rates into."""
    implementations: tuple[str, ...] = ()
    """Only these; by default all, and those that cannot be had are listed with the reason."""
    rounds: int = 5
    """Rounds whose median is taken."""


def main(words: list[str]) -> None:
    arguments = parse(Arguments, __doc__, words)
    os.environ["JAX_PLATFORMS"] = "cpu"
    limit_threads()  # before anything imports numpy

    from gpt2_jax.benchmark.matmul import bench_matmul
    from gpt2_jax.benchmark.products import IMPLEMENTATIONS

    bench_matmul(
        arguments.tokens,
        arguments.implementations or IMPLEMENTATIONS,
        rounds=arguments.rounds,
        quick=arguments.quick,
        plot=arguments.plot,
    )
