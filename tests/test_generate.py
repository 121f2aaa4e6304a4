"""Choosing tokens as llm.c does, and text from a model."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_jax.compute.decode import empty_cache, extend
from gpt2_jax.compute.forward import all_logits
from gpt2_jax.data.chunks import CutRuns
from gpt2_jax.data.prepare import Limits, prepare
from gpt2_jax.data.sources import open_source
from gpt2_jax.data.tokenizer import gpt2_tokenizer, num_sampled_ids
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.generate import complete, generate, prompt_tokens, sample
from gpt2_jax.llmc.random import XorShift
from gpt2_jax.llmc.token_shard import open_token_shard
from gpt2_jax.models.initialize import initialize_parameters
from tests.conftest import TINY, plan_of


def llmc_sample_softmax(logits, coin):
    """llm.c llmc/sampler.h, one element at a time: the total in double, the running sum in float."""
    weights = np.exp(logits)
    total = 0.0
    for weight in weights:
        total += float(weight)
    coin = np.float32(coin * total)
    running = np.float32(0)
    for index, weight in enumerate(weights):
        running = np.float32(running + weight)
        if coin < running:
            return index
    return len(logits) - 1


@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 300), coin=st.floats(0, 1, exclude_max=True, width=32))
def test_sampling_is_llmcs(seed, size, coin):
    logits = np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)
    assert sample(logits, np.float32(coin)) == llmc_sample_softmax(logits, np.float32(coin))


@given(seed=st.integers(0, 100), top_k=st.integers(1, 12), coin=st.floats(0, 1, exclude_max=True, width=32))
def test_top_k_never_leaves_the_k_largest(seed, top_k, coin):
    logits = np.random.default_rng(seed).normal(size=10).astype(np.float32)
    assert sample(logits, np.float32(coin), top_k=top_k) in np.argsort(logits)[-top_k:]


COINS = np.linspace(0, 1, 200, endpoint=False, dtype=np.float32)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_p": 0.55}, {0, 2}),
        ({"top_p": 0.3}, {2}),
        ({"top_p": 1e-9}, {2}),
        ({"top_p": 1.0}, {0, 1, 2, 3}),
        ({"min_p": 0.4}, {0, 2, 3}),
        ({"min_p": 1.0}, {2}),
        ({"min_p": 0.4, "top_k": 2}, {0, 2}),
    ],
    ids=str,
)
def test_unlikely_tokens_are_left_out(options, expected):
    logits = np.log(np.array([0.3, 0.1, 0.4, 0.2], np.float32))
    assert {sample(logits, coin, **options) for coin in COINS} == expected


def test_temperature_zero_is_the_likeliest_and_low_temperature_nearly():
    logits = np.array([0.0, 3.0, 1.0, 2.9], np.float32)
    assert sample(logits, np.float32(0.99), temperature=0) == 1
    assert sample(logits, np.float32(0.99), temperature=0.01) == 1
    assert sample(logits, np.float32(0.99), temperature=100) == 3


def test_huge_logits_do_not_overflow():
    assert sample(np.array([0.0, 1000.0, 999.0], np.float32), np.float32(0.5)) == 1


def test_generation_takes_each_next_token_from_the_whole_text(tiny_params):
    """Against full forward passes without padding; the text grows past the model's 16 positions."""
    prompt = list(range(14))
    found = list(generate(plan_of(), jnp.asarray(tiny_params), prompt, 8, seed=11))
    logits_of = jax.jit(lambda x: all_logits(plan_of(), jnp.asarray(tiny_params), x))
    tokens, coins = list(prompt), XorShift(11)
    for _ in range(8):
        logits = logits_of(np.array([tokens[-TINY.max_sequence_length :]], np.int32))[0, -1]
        tokens.append(sample(np.asarray(logits), coins.uniform()))
    assert found == tokens[14:]
    assert len(set(found)) > 4


