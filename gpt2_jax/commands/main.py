"""The console command `gpt2-jax`: its subcommands, one module each."""

from __future__ import annotations

import importlib
import sys

from gpt2_jax.errors import Gpt2JaxError, command_of_script, program_name, run_program, started_as
from gpt2_jax.names import nearest

COMMANDS = {
    "train": "train a GPT-2, and leave llm.c checkpoints, a log and a loss curve",
    "generate": "continue a text with a trained model",
    "prepare": "make token shards for training",
    "check-gradients": "compare loss, logits, gradients and ten steps with PyTorch",
    "check-curve": "train PyTorch as a run was trained, and compare the losses",
    "check-metal": "whether the plugins for the Apple GPU can take what a run compiles",
    "doctor": "what is installed here, what of it does harm, and what to do",
    "selfcheck": "train a small model on this machine's device and on the CPU: do they agree",
    "convert": "a model from or to a Hugging Face folder, llm.c or nanoGPT",
    "report": "runs in one HTML page: curves, settings that differ, samples, machines",
    "reshard": "a checkpoint for another number of processes of llm.c",
    "starter-pack": "the four files that llm.c's programs test and train with",
    "bench-matmul": "time the matrix products of a training step",
    "bench-train": "time whole training steps beside plain JAX and PyTorch",
    "bench-scale": "time training steps on several devices beside PyTorch's DDP and FSDP2",
}


def run(command: str) -> None:
    """Run one command with the words of the process's command line, and end the process."""
    _run(command, sys.argv[1:])


def main() -> None:
    """The program itself: the first word is the command."""
    words = sys.argv[1:]
    if words and words[0] in COMMANDS:
        _run(words[0], words[1:])
    else:
        run_program(lambda: _no_command(words))


def _run(command: str, words: list[str]) -> None:
    started_as(command)
    # Imported within run_program: Ctrl-C while modules load ends like Ctrl-C later.
    run_program(lambda: importlib.import_module(f"gpt2_jax.commands.{command.replace('-', '_')}").main(words))


def _no_command(words: list[str]) -> None:
    """What the program says without the name of a command; only --help ends well."""
    program = program_name()
    if words and words[0] not in ("-h", "--help"):
        close = nearest(command_of_script(words[0]), COMMANDS)
        raise Gpt2JaxError(
            f"{program}: expected one of {', '.join(COMMANDS)}, found {words[0]!r}",
            f"{program} {close[0] if close else '--help'}",
        )
    width = max(map(len, COMMANDS))
    print(f"usage: {program} COMMAND ...\n")
    for name, what in COMMANDS.items():
        print(f"  {name:<{width}}  {what}")
    print(f"\n{program} COMMAND --help explains a command's flags.")
    sys.exit(0 if words else 2)
