"""Time whole GPT-2 training steps: this project with each of its matrix products, plain JAX, PyTorch eager and compiled, MLX.

  python scripts/bench_train.py                                       all of them; tens of minutes
  python scripts/bench_train.py --quick                               the choices of --matmul auto and three peers, 3 minutes
  python scripts/bench_train.py --batch-size 8 --sequence-length 256 --systems gpt2_jax:auto pytorch:bfloat16
  python scripts/bench_train.py --scaling --plot steps.png            also the time from 256 to 8192 tokens
  python scripts/bench_train.py --backend metal                       beside PyTorch on the Apple GPU and a GPT-2 in MLX
  python scripts/bench_train.py --backend cuda --batch-size 16 --sequence-length 1024 --record docs/records/NAME

Each system runs in a process of its own; they take turns of several steps, so that what else happens on the
machine happens to all. The last line printed is one JSON object; exit status 1 when a system failed
that should have run. PyTorch needs pip install -e '.[test]', MLX pip install mlx.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from gpt2_jax.benchmark.machine import limit_threads
from gpt2_jax.commands.command_line import parse
from gpt2_jax.compute.backend import select_backend
from gpt2_jax.files import FilePath


@dataclass(frozen=True)
class Arguments:
    model: str = "d12"
    """Descriptor of the model: d6, d12, gpt3:c768 ..."""
    batch_size: int = 4
    """Sequences, B."""
    sequence_length: int = 64
    """Tokens of each, T."""
    micro_batches: int = 1
    """Micro-batches of a step, whose gradients are added up."""
    steps: int = 10
    """Timed steps, of which the median is taken."""
    systems: tuple[str, ...] = ()
    """Only these: gpt2_jax, jax_plain, pytorch, pytorch_compiled, on NVIDIA GPUs pytorch_best (cuDNN's attention, a residual
    stream in bfloat16) and pytorch_tuned (that, and torch.compile's longest search), mlx; a matmul or dtype after a colon
    narrows it down."""
    backend: Literal["cpu", "cuda", "metal"] = "cpu"
    """Where all of them compute."""
    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Few systems and steps: for a first look, not for a claim."""
    scaling: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Measure this project's step from 256 to 8192 tokens as well."""
    plot: FilePath | None = None
    """PNG file to draw the systems into."""
    llmc_program: FilePath | None = None
    """llm.c's own trainer, train_gpt2cu, to be measured too."""
    record: FilePath | None = None
    """A new folder for this measurement: command, versions, output, figures, picture."""


def main(words: list[str]) -> None:
    arguments = parse(Arguments, __doc__, words)
    select_backend(arguments.backend)
    limit_threads()  # before anything imports numpy

    from gpt2_jax.benchmark.records import recording
    from gpt2_jax.benchmark.train import bench_train
    from gpt2_jax.benchmark.train_report import Workload
    from gpt2_jax.families.gpt2 import config_from_descriptor

    config = config_from_descriptor(arguments.model)
    work = Workload(
        arguments.model, config, arguments.batch_size, arguments.sequence_length, arguments.backend, arguments.micro_batches
    )
    work = dataclasses.replace(work, llmc_program=arguments.llmc_program or "")
    with recording(arguments.record, words) as picture:
        ended_well = bench_train(
            work,
            arguments.systems,
            steps=arguments.steps,
            quick=arguments.quick,
            scaling=arguments.scaling,
            plot=arguments.plot or picture,
        )
    sys.exit(0 if ended_well else 1)
