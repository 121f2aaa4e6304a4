"""The data of a run: training and validation batches, and multiple-choice questions.

Validation data are of the training data's kind: named by the user, or the shards beside the training shards. Another text
is never taken for them.
"""

from __future__ import annotations

import filecmp
import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gpt2_jax.data.ranks import RankLoaders
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc.eval_file import MultipleChoice, check_questions, read_eval_file
from gpt2_jax.llmc.loader import Place

if TYPE_CHECKING:
    from gpt2_jax.config import DataSettings, RunConfig
    from gpt2_jax.families.family import FamilyConfig


class Batch(NamedTuple):
    """The micro-batches of one step, those of this process's ranks, and where its first rank's begin."""

    x_ABT: np.ndarray  # int32, of D devices of this process (A, D * B, T)
    y_ABT: np.ndarray  # int32
    places: list[Place]


@dataclass(frozen=True)
class RunData:
    """Everything that a run reads."""

    train: RankLoaders
    validation: RankLoaders | None  # None: the run does not validate
    questions: list[MultipleChoice]
    num_micro_batches: int
    overfits_one_batch: bool

    @property
    def trained_validation_paths(self) -> list[str]:
        """Validation shards that are trained on too: the same file, or one with the same bytes."""
        if self.validation is None or self.overfits_one_batch:
            return []
        return [path for path in self.validation.paths if any(_same_bytes(path, other) for other in self.train.paths)]

    def next_batch(self) -> Batch:
        """The micro-batches of the next step; the same in every step when one batch is to be overfitted."""
        if self.overfits_one_batch:
            self.train.reset()
        batches, places = [], []
        for _ in range(self.num_micro_batches):
            batches.append(self.train.next_batch())
            places.append(self.train.last_place)
        return Batch(np.stack([x for x, _ in batches]), np.stack([y for _, y in batches]), places)


def open_data(config: RunConfig, model: FamilyConfig, ranks: range | None = None) -> RunData:
    """Open what a run with these settings reads, `ranks` being this process's (None: all are); Gpt2JaxError for files that are
    not there or do not fit the model."""
    settings, hellaswag = config.data, config.evaluation.hellaswag
    T, validates, overfits = settings.sequence_length, config.evaluation.validate_every > 0, settings.overfit_one_batch
    if model.max_sequence_length < T:
        raise Gpt2JaxError(
            f"--sequence-length: expected at most the model's {model.max_sequence_length}, found {T}",
            f"--sequence-length {model.max_sequence_length}",
        )

    def loader(paths: str, *, shuffle: bool = False) -> RankLoaders:
        B, D, seed = settings.batch_size, config.num_devices, config.run.seed
        return RankLoaders(paths, B, T, num_ranks=D, ranks=ranks, vocab_size=model.vocab_size, shuffle=shuffle, seed=seed)

    # The training shards first: where nothing has been prepared, their error names the command that does.
    train = loader(validation_pattern(settings)) if overfits else loader(settings.train, shuffle=settings.shuffle)
    validation = loader(validation_pattern(settings)) if validates else None
    questions = read_eval_file(hellaswag) if hellaswag else []
    if questions:
        check_questions(questions, hellaswag, vocab_size=model.vocab_size, sequence_length=T)
    return RunData(train, validation, questions, config.num_micro_batches, overfits)


def validation_pattern(settings: DataSettings) -> str:
    """The path or glob of the validation shards: as set, or that of the shards beside the training shards, in whose path
    val, valid or validation stands for train (or at the end of the name). Gpt2JaxError where there are none."""
    if settings.validation:
        return settings.validation
    candidates = _beside(settings.train)
    for pattern in candidates:
        if os.path.lexists(pattern) or glob.glob(pattern):
            return pattern
    raise Gpt2JaxError(
        f"--validation: expected validation shards beside --train {settings.train}, found no {' or '.join(candidates)}",
        "--validation FILE, or --validate-every 0 to train without validation",
    )


def _beside(train: str) -> list[str]:
    """The names that validation shards of these training shards may have, the likeliest first."""
    path, names = Path(train), []
    if words := list(re.finditer(r"(?<![A-Za-z])train(ing)?(?![A-Za-z])", train)):
        last = words[-1]
        names = [train[: last.start()] + name + train[last.end() :] for name in ("val", "valid", "validation")]
    return [*names, str(path.with_name(f"{path.stem}_val{path.suffix}"))] if path.name else names


def _same_bytes(path: str, other: str) -> bool:
    return os.path.samefile(path, other) or filecmp.cmp(path, other, shallow=False)
