"""Validation loss, the loss of knowing nothing but word frequencies to hold against it, and HellaSwag."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import numpy as np

from gpt2_jax.llmc.eval_file import NUM_COMPLETIONS, MultipleChoice
from gpt2_jax.llmc.token_shard import open_token_shard

LossFunction = Callable[[jax.Array, np.ndarray, np.ndarray], jax.Array]

_MAX_UNIGRAM_TOKENS = 100_000_000  # of each split: a second's work, also for shards of billions
_COUNTED_AT_ONCE = 1_000_000  # np.bincount makes a copy of 8 bytes a token


class Batches(Protocol):
    """What a loader of one rank or of several has."""

    def reset(self) -> None: ...

    def next_batch(self) -> tuple[np.ndarray, np.ndarray]: ...


def validation_loss(
    loss_function: LossFunction,
    params_N: jax.Array,
    loader: Batches,
    num_batches: int,
    *,
    before_batch: Callable[[], None] = lambda: None,
) -> float:
    """Mean loss over the first `num_batches` batches of a sequential loader, which starts over, and again at its end.

    `before_batch` is called before each; an exception of its own ends the validation.
    """
    loader.reset()
    losses: list[jax.Array] = []
    for _ in range(num_batches):
        before_batch()
        losses.append(loss_function(params_N, *loader.next_batch()))
        jax.block_until_ready(losses[-2:-1])  # at most two are under way, so that ending does not wait for all
    return float(np.mean([np.float64(loss) for loss in losses]))


def unigram_cross_entropy(train_paths: Sequence[str], validation_paths: Sequence[str], vocab_size: int) -> float:
    """Cross-entropy in nats of the validation tokens under the training tokens' add-one counts.

    A model with a lower loss has learned more than how frequent each token is. At most the first 100 million tokens
    of each split are counted.
    """

    def counts(paths: Sequence[str]) -> np.ndarray:
        total, left = np.zeros(vocab_size, dtype=np.int64), _MAX_UNIGRAM_TOKENS
        for path in paths:
            tokens = open_token_shard(path)[:left]
            for start in range(0, len(tokens), _COUNTED_AT_ONCE):
                # A token id beyond the vocabulary is the loader's to report.
                total += np.bincount(tokens[start : start + _COUNTED_AT_ONCE], minlength=vocab_size)[:vocab_size]
            left -= len(tokens)
        return total

    train, validation = counts(train_paths) + 1, counts(validation_paths)
    log_probability = np.log(train / train.sum())
    return float(-(validation * log_probability).sum() / validation.sum())


def num_batches_of(num_questions: int, batch_size: int, num_devices: int = 1) -> int:
    """How many batches `num_right_answers` scores so many questions in."""
    return -(-num_questions // (num_devices * max(1, batch_size // NUM_COMPLETIONS)))


def num_right_answers(
    token_loss_function: LossFunction,
    params_N: jax.Array,
    examples: Sequence[MultipleChoice],
    batch_size: int,
    *,
    num_devices: int = 1,
    before_batch: Callable[[], None] = lambda: None,
) -> int:
    """How many questions the model answers rightly, by llm.c's rule: of the four endings it takes the one whose tokens
    have the lowest mean loss after the context, in float32, the first of equals.

    As many questions as fit into `batch_size` rows, four each, but at least one, are scored by each device at a time;
    `before_batch` as in `validation_loss`.
    """
    at_a_time = num_devices * max(1, batch_size // NUM_COMPLETIONS)
    # Attention is causal, so padding behind a row's end changes nothing: rows are as long as the longest question.
    width = max(example.longest for example in examples) - 1
    right = 0
    for start in range(0, len(examples), at_a_time):
        before_batch()
        batch = examples[start : start + at_a_time]
        x_BT = np.zeros((at_a_time * NUM_COMPLETIONS, width), dtype=np.int32)
        y_BT = np.zeros_like(x_BT)
        rows = [np.concatenate([example.context, part]) for example in batch for part in example.completions]
        for row, tokens in enumerate(rows):
            x_BT[row, : tokens.size - 1], y_BT[row, : tokens.size - 1] = tokens[:-1], tokens[1:]
        losses_BT = np.asarray(token_loss_function(params_N, x_BT, y_BT))
        for number, example in enumerate(batch):
            first = example.context.size - 1
            losses = losses_BT[number * NUM_COMPLETIONS :]
            means = [
                # cumsum adds one after the other, as llm.c does; sum would add in pairs.
                np.cumsum(losses[i, first : first + part.size], dtype=np.float32)[-1] / np.float32(part.size)
                for i, part in enumerate(example.completions)
            ]
            right += int(np.argmin(means)) == example.label
    return right
