"""Time GPT-2's training steps on several devices of one machine, by --zero and their number, beside PyTorch's DDP and FSDP2.

  python scripts/bench_scale.py --backend cuda --devices 1 2                          124M at B=16, every stage
  python scripts/bench_scale.py --backend cuda --devices 1 2 4 8 --batch-size 64 --stages 1
  python scripts/bench_scale.py --model d6 --batch-size 1 --sequence-length 64 --dtype float32 --steps 3     on the CPU

Weak scaling gives each device a batch; strong scaling keeps the tokens of a step, those of all devices, by micro-batches.
Systems on as many devices take turns of several steps. The last line printed is one JSON object; exit status 1 when a
system failed that should have run. PyTorch needs pip install -e '.[test]'.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

from gpt2_jax.benchmark.machine import limit_threads
from gpt2_jax.commands.command_line import parse
from gpt2_jax.compute.backend import select_backend
from gpt2_jax.files import FilePath


@dataclass(frozen=True)
class Arguments:
    model: str = "d12"
    """Descriptor of the model: d6, d12, gpt3:c768 ..."""
    batch_size: int = 16
    """Sequences of each device, B."""
    sequence_length: int = 1024
    """Tokens of each, T."""
    micro_batches: int = 1
    """Micro-batches of a step, whose gradients are added up."""
    devices: tuple[int, ...] = (1, 2)
    """Numbers of devices, which divide the largest of them."""
    stages: tuple[int, ...] = (1, 0, 2, 3)
    """Stages of --zero; the first is measured by strong scaling too."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of products and activations."""
    steps: int = 30
    """Timed steps, of which the median is taken."""
    backend: Literal["cpu", "cuda"] = "cpu"
    """Where all of them compute."""
    record: FilePath | None = None
    """A new folder for this measurement: command, versions, output, figures."""


def main(words: list[str]) -> None:
    arguments = parse(Arguments, __doc__, words)
    select_backend(arguments.backend)
    limit_threads()  # before anything imports numpy

    from gpt2_jax.benchmark.records import recording
    from gpt2_jax.benchmark.scale import bench_scale
    from gpt2_jax.benchmark.train_report import Workload
    from gpt2_jax.families.gpt2 import config_from_descriptor

    work = Workload(
        arguments.model,
        config_from_descriptor(arguments.model),
        arguments.batch_size,
        arguments.sequence_length,
        arguments.backend,
        arguments.micro_batches,
    )
    with recording(arguments.record, words):
        ended_well = bench_scale(work, arguments.devices, arguments.stages, arguments.dtype, steps=arguments.steps)
    sys.exit(0 if ended_well else 1)
