"""Train a GPT-2 and leave llm.c checkpoints, a log and a loss curve.

  python scripts/train.py                                        the demo on a CPU, GPT-2 124M on an accelerator
  python scripts/train.py --config demo                          learn the built-in text in a few minutes
  python scripts/train.py --init d12 --train 'data/*_train_*.bin' --batch-size 8
  python scripts/train.py --init gpt2_124M.bin --train data/my_train.bin     fine-tune, validate on data/my_val.bin
  python scripts/train.py --resume --out-dir runs/NAME           continue a run

The built-in text has to be prepared once: python scripts/prepare_data.py
"""

from __future__ import annotations

import dataclasses
import os

from gpt2_jax.commands.command_line import parse_command_line
from gpt2_jax.compute.backend import Backend, select_backend, set_cpu_devices
from gpt2_jax.config import LAUNCH_SETTINGS, ComputeSettings, RunConfig, format_config
from gpt2_jax.errors import as_typed
from gpt2_jax.machine import keep_freed_memory
from gpt2_jax.output import output_is_no_result
from gpt2_jax.processes.launch import Launch, find_launch
from gpt2_jax.processes.start import start


def main(words: list[str]) -> None:
    command = parse_command_line(words, __doc__)
    if not (command.only_print or command.settings.run.dry_run):
        output_is_no_result()
    if command.as_if and not command.only_print:
        select_backend("cpu")  # before anything imports jax

        from gpt2_jax.training.as_if import print_as_if

        print_as_if(command.settings, command.as_if)
        return
    # Before anything imports jax.
    backend = None if command.only_print and command.names_a_run else _backend(command.settings.compute)
    if backend is not None and backend.platform == "cpu" and not command.names_a_run:
        print(
            as_typed(
                "# nothing says what to train, and there is no accelerator: this is the demo, as with --config demo;\n"
                "# GPT-2 124M is python scripts/train.py --init d12"
            )
        )
        command = parse_command_line(["--config", "demo", *words], __doc__)
    if command.only_print or backend is None:
        print(format_config(command.settings))
        return

    if backend.platform == "cpu":
        keep_freed_memory()
        if command.settings.compute.devices > 1:
            set_cpu_devices(command.settings.compute.devices)

    settings = command.settings
    launch = _launch(settings.compute)
    compute = dataclasses.replace(settings.compute, processes=launch.number)
    with start(launch, backend, _facts(settings)) as group:
        from gpt2_jax.training.run import train

        train(dataclasses.replace(settings, compute=compute), command.name, backend, group)


def _launch(compute: ComputeSettings) -> Launch:
    return find_launch(
        os.environ,
        coordinator=compute.coordinator,
        processes=compute.processes,
        process_id=compute.process_id,
        hosts=compute.hosts,
        method=compute.distributed,
    )


def _facts(settings: RunConfig) -> dict[str, str]:
    """The settings that all processes must have the same, by their flags."""
    return {
        "--" + name.replace("_", "-"): str(value)
        for section in dataclasses.asdict(settings).values()
        for name, value in section.items()
        if name not in LAUNCH_SETTINGS
    }


def _backend(compute: ComputeSettings) -> Backend:
    return select_backend(
        compute.backend, metal_plugin=compute.metal_plugin, full_float32=compute.matmul_precision == "highest"
    )
