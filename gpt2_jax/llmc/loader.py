"""llm.c's data loader: which tokens come in which order, for any number of processes.

A sample is num_processes * B * T consecutive tokens of a shard; what is left over at a shard's end is dropped. In
sequential order samples and shards follow one another for ever; shuffled, both are permuted by an mt19937 seeded
with seed + rank, of which llm.c's seed is 42 (llm.c llmc/dataloader.h).
"""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc.random import Mt19937
from gpt2_jax.llmc.token_shard import hint_for, open_token_shard
from gpt2_jax.names import near

SHUFFLE_SEED = 42  # llm.c's


@dataclass(frozen=True)
class LoaderState:
    """The position of a loader, as a training state file keeps it. The last three are None without shuffling."""

    shard_index: int
    sample_index: int
    shard_permutation: np.ndarray | None = None  # int32
    sample_permutation: np.ndarray | None = None  # int32, of the open shard
    generator: np.ndarray | None = None  # random.GENERATOR_STRUCT


class Place(NamedTuple):
    """Where a batch begins."""

    path: str  # of its shard
    token: int  # offset in the shard


class TokenLoader:
    """Batches of tokens from the shards that a glob pattern names, in llm.c's order."""

    def __init__(
        self,
        pattern: str,
        batch_size: int,
        sequence_length: int,
        *,
        vocab_size: int,
        shuffle: bool = False,
        seed: int = SHUFFLE_SEED,
        process_rank: int = 0,
        num_processes: int = 1,
    ):
        """Open every shard once and check it. Raises Gpt2JaxError when the pattern names no file, or a shard is no
        shard or holds less than one batch (num_processes * B * T + 1 tokens)."""
        # A literal path wins over a pattern, so that a folder whose name holds '[' works, and a folder is an error.
        self.pattern = pattern
        self.paths = [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern))
        if not self.paths:
            found = f"found no file of that name or pattern{near(pattern)}"
            raise Gpt2JaxError(f"{pattern}: expected at least one token shard, {found}", hint_for(pattern))
        self.batch_size, self.sequence_length, self.vocab_size = batch_size, sequence_length, vocab_size
        self._rank_tokens = batch_size * sequence_length
        self._num_samples = 0
        self._sample_tokens = num_processes * self._rank_tokens
        self._rank_offset = process_rank * self._rank_tokens
        self.num_tokens = 0  # of all shards, the dropped tails included: what llm.c counts an epoch by
        self.num_batches = 0  # until the order repeats
        self.last_place = Place(self.paths[0], 0)  # of the last batch that was taken
        for path in self.paths:
            size = len(open_token_shard(path))
            if size < self._sample_tokens + 1:
                raise Gpt2JaxError(
                    f"{path}: expected at least {self._sample_tokens + 1} tokens for one batch "
                    f"({num_processes} process(es) x {batch_size} x {sequence_length} + 1), found {size}",
                    "a smaller --batch-size or --sequence-length, or more text",
                )
            self.num_tokens += size
            self.num_batches += (size - 1) // self._sample_tokens
        self._generator = Mt19937((seed + process_rank) % 2**32) if shuffle else None
        self._shard_order = np.arange(len(self.paths), dtype=np.int32)
        self.reset()

    def reset(self) -> None:
        """Go back to the first sample of the first shard; when shuffling, in the order of a new epoch."""
        if self._generator is not None:
            self._generator.permute(self._shard_order)
        self._open(0)

    def next_batch(self) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, (B, T) int32 each; the targets are the inputs moved on by one token.

        Raises Gpt2JaxError, naming shard and position, for a token id that the model's vocabulary lacks.
        """
        if self._sample_index >= self._num_samples:
            self._open_next()
        sample = self._sample_index if self._sample_order is None else int(self._sample_order[self._sample_index])
        start = sample * self._sample_tokens + self._rank_offset
        tokens = self._shard[start : start + self._rank_tokens + 1].astype(np.int32)
        self.last_place = Place(self.paths[self._shard_order[self._shard_index]], start)
        if tokens.max() >= self.vocab_size:
            first = int(np.argmax(tokens >= self.vocab_size))
            raise Gpt2JaxError(
                f"{self.last_place.path}: expected token ids below {self.vocab_size}, "
                f"found {tokens[first]} at token {start + first}",
                "a shard made with this model's tokenizer",
            )
        self._sample_index += 1
        shape = (self.batch_size, self.sequence_length)
        return tokens[:-1].reshape(shape), tokens[1:].reshape(shape)

    def skip(self, num_batches: int) -> None:
        """Pass over `num_batches` batches without reading them."""
        while num_batches:
            if self._sample_index >= self._num_samples:
                self._open_next()
            skipped = min(num_batches, self._num_samples - self._sample_index)
            self._sample_index += skipped
            num_batches -= skipped

    def state(self) -> LoaderState:
        if self._generator is None or self._sample_order is None:
            return LoaderState(self._shard_index, self._sample_index)
        return LoaderState(
            self._shard_index,
            self._sample_index,
            self._shard_order.copy(),
            self._sample_order.copy(),
            self._generator.to_struct(),
        )

    def restore(self, state: LoaderState) -> None:
        """Continue where the loader that saved this state stood. Gpt2JaxError if it had other shards, batches or sequences."""
        if (self._generator is None) != (state.generator is None):
            raise Gpt2JaxError(
                f"loader state: expected one {'without' if self._generator is None else 'with'} shuffling, found the other",
                "resume with the --shuffle that the run was started with",
            )
        if not 0 <= state.shard_index < len(self.paths):
            raise Gpt2JaxError(f"loader state: expected a shard index below {len(self.paths)}, found {state.shard_index}")
        if state.shard_permutation is not None and state.sample_permutation is not None and state.generator is not None:
            self._generator = Mt19937.from_struct(state.generator)
            _check_permutation("shards", state.shard_permutation, len(self.paths))
            self._shard_order = state.shard_permutation.copy()
            self._open(state.shard_index, state.sample_permutation)
        else:
            self._open(state.shard_index)
        if not 0 <= state.sample_index <= self._num_samples:
            raise Gpt2JaxError(
                f"loader state: expected a sample index of at most {self._num_samples}, found {state.sample_index}",
                "resume with the --batch-size, --sequence-length and data that the run was started with",
            )
        self._sample_index = state.sample_index

    def _open_next(self) -> None:
        if self._shard_index == len(self.paths) - 1:
            self.reset()
        else:
            self._open(self._shard_index + 1)

    def _open(self, shard_index: int, sample_order: np.ndarray | None = None) -> None:
        """Open the shard at this place of the order, at its first sample, with a new or the given order of samples."""
        self._shard_index, self._sample_index = shard_index, 0
        self._shard = open_token_shard(self.paths[self._shard_order[shard_index]])
        self._num_samples = (len(self._shard) - 1) // self._sample_tokens
        self._sample_order: np.ndarray | None = None
        if sample_order is not None:
            _check_permutation("samples", sample_order, self._num_samples)
            self._sample_order = sample_order.copy()
        elif self._generator is not None:
            self._sample_order = np.arange(self._num_samples, dtype=np.int32)
            self._generator.permute(self._sample_order)


def loader_states(
    pattern: str, batch_size: int, sequence_length: int, num_processes: int, *, shuffle: bool, seed: int, num_batches: int
) -> list[LoaderState]:
    """The positions of all processes' loaders, by rank, after `num_batches` batches each."""
    states = []
    for rank in range(num_processes):
        loader = TokenLoader(
            pattern,
            batch_size,
            sequence_length,
            vocab_size=2**16,
            shuffle=shuffle,
            seed=seed,
            process_rank=rank,
            num_processes=num_processes,
        )
        loader.skip(num_batches)
        states.append(loader.state())
    return states


def _check_permutation(what: str, permutation: np.ndarray, size: int) -> None:
    if not np.array_equal(np.sort(permutation), np.arange(size)):
        raise Gpt2JaxError(
            f"loader state: expected a permutation of {size} {what}, found {permutation.size} entries that are none",
            "resume with the --batch-size, --sequence-length and data that the run was started with",
        )
