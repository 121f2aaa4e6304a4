"""The data of a run: training and validation batches, and multiple-choice questions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc.eval_file import MultipleChoice, check_questions, read_eval_file
from gpt2_jax.llmc.loader import Place, TokenLoader

if TYPE_CHECKING:
    from gpt2_jax.config import DataSettings
    from gpt2_jax.families.family import FamilyConfig


class Batch(NamedTuple):
    """The micro-batches of one step, and where each begins."""

    x_ABT: np.ndarray  # int32
    y_ABT: np.ndarray  # int32
    places: list[Place]


@dataclass(frozen=True)
class RunData:
    """Everything that a run reads."""

    train: TokenLoader
    validation: TokenLoader | None  # None: the run does not validate
    questions: list[MultipleChoice]
    num_micro_batches: int
    overfits_one_batch: bool

    def next_batch(self) -> Batch:
        """The micro-batches of the next step; the same in every step when one batch is to be overfitted."""
        if self.overfits_one_batch:
            self.train.reset()
        batches, places = [], []
        for _ in range(self.num_micro_batches):
            batches.append(self.train.next_batch())
            places.append(self.train.last_place)
        return Batch(np.stack([x for x, _ in batches]), np.stack([y for _, y in batches]), places)


def open_data(
    settings: DataSettings, model: FamilyConfig, *, hellaswag: str, num_micro_batches: int, validates: bool
) -> RunData:
    """Open what a run with these settings reads; Gpt2JaxError for files that are not there or do not fit the model."""
    T = settings.sequence_length
    if model.max_sequence_length < T:
        raise Gpt2JaxError(
            f"--sequence-length: expected at most the model's {model.max_sequence_length}, found {T}",
            f"--sequence-length {model.max_sequence_length}",
        )

    def loader(paths: str, *, shuffle: bool = False) -> TokenLoader:
        return TokenLoader(paths, settings.batch_size, T, vocab_size=model.vocab_size, shuffle=shuffle)

    overfits = settings.overfit_one_batch
    train = loader(settings.validation) if overfits else loader(settings.train, shuffle=settings.shuffle)
    validation = loader(settings.validation) if validates else None
    questions = read_eval_file(hellaswag) if hellaswag else []
    if questions:
        check_questions(questions, hellaswag, vocab_size=model.vocab_size, sequence_length=T)
    return RunData(train, validation, questions, num_micro_batches, overfits)
