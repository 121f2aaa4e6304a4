"""Validation loss, the loss of knowing nothing but word frequencies to hold against it, HellaSwag, texts, and last words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import numpy as np

from gpt2_jax.errors import Gpt2JaxError
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


@dataclass(frozen=True)
class TextLoss:
    """How well a model foretells a text."""

    total: float  # cross-entropy of all tokens together, in nats
    num_tokens: int  # that were foretold: all but the first
    num_bytes: int  # of their text; an end-of-text token has none

    def __add__(self, other: TextLoss) -> TextLoss:
        """Of two texts together."""
        parts = (self.total + other.total, self.num_tokens + other.num_tokens, self.num_bytes + other.num_bytes)
        return TextLoss(*parts)

    @property
    def loss(self) -> float:
        """Mean cross-entropy of a token, in nats."""
        return self.total / self.num_tokens

    @property
    def perplexity(self) -> float:
        """e to the loss: infinite where a float holds no such number."""
        return math.exp(self.loss) if self.loss < 709 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Of models with different vocabularies the comparable number. nan for a text without bytes."""
        return self.total / math.log(2) / self.num_bytes if self.num_bytes else math.nan


def num_windows(num_tokens: int, length: int, stride: int) -> int:
    """How many windows `text_loss` lays over a text."""
    return 1 + max(0, -(-(num_tokens - 1 - length) // stride))


def text_loss(
    token_loss_function: LossFunction,
    params_N: jax.Array,
    tokens: np.ndarray,
    bytes_of_token: np.ndarray,
    *,
    length: int,
    stride: int,
    batch_size: int,
    before_batch: Callable[[], None] = lambda: None,
) -> TextLoss:
    """The loss of a text of at least two tokens (num_tokens,), in windows of `length` tokens that begin `stride` tokens after
    one another. Each token but the first is foretold once: by the first window that has it, so that behind the first window
    each token is foretold from at least `length` - `stride` others.

    `bytes_of_token` (vocabulary,) tells a token's bytes. Gpt2JaxError for fewer tokens, for an id that is not in the
    vocabulary, and for a loss that is not finite.
    """
    windows, num_tokens = num_windows(len(tokens), length, stride), len(tokens)
    if num_tokens < 2:
        raise Gpt2JaxError(f"text: expected at least 2 tokens, found {num_tokens}")
    total, num_bytes = 0.0, 0
    for first in range(0, windows, batch_size):
        before_batch()
        x_BT = np.zeros((batch_size, length), dtype=np.int32)
        y_BT = np.zeros_like(x_BT)
        is_scored_BT = np.zeros(x_BT.shape, dtype=bool)
        for row, window in enumerate(range(first, min(first + batch_size, windows))):
            part = np.asarray(tokens[window * stride : window * stride + length + 1]).astype(np.int32)
            if part.max() >= bytes_of_token.size:
                raise Gpt2JaxError(f"text: expected token ids below {bytes_of_token.size}, found {part.max()}")
            x_BT[row, : part.size - 1], y_BT[row, : part.size - 1] = part[:-1], part[1:]
            is_scored_BT[row, (length - stride if window else 0) : part.size - 1] = True
        losses_BT = np.asarray(token_loss_function(params_N, x_BT, y_BT))
        total += losses_BT[is_scored_BT].sum(dtype=np.float64)
        num_bytes += int(bytes_of_token[y_BT[is_scored_BT]].sum())
    if not math.isfinite(total):
        raise Gpt2JaxError(f"model: expected a finite loss, found {total}: its weights are damaged, or its training diverged")
    return TextLoss(float(total), num_tokens - 1, num_bytes)


class LastWord(NamedTuple):
    """A passage, token ids uint16, whose last word is to be foretold."""

    context: np.ndarray
    word: np.ndarray


@dataclass(frozen=True)
class LastWords:
    """How well a model foretells last words."""

    num_right: int  # words of which each token is the likeliest after those before
    num_words: int
    loss: float  # mean over words of the sum of their tokens' cross-entropies, in nats

    @property
    def accuracy(self) -> float:
        return self.num_right / self.num_words

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 709 else math.inf


# (params, x (B, T), positions (B, K), targets (B, K)) -> losses (B, K), whether the target is the likeliest (B, K)
ScoreFunction = Callable[[jax.Array, np.ndarray, np.ndarray, np.ndarray], tuple[jax.Array, jax.Array]]


def last_words(
    score_function: ScoreFunction,
    params_N: jax.Array,
    passages: Sequence[LastWord],
    batch_size: int,
    *,
    longest: int,
    before_batch: Callable[[], None] = lambda: None,
) -> LastWords:
    """Score the last word of each passage, of which the model sees the last `longest` tokens, as lm-evaluation-harness does.

    Gpt2JaxError for a loss that is not finite; each word must have at most `longest` tokens.
    """
    width = min(longest, max(part.context.size + part.word.size for part in passages) - 1)
    most = max(part.word.size for part in passages)
    right, total = 0, 0.0
    for start in range(0, len(passages), batch_size):
        before_batch()
        batch = passages[start : start + batch_size]
        x_BT = np.zeros((batch_size, width), dtype=np.int32)
        positions_BK, targets_BK = np.zeros((batch_size, most), np.int32), np.zeros((batch_size, most), np.int32)
        is_word_BK = np.zeros((batch_size, most), dtype=bool)
        for row, (context, word) in enumerate(batch):
            seen = np.concatenate([context, word])[:-1][-width:]
            x_BT[row, : seen.size] = seen
            positions_BK[row, : word.size] = np.arange(seen.size - word.size, seen.size)
            targets_BK[row, : word.size], is_word_BK[row, : word.size] = word, True
        losses_BK, hits_BK = score_function(params_N, x_BT, positions_BK, targets_BK)
        total += np.asarray(losses_BK)[is_word_BK].sum(dtype=np.float64)
        right += int((np.asarray(hits_BK) | ~is_word_BK)[: len(batch)].all(axis=1).sum())
    if not math.isfinite(total):
        raise Gpt2JaxError(f"model: expected a finite loss, found {total}: its weights are damaged, or its training diverged")
    return LastWords(right, len(passages), total / len(passages))
