"""The loaders of this process's ranks as one: rank r reads what llm.c's process r of so many would."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpt2_jax.llmc.loader import LoaderState, Place, TokenLoader


class RankLoaders:
    """Batches (number of these ranks * B, T), B rows of each rank, one rank after another."""

    def __init__(
        self,
        pattern: str,
        batch_size: int,
        sequence_length: int,
        *,
        num_ranks: int,
        ranks: range | None = None,
        **settings: Any,
    ):
        """As TokenLoader, whose `settings` these are; `ranks`: this process's, else all."""
        self.ranks = range(num_ranks) if ranks is None else ranks
        self._loaders = [
            TokenLoader(pattern, batch_size, sequence_length, process_rank=rank, num_processes=num_ranks, **settings)
            for rank in self.ranks
        ]
        first = self._loaders[0]
        self.pattern, self.paths, self.num_tokens, self.num_batches = pattern, first.paths, first.num_tokens, first.num_batches

    @property
    def last_place(self) -> Place:
        """Where the first rank's last batch begins."""
        return self._loaders[0].last_place

    def reset(self) -> None:
        for loader in self._loaders:
            loader.reset()

    def next_batch(self) -> tuple[np.ndarray, np.ndarray]:
        x, y = zip(*(loader.next_batch() for loader in self._loaders), strict=True)
        return (x[0], y[0]) if len(x) == 1 else (np.concatenate(x), np.concatenate(y))

    def skip(self, num_batches: int) -> None:
        for loader in self._loaders:
            loader.skip(num_batches)

    def states(self) -> list[LoaderState]:
        """The position of each rank's loader."""
        return [loader.state() for loader in self._loaders]

    def restore(self, states: Sequence[LoaderState]) -> None:
        """Continue where the loaders that saved these states, those of all ranks, stood."""
        for rank, loader in zip(self.ranks, self._loaders, strict=True):
            loader.restore(states[rank])
