"""Train a GPT-2 and leave llm.c checkpoints, a log and a loss curve.

  python scripts/train.py --config demo                          learn the built-in text in a few minutes
  python scripts/train.py --init d12 --train 'data/*_train_*.bin' --batch-size 8
  python scripts/train.py --init gpt2_124M.bin --train my.bin    fine-tune
  python scripts/train.py --resume --out-dir runs/NAME           continue a run

The built-in text has to be prepared once: python scripts/prepare_data.py
"""

from __future__ import annotations

from gpt2_jax.commands.command_line import parse_command_line
from gpt2_jax.compute.backend import select_backend
from gpt2_jax.config import format_config
from gpt2_jax.machine import keep_freed_memory


def main(words: list[str]) -> None:
    config, name, only_print = parse_command_line(words, __doc__)
    if only_print:
        print(format_config(config))
        return
    compute = config.compute
    # Before anything imports jax.
    backend = select_backend(
        compute.backend, metal_plugin=compute.metal_plugin, full_float32=compute.matmul_precision == "highest"
    )

    if backend.platform == "cpu":
        keep_freed_memory()

    from gpt2_jax.training.run import train

    train(config, name, backend)