@pytest.mark.parametrize("temperature", [0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("prompt_length", [1, 64, 70])
def test_the_cache_changes_no_token(prompt_length, dtype, temperature):
    """Prompts of one token, of a whole compiled length, and of one that is padded; the text outgrows the 128 positions."""
    config = dataclasses.replace(TINY, max_sequence_length=128)
    # Large weights: the likeliest token depends on the whole text, and two logits are seldom within rounding of each other.
    params = jnp.asarray(initialize_parameters(config) * np.float32(8))
    prompt = np.random.default_rng(5).integers(0, 203, prompt_length).tolist()
    cached, full = (
        list(generate(plan_of(config, dtype=dtype), params, prompt, 140, temperature=temperature, seed=3, cached=on))
        for on in (True, False)
    )
    assert cached == full
    assert len(set(cached)) > 4


def test_a_backend_without_the_cache_says_so_and_never_compiles_it(english_model, monkeypatch):
    plan, params = english_model
    from gpt2_jax import generate as module

    monkeypatch.setattr(module, "extend", lambda *arguments: pytest.fail("compiled the cache's program"))
    without = dataclasses.replace(plan, backend=dataclasses.replace(plan.backend, lacks=plan.backend.lacks | {"decode_cache"}))
    said = []
    assert "".join(complete(without, params, gpt2_tokenizer(), "In", max_tokens=2, say=said.append))
    assert said == ["generating: without a cache, which is not checked on cpu; every token costs a full forward pass"]


def test_the_cache_gives_the_full_passes_logits(tiny_params):
    plan, params = plan_of(), jnp.asarray(tiny_params)
    x = np.random.default_rng(1).integers(0, 203, (2, 12)).astype(np.int32)
    expected = np.asarray(jax.jit(lambda x: all_logits(plan, params, x))(x))
    found, cache = extend(plan, params, empty_cache(plan, 2, 16), x[:, :8], np.int32(0), np.int32(5))
    np.testing.assert_allclose(found, expected[:, 5], rtol=0, atol=32 * np.finfo(np.float32).eps * np.abs(expected).max())
    for position in range(6, 12):  # what stood at 6 and 7 is overwritten
        found, cache = extend(plan, params, cache, x[:, position : position + 1], np.int32(position), np.int32(0))
        tolerance = 32 * np.finfo(np.float32).eps * np.abs(expected).max()
        np.testing.assert_allclose(found, expected[:, position], rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def english_model():
    config = GPT2Config(max_sequence_length=16, vocab_size=50257, num_layers=1, num_heads=1, channels=8)
    return plan_of(config), initialize_parameters(config)


def test_text_streams_and_is_repeatable(english_model):
    texts = ["".join(complete(*english_model, gpt2_tokenizer(), "In the", max_tokens=12, seed=3)) for _ in range(2)]
    assert texts[0] == texts[1]
    assert len(texts[0]) > 12
    assert "".join(complete(*english_model, gpt2_tokenizer(), "In the", max_tokens=12, seed=4)) != texts[0]


def test_the_end_of_the_document_stops(english_model, monkeypatch):
    plan, params = english_model
    from gpt2_jax import generate as module

    choices = iter([15496, 50256, 995])
    monkeypatch.setattr(module, "sample", lambda *arguments, **options: next(choices))
    assert "".join(complete(plan, params, gpt2_tokenizer(), "", max_tokens=3)) == "Hello"


def test_a_character_of_several_tokens_appears_whole(english_model, monkeypatch):
    plan, params = english_model
    from gpt2_jax import generate as module

    ids = gpt2_tokenizer().encode_ordinary("ᵀ")
    assert len(ids) > 1
    choices = iter(ids)
    monkeypatch.setattr(module, "sample", lambda *arguments, **options: next(choices))
    pieces = list(complete(plan, params, gpt2_tokenizer(), "", max_tokens=len(ids)))
    assert "".join(pieces) == "ᵀ"
    assert "\ufffd" not in "".join(pieces)


def test_the_tokenizer_of_a_larger_vocabulary_is_refused_before_any_text(tiny_params):
    with pytest.raises(Gpt2JaxError, match="expected at most the model's 203 tokens, found 50257"):
        complete(plan_of(), tiny_params, gpt2_tokenizer(), "", max_tokens=1)


@pytest.mark.parametrize(("prompt", "found"), [([5, 203], "203"), ([-1], "-1"), ([50256], "50256"), ([], "none")])
def test_a_prompt_of_ids_that_the_model_lacks_is_refused(tiny_params, prompt, found):
    """Out of range a gather takes another row, and says nothing."""
    with pytest.raises(Gpt2JaxError, match=f"at least one token id, all below the model's 203, found {found}$"):
        list(generate(plan_of(), jnp.asarray(tiny_params), prompt, 1))


@pytest.mark.parametrize(
    ("vocab_size", "expected"),
    [(50257, 50257), (50258, 50258), (50259, 50259), (50264, 50264), (50304, 50257), (50368, 50257), (51200, 50257)],
)
def test_padding_is_told_from_added_tokens(vocab_size, expected):
    assert num_sampled_ids(gpt2_tokenizer(), vocab_size) == expected


def model_that_prefers(vocab_size, logits):
    """A model whose logits are always these, and 0 for all other ids."""
    config = GPT2Config(max_sequence_length=16, vocab_size=vocab_size, num_layers=1, num_heads=1, channels=8)
    params = np.zeros(config.layout.num_parameters, np.float32)
    views = config.layout.views(params)
    views["lnfb"][0] = 1
    for token, logit in logits.items():
        views["wte"][token, 0] = logit
    return plan_of(config), params


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"temperature": 0.8, "top_k": 2}], ids=str)
def test_padding_of_the_vocabulary_is_never_chosen(options):
    plan, params = model_that_prefers(50304, {50257: 70, 50303: 75, 995: 60})
    said = []
    pieces = complete(plan, params, gpt2_tokenizer(), "Hello", max_tokens=3, say=said.append, **options)
    assert "".join(pieces) == " world" * 3
    assert said == ["vocabulary: the model's ids from 50257 to 50303 are taken for padding and never chosen"]


