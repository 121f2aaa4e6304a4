"""Validation loss over batches, and the unigram cross-entropy that it is held against."""

from __future__ import annotations

import math
import tracemalloc
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.compute.forward import make_loss_function, make_token_loss_function, target_scores
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.evaluate import (
    LastWord,
    TextLoss,
    last_words,
    num_right_answers,
    num_windows,
    text_loss,
    unigram_cross_entropy,
    validation_loss,
)
from gpt2_jax.interop.pytorch import make_pytorch_model
from gpt2_jax.llmc.eval_file import MultipleChoice, check_questions
from gpt2_jax.llmc.loader import TokenLoader
from gpt2_jax.llmc.token_shard import open_token_shard, write_token_shard
from tests.conftest import TINY, plan_of


@pytest.mark.parametrize("num_batches", [3, 9])
def test_validation_is_the_mean_over_the_first_batches(tiny_params, tiny_shards, num_batches):
    loader = TokenLoader(tiny_shards[1], 2, 16, vocab_size=TINY.vocab_size)
    loader.next_batch()  # validation starts over
    params = jnp.asarray(tiny_params)
    loss_function = make_loss_function(plan_of())
    loss = validation_loss(loss_function, params, loader, num_batches)
    tokens = np.asarray(open_token_shard(tiny_shards[1])).astype(np.int32)[: num_batches * 32 + 1]
    x, y = tokens[:-1].reshape(-1, 16), tokens[1:].reshape(-1, 16)
    assert abs(loss - float(loss_function(params, x, y))) < 1e-5


def test_unigram_cross_entropy_by_hand(tmp_path):
    train, validation = str(tmp_path / "train.bin"), str(tmp_path / "val.bin")
    write_token_shard(train, np.array([0, 0, 0, 1]))
    write_token_shard(validation, np.array([0, 2]))
    # Add-one counts of a vocabulary of 3: 4, 2, 1 of 7.
    assert unigram_cross_entropy([train], [validation], 3) == pytest.approx(-(math.log(4 / 7) + math.log(1 / 7)) / 2)


def test_unigram_counts_all_shards(tmp_path):
    paths = [str(tmp_path / f"{i}.bin") for i in range(2)]
    write_token_shard(paths[0], np.array([0, 0]))
    write_token_shard(paths[1], np.array([1]))
    expected = -(2 * math.log(3 / 5) + math.log(2 / 5)) / 3
    assert unigram_cross_entropy(paths, paths, 2) == pytest.approx(expected)


def test_unigram_counts_many_tokens_in_little_memory(tmp_path):
    """6 million tokens are 12 MB, mapped; as 8-byte integers they would be 48 MB."""
    path = str(tmp_path / "train.bin")
    tokens = np.random.default_rng(3).integers(0, 203, 6_000_001).astype(np.uint16)
    write_token_shard(path, tokens)
    counts = np.bincount(tokens, minlength=203)
    expected = -float((counts * np.log((counts + 1) / (counts + 1).sum())).sum() / counts.sum())
    tracemalloc.start()
    try:
        found = unigram_cross_entropy([path], [path], 203)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    assert found == expected


def test_validation_goes_on_from_the_first_batch_at_the_end_of_the_data(tiny_params, tiny_shards):
    """As llm.c's does, which takes as many batches as it is told to."""
    loader = TokenLoader(tiny_shards[1], 2, 16, vocab_size=TINY.vocab_size)
    params, loss_function = jnp.asarray(tiny_params), make_loss_function(plan_of())
    once, twice = (validation_loss(loss_function, params, loader, batches) for batches in (9, 18))
    assert once == pytest.approx(twice, rel=1e-12)


def test_losses_of_tokens_have_the_batchs_loss_as_their_mean(tiny_params, tiny_batch):
    x, y = map(jnp.asarray, tiny_batch)
    losses = make_token_loss_function(plan_of())(jnp.asarray(tiny_params), x, y)
    loss = make_loss_function(plan_of())(jnp.asarray(tiny_params), x, y)
    assert losses.shape == x.shape
    assert float(losses.mean()) == pytest.approx(float(loss), rel=1e-6)


def choices(count: int) -> list[MultipleChoice]:
    random = np.random.default_rng(7)
    rows = [
        [random.integers(0, TINY.vocab_size, size).astype(np.uint16) for size in random.integers(1, 5, 5)] for _ in range(count)
    ]
    return [MultipleChoice(int(random.integers(4)), row[0], tuple(row[1:])) for row in rows]


def right_by_hand(token_loss_function, params, question: MultipleChoice, T: int) -> bool:
    """One row a completion, as long as llm.c's, losses added up one after the other."""
    x_BT, y_BT, masks = np.full((4, T), 5, np.int32), np.full((4, T), 6, np.int32), []
    for row, completion in enumerate(question.completions):
        context, size = question.context.size, completion.size
        x_BT[row, :context] = question.context
        x_BT[row, context : context + size] = completion
        y_BT[row, context - 1 : context - 1 + size] = completion
        masks.append(range(context - 1, context - 1 + size))
    losses_BT = np.asarray(token_loss_function(params, jnp.asarray(x_BT), jnp.asarray(y_BT)))
    best, best_row = np.float32(0), -1
    for row, mask in enumerate(masks):
        average = np.float32(0)
        for t in mask:
            average += losses_BT[row, t]
        average /= np.float32(len(mask))
        if row == 0 or average < best:
            best, best_row = average, row
    return best_row == question.label


