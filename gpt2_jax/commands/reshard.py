"""Write a run's newest checkpoint, or that of --step, for another number of processes of llm.c, whole states or ZeRO-1 parts.

python scripts/reshard_checkpoint.py runs/NAME --processes 8 --output-dir log_gpt2_124M
python scripts/reshard_checkpoint.py log_gpt2_124M --processes 1 --output-dir merged --no-zero --train 'data/*_train_*.bin'
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from gpt2_jax.commands.command_line import parse
from gpt2_jax.config import RunConfig, load_saved_config
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.files import FilePath
from gpt2_jax.llmc.checkpoint_set import step_of
from gpt2_jax.llmc.loader import loader_states
from gpt2_jax.output import output_is_no_result
from gpt2_jax.training.checkpoint import reshard_checkpoint


@dataclass(frozen=True)
class Arguments:
    folder: Annotated[FilePath, tyro.conf.Positional]
    """Run folder, of this project or of llm.c."""
    processes: int
    """Processes that the written checkpoint is for, llm.c's -pn."""
    output_dir: FilePath
    """Folder to write it to."""
    step: int | None = None
    """Of this step's checkpoint rather than the newest complete one's."""
    zero: bool = True
    """Each process keeps its part of moments and master weights (llm.c's -z 1), or all of them (-z 0)."""
    train: FilePath | None = None
    """Training shards, as the run had them; like the next three only needed where the folder has no config.toml."""
    batch_size: int | None = None
    """Sequences of one micro-batch of one process from here on."""
    sequence_length: int | None = None
    """Tokens of a sequence."""
    total_batch_size: int | None = None
    """Tokens of one step of all processes."""


def main(words: list[str]) -> None:
    arguments = parse(Arguments, __doc__, words)
    output_is_no_result()
    saved = load_saved_config(arguments.folder)
    saved = RunConfig() if saved is None else saved
    data = saved.data
    B, T = arguments.batch_size or data.batch_size, arguments.sequence_length or data.sequence_length
    tokens = arguments.processes * B * T
    total = arguments.total_batch_size or data.total_batch_size or tokens
    if arguments.processes < 1 or total % tokens:
        raise Gpt2JaxError(
            f"--processes {arguments.processes}: expected at least 1, and a step of a multiple of processes x batch size x "
            f"sequence length = {tokens} tokens, found {total}",
            "a smaller --batch-size, or another --total-batch-size",
        )
    step, micro_batches = step_of(arguments.folder, arguments.step), total // tokens
    loaders = loader_states(
        arguments.train or data.train,
        B,
        T,
        arguments.processes,
        shuffle=data.shuffle,
        seed=saved.run.seed,
        num_batches=step * micro_batches,
    )
    for path in reshard_checkpoint(
        arguments.folder, step, arguments.output_dir, loaders, num_micro_batches=micro_batches, zero=arguments.zero
    ):
        print(path)