def test_added_tokens_are_shown_as_such():
    plan, params = model_that_prefers(50258, {50257: 70, 995: 50})
    said = []
    assert "".join(complete(plan, params, gpt2_tokenizer(), "Hello", max_tokens=2, say=said.append)) == "<|50257|><|50257|>"
    assert said == ["vocabulary: the model's ids from 50257 to 50257 are no tokens of the tokenizer, and shown as <|50257|>"]


def test_nothing_is_said_of_gpt2s_own_vocabulary():
    plan, params = model_that_prefers(50257, {995: 50})
    assert "".join(complete(plan, params, gpt2_tokenizer(), "", max_tokens=1, say=pytest.fail)) == " world"


def test_a_prompt_begins_a_document():
    assert prompt_tokens("Hello world", gpt2_tokenizer()) == [50256, 15496, 995]


def test_a_prompt_of_a_million_spaces_is_tokens(capsys):
    """tiktoken itself ends the process for it."""
    text = "Hello" + " " * 1_000_000 + "world"
    tokenizer = gpt2_tokenizer()
    first, *rest = prompt_tokens(text, tokenizer)
    assert first == tokenizer.eot_token
    assert tokenizer.decode(rest) == text


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("", [50256]),
        ("<|endoftext|>", [50256]),
        ("<|endoftext|>Hello world", [50256, 15496, 995]),
        ("Hello<|endoftext|>", [50256, 15496, 50256]),
        ("Hello<|endoftext|> world", [50256, 15496, 50256, 995]),
        ("Hello<|endoftext|>\n<|endoftext|><|endoftext|> world", [50256, 15496, 50256, 995]),
    ],
)
def test_the_mark_of_a_documents_end_is_one_token(prompt, ids):
    assert prompt_tokens(prompt, gpt2_tokenizer()) == ids


# No byte-order mark, which is no part of a file's text, and no zero byte, which is refused there.
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x00\ufeff\r"), min_size=1, max_size=8)


@given(documents=st.lists(TEXTS | st.sampled_from(["", " ", "<|endoftext", "|>"]), max_size=4), last=TEXTS)
def test_a_prompt_has_the_tokens_of_a_corpus(tmp_path_factory, documents, last):
    text = "<|endoftext|>".join([*documents, f"{last}."])
    path = tmp_path_factory.getbasetemp() / "book.txt"
    path.write_bytes(f"{text}<|endoftext|>{'more ' * 50}".encode())
    ids = prompt_tokens(text, gpt2_tokenizer())
    train_path, _ = prepare(open_source(str(path), "text"), path.parent, Limits(0.1), cuts=CutRuns())
    assert open_token_shard(train_path)[: len(ids)].tolist() == ids


@pytest.mark.parametrize("temperature", [1e-3, 1e-38, 5e-324, 1e-300])
def test_every_low_temperature_is_nearly_greedy(temperature):
    logits = np.array([-3e38, 3.0, 1.0, 3e4, 2.9e4], np.float32)
    assert sample(logits, np.float32(0.999), temperature=temperature) == 3


@pytest.mark.parametrize("temperature", [1e10, 1e308])
def test_every_high_temperature_is_nearly_even(temperature):
    logits = np.array([0.0, 3.0, 1.0, 2.9], np.float32)
    chosen = [sample(logits, np.float32(coin), temperature=temperature) for coin in (0.1, 0.3, 0.6, 0.9)]
    assert chosen == [0, 1, 2, 3]


def test_top_k_of_zero_or_of_more_than_all_is_all():
    logits = np.zeros(4, np.float32)
    for top_k in (0, 4, 5, 10**9):
        assert [sample(logits, np.float32(coin), top_k=top_k) for coin in (0.1, 0.3, 0.6, 0.9)] == [0, 1, 2, 3]