@pytest.mark.parametrize("batch_size", [1, 4, 9, 64])
def test_answers_are_llmcs(tiny_params, batch_size):
    questions = choices(21)
    token_loss_function = make_token_loss_function(plan_of())
    params = jnp.asarray(tiny_params)
    right = [right_by_hand(token_loss_function, params, question, 16) for question in questions]
    assert 0 < sum(right) < 21
    assert num_right_answers(token_loss_function, params, questions, batch_size) == sum(right)


def test_the_first_of_equal_completions_is_taken(tiny_params):
    part = np.array([3, 4], np.uint16)
    questions = [MultipleChoice(label, part, (part, part, part, part)) for label in range(4)]
    token_loss_function = make_token_loss_function(plan_of())
    assert num_right_answers(token_loss_function, jnp.asarray(tiny_params), questions, 16) == 1


def test_questions_that_do_not_fit_the_model_are_refused():
    questions = choices(5)
    longest = max(question.longest for question in questions)
    check_questions(questions, "h.bin", vocab_size=203, sequence_length=longest + 1)
    with pytest.raises(Gpt2JaxError, match=rf"h.bin: expected questions below {longest} tokens"):
        check_questions(questions, "h.bin", vocab_size=203, sequence_length=longest)
    with pytest.raises(Gpt2JaxError, match="token ids below 100, found"):
        check_questions(questions, "h.bin", vocab_size=100, sequence_length=longest + 1)


def brute_force(model, tokens, length, stride):
    """transformers' own way to a strided loss (its guide on perplexity), one window after another."""
    import torch

    total, scored = 0.0, 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + length, len(tokens) - 1)
        new = end - scored
        x, y = torch.from_numpy(tokens[begin:end])[None], torch.from_numpy(tokens[begin + 1 : end + 1])
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(model(x).logits[0], y, reduction="none")
        total += float(losses[-new:].double().sum())
        scored = end
        if end == len(tokens) - 1:
            return total
    raise AssertionError


@pytest.mark.torch
@pytest.mark.parametrize("num_tokens", [2, 9, 17, 40])
@pytest.mark.parametrize(("length", "stride"), [(16, 16), (16, 5), (7, 1)])
def test_the_loss_of_a_text_is_transformers(tiny_params, num_tokens, length, stride):
    tokens = np.random.default_rng(num_tokens).integers(0, 203, num_tokens)
    sizes = np.arange(203)
    seen = []
    found = text_loss(
        make_token_loss_function(plan_of()),
        jnp.asarray(tiny_params),
        tokens,
        sizes,
        length=length,
        stride=stride,
        batch_size=3,
        before_batch=lambda: seen.append(1),
    )
    expected = brute_force(make_pytorch_model(TINY, tiny_params), tokens, length, stride)
    # So many roundings of float32 for a cross-entropy of some units.
    assert found.total == pytest.approx(expected, rel=64 * 2.0**-24)
    assert (found.num_tokens, found.num_bytes) == (num_tokens - 1, tokens[1:].sum())
    assert len(seen) == -(-num_windows(num_tokens, length, stride) // 3)


def test_what_a_texts_loss_means():
    loss = TextLoss(10 * math.log(2), 5, 20) + TextLoss(2 * math.log(2), 1, 4)
    assert loss.loss == pytest.approx(2 * math.log(2))
    assert loss.perplexity == pytest.approx(4)
    assert loss.bits_per_byte == pytest.approx(0.5)
    assert TextLoss(1e6, 1, 1).perplexity == math.inf
    assert math.isnan(TextLoss(1.0, 1, 0).bits_per_byte)


def test_texts_that_have_no_loss_are_refused(tiny_params):
    loss = partial(
        text_loss, make_token_loss_function(plan_of()), bytes_of_token=np.ones(203), length=16, stride=16, batch_size=1
    )
    with pytest.raises(Gpt2JaxError, match="expected at least 2 tokens, found 1"):
        loss(jnp.asarray(tiny_params), np.array([1]))
    with pytest.raises(Gpt2JaxError, match="expected token ids below 203, found 203"):
        loss(jnp.asarray(tiny_params), np.array([1, 203]))
    with pytest.raises(Gpt2JaxError, match="expected a finite loss, found nan"):
        loss(jnp.asarray(tiny_params * np.nan), np.array([1, 2]))


@pytest.mark.torch
def test_last_words_are_scored_as_by_transformers(tiny_params):
    """One passage is longer than the model, and loses its beginning; some last words are the likeliest."""
    import torch

    model = make_pytorch_model(TINY, tiny_params)

    def likeliest(context, count):
        for _ in range(count):
            with torch.no_grad():
                scores = model(torch.tensor([context[-16:]])).logits[0, -1, :203]
            context = [*context, int(scores.argmax())]
        return context[-count:]

    draw = np.random.default_rng(0).integers(0, 203, 100).tolist()
    pairs = [(draw[:5], draw[5:7]), (draw[:30], draw[30:31]), (draw[10:13], [203 - 1] * 3)]
    pairs += [(draw[:number], likeliest(draw[:number], 1 + number % 3)) for number in (1, 4, 9)]
    passages = [LastWord(*(np.array(part, np.uint16) for part in pair)) for pair in pairs]
    found = last_words(partial(target_scores, plan_of()), jnp.asarray(tiny_params), passages, 4, longest=16)
    total, right = 0.0, 0
    for context, word in pairs:
        seen = torch.tensor([[*context, *word][:-1][-16:]])
        with torch.no_grad():
            logits = model(seen).logits[0, -len(word) :, :203].double()
        total -= float(torch.log_softmax(logits, -1)[range(len(word)), word].sum())
        right += logits.argmax(-1).tolist() == word
    assert (found.num_right, found.num_words) == (right, len(pairs))
    assert right >= 3
    assert found.loss == pytest.approx(total / len(pairs), rel=64 * 2.0**-24)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
