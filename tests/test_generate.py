"""Choosing tokens as llm.c does, and text from a model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_jax.compute.forward import all_logits
from gpt2_jax.data.tokenizer import gpt2_tokenizer
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.generate import complete, generate, prompt_tokens, sample
from gpt2_jax.llmc.random import XorShift
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


def test_another_models_tokenizer_is_refused(tiny_params):
    with pytest.raises(Gpt2JaxError, match="expected the model's 203 tokens, found 50257"):
        list(complete(plan_of(), tiny_params, gpt2_tokenizer(), "", max_tokens=1))


def test_a_prompt_begins_a_document():
    assert prompt_tokens("Hello world", gpt2_tokenizer()) == [50256, 15496, 995]


def test_a_prompt_of_a_million_spaces_is_tokens(capsys):
    """tiktoken itself ends the process for it."""
    text = "Hello" + " " * 1_000_000 + "world"
    tokenizer = gpt2_tokenizer()
    first, *rest = prompt_tokens(text, tokenizer)
    assert first == tokenizer.eot_token
    assert tokenizer.decode(rest) == text
