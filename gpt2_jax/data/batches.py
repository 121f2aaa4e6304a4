"""What a run reads: training and validation batches, and multiple-choice questions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc.eval_file import MultipleChoice, check_questions, read_eval_file
from gpt2_jax.llmc.loader import Place, TokenLoader


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
    train: str,
    validation: str,
    hellaswag: str,
    *,
    batch_size: int,
    sequence_length: int,
    num_micro_batches: int,
    vocab_size: int,
    max_sequence_length: int,
    shuffle: bool,
    overfits_one_batch: bool,
    validates: bool,
) -> RunData:
    """Open what a run with these settings reads; Gpt2JaxError for files that are not there or do not fit the model."""
    if sequence_length > max_sequence_length:
        raise Gpt2JaxError(
            f"--sequence-length: expected at most the model's {max_sequence_length}, found {sequence_length}",
            f"--sequence-length {max_sequence_length}",
        )
    sizes = (batch_size, sequence_length)
    train_paths = validation if overfits_one_batch else train
    train_loader = TokenLoader(train_paths, *sizes, vocab_size=vocab_size, shuffle=shuffle and not overfits_one_batch)
    validation_loader = TokenLoader(validation, *sizes, vocab_size=vocab_size) if validates else None
    questions = read_eval_file(hellaswag) if hellaswag else []
    if questions:
        check_questions(questions, hellaswag, vocab_size=vocab_size, sequence_length=sequence_length)
    return RunData(train_loader, validation_loader, questions, num_micro_batches, overfits_one_batch)
