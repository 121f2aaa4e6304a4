"""Choosing tokens as llm.c does, and text from a model."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_jax.compute.decode import _extend, decoding_weights, empty_cache, extend
from gpt2_jax.compute.forward import all_logits
from gpt2_jax.data.chunks import CutRuns
from gpt2_jax.data.prepare import Limits, prepare
from gpt2_jax.data.sources import open_source
from gpt2_jax.data.tokenizer import gpt2_tokenizer, num_sampled_ids
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.generate import Sample, Sampling, complete, generate, generate_samples, penalized, prompt_tokens, sample, samples
from gpt2_jax.llmc.random import XorShift
from gpt2_jax.llmc.token_shard import open_token_shard
from gpt2_jax.models.initialize import initialize_parameters
from tests.conftest import TINY, available, plan_of
from tests.implementations import plan_of_kind


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
    assert sample(logits, np.float32(coin), Sampling(top_k=top_k)) in np.argsort(logits)[-top_k:]


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
    assert {sample(logits, coin, Sampling(**options)) for coin in COINS} == expected


@given(logits=st.lists(st.integers(-6, 3), min_size=1, max_size=40), top_p=st.floats(0.01, 0.99), at_first=st.integers(1, 50))
def test_top_p_by_sorting_all(logits, top_p, at_first):
    """However few are sorted at first; many weights are equal."""
    from gpt2_jax import generate as module

    weights = np.exp(np.array(logits, np.float32))
    order = np.argsort(-weights, kind="stable")
    sums = np.cumsum(weights[order], dtype=np.float64)
    kept = order[: int(np.argmax(sums >= top_p * sums[-1] * (1 - 2**-50))) + 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SORTED_AT_FIRST", at_first)
        assert np.flatnonzero(~module._unlikely(weights, top_p)).tolist() == sorted(kept)


def test_temperature_zero_is_the_likeliest_and_low_temperature_nearly():
    logits = np.array([0.0, 3.0, 1.0, 2.9], np.float32)
    assert sample(logits, np.float32(0.99), Sampling(temperature=0)) == 1
    assert sample(logits, np.float32(0.99), Sampling(temperature=0.01)) == 1
    assert sample(logits, np.float32(0.99), Sampling(temperature=100)) == 3


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


@pytest.mark.parametrize("matmul", available(["xla", "threaded", "amx"]))
@pytest.mark.parametrize(
    ("prompt_length", "dtype", "temperature"),
    [(1, "float32", 0), (64, "float32", 1.0), (70, "float32", 0), (1, "bfloat16", 1.0), (70, "bfloat16", 0)],
)
def test_the_cache_changes_no_token(prompt_length, dtype, temperature, matmul):
    """Prompts of one token, of a whole compiled length, and of one that is padded; the text outgrows the 128 positions."""
    config = dataclasses.replace(TINY, max_sequence_length=128)
    # Large weights: the likeliest token depends on the whole text, and two logits are seldom within rounding of each other.
    params = jnp.asarray(initialize_parameters(config) * np.float32(8))
    prompt = np.random.default_rng(5).integers(0, 203, prompt_length).tolist()
    cached, full = (
        list(
            generate(
                plan_of(config, dtype=dtype), params, prompt, 140, sampling=Sampling(temperature=temperature), seed=3, cached=on
            )
        )
        for on in (True, False)
    )
    assert cached == full
    assert len(set(cached)) > 4


def test_a_backend_without_the_cache_says_so_and_never_compiles_it(english_model, monkeypatch):
    plan, params = english_model
    from gpt2_jax import generate as module

    monkeypatch.setattr(module, "extend", lambda *arguments, **options: pytest.fail("compiled the cache's program"))
    without = dataclasses.replace(plan, backend=dataclasses.replace(plan.backend, lacks=plan.backend.lacks | {"decode_cache"}))
    said = []
    assert "".join(complete(without, params, gpt2_tokenizer(), "In", max_tokens=2, say=said.append))
    assert said == ["generating: without a cache, which is not checked on cpu; every token costs a full forward pass"]


@pytest.mark.parametrize("kind", ["xla", *available(["threaded", "simd", "amx"]), "nvidia"])
def test_the_cache_gives_the_full_passes_logits(tiny_params, kind):
    plan, params = plan_of_kind(kind), jnp.asarray(tiny_params)
    x = np.random.default_rng(1).integers(0, 203, (2, 12)).astype(np.int32)
    expected = np.asarray(jax.jit(lambda x: all_logits(plan, params, x))(x))
    weights = decoding_weights(plan, params)
    found, cache = extend(plan, weights, empty_cache(plan, 2, 16), x[:, :8], start=0, last=5)
    np.testing.assert_allclose(found, expected[:, 5], rtol=0, atol=32 * np.finfo(np.float32).eps * np.abs(expected).max())
    for position in range(6, 12):  # what stood at 6 and 7 is overwritten
        found, cache = extend(plan, weights, cache, x[:, position : position + 1], start=position, last=0)
        tolerance = 32 * np.finfo(np.float32).eps * np.abs(expected).max()
        np.testing.assert_allclose(found, expected[:, position], rtol=0, atol=tolerance)


@pytest.mark.parametrize(("start", "length", "last"), [(14, 3, 0), (-1, 1, 0), (17, 1, 0), (0, 4, 4), (0, 4, -1)], ids=str)
def test_tokens_behind_the_cache_are_refused(tiny_params, start, length, last):
    """XLA would move them to the front until they fit."""
    plan = plan_of()
    weights, cache = decoding_weights(plan, jnp.asarray(tiny_params)), empty_cache(plan, 1, 16)
    with pytest.raises(ValueError, match=f"expected {length} tokens within 16 cached positions, found the position {start}"):
        extend(plan, weights, cache, np.zeros((1, length), np.int32), start=start, last=last)
    with pytest.raises(ValueError, match="expected at most 16 positions, found 17"):
        empty_cache(plan, 1, 17)
    with pytest.raises(ValueError, match="expected 1 texts, found 2"):
        extend(plan, weights, cache, np.zeros((2, 1), np.int32), start=0, last=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_token_cuts_out_or_rounds_a_weight_anew(tiny_params, dtype):
    """XLA's products read arrays of their own; of the buffer only what is small is sliced."""
    plan = plan_of(dtype=dtype)
    weights, cache = decoding_weights(plan, jnp.asarray(tiny_params)), empty_cache(plan, 1, 16)
    assert all(array.dtype == dtype for of_layers in weights.products.values() for array in of_layers)
    program = _extend.lower(plan, weights, cache, np.zeros((1, 1), np.int32), np.int32(0), np.int32(0)).as_text()
    cut = re.findall(rf"slice .*\(tensor<{tiny_params.size}xf32>.*\) -> tensor<(\d+)xf32>", program)
    assert max(map(int, cut)) == max(tensor.layer_size for tensor in plan.layout.tensors if tensor.name.endswith("b"))


@pytest.mark.parametrize("matmul", available(["threaded"]))
def test_custom_calls_read_float32_weights_where_they_lie(tiny_params, matmul):
    assert decoding_weights(plan_of(matmul=matmul), jnp.asarray(tiny_params)).products == {}
    assert decoding_weights(plan_of(matmul=matmul, dtype="bfloat16"), jnp.asarray(tiny_params)).products


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_k=20, repetition_penalty=1.3)], ids=str)
def test_samples_of_one_batch_are_the_texts_of_their_seeds(sampling):
    """In the cache and, from the 64th token on, behind it."""
    config = dataclasses.replace(TINY, max_sequence_length=64)
    params = jnp.asarray(initialize_parameters(config) * np.float32(8))
    together = list(generate_samples(plan_of(config), params, [1, 2, 3], 70, num_samples=3, sampling=sampling, seed=7))
    alone = [list(generate(plan_of(config), params, [1, 2, 3], 70, sampling=sampling, seed=7 + i)) for i in range(3)]
    assert [list(tokens) for tokens in zip(*together, strict=True)] == alone
    assert alone[0] != alone[1]


def test_a_penalty_is_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    logits = np.random.default_rng(0).normal(0, 3, 50).astype(np.float32)
    has = np.zeros(50, bool)
    has[[3, 7, 7, 20]] = True
    theirs = transformers.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[3, 7, 7, 20]]), torch.from_numpy(logits)[None])
    np.testing.assert_allclose(penalized(logits, has, 1.7), theirs[0].numpy(), rtol=2**-23)


def test_a_penalty_counts_the_prompt_and_what_was_generated(tiny_params):
    """With an enormous one no token comes twice as long as others are there."""
    options = {"sampling": Sampling(temperature=0, repetition_penalty=1e6)}
    prompt = list(range(10))
    found = list(generate(plan_of(), jnp.asarray(tiny_params), prompt, 80, **options))
    assert len(set(found[:20] + prompt)) == 30


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (-1, math.nan, math.inf)),
        *(("top_k", -1), ("top_p", 0), ("top_p", 1.1), ("top_p", math.nan), ("min_p", -0.1), ("min_p", 2)),
        *(("repetition_penalty", value) for value in (0, -1, math.nan, math.inf)),
    ],
)
def test_ways_to_choose_that_mean_nothing_are_refused(name, value):
    with pytest.raises(Gpt2JaxError, match=f"--{name.replace('_', '-')}: expected .*, found {value}"):
        Sampling(**{name: value})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(bad):
    with pytest.raises(Gpt2JaxError, match="expected finite logits"):
        sample(np.array([0.0, bad], np.float32), np.float32(0.5))


def text_with(tokens, stop):
    """The text, and what could be shown after each token."""
    found, shown = Sample(gpt2_tokenizer(), stop), []
    for token in tokens:
        found.add(token)
        shown.append(found.new)
        if found.finish:
            break
    else:
        found.end("length")
        shown[-1:] = [found.new]
    assert "".join(shown) == found.text
    return found, shown


@pytest.mark.parametrize(
    ("text", "stop", "expected", "finish"),
    [
        ("one two three", ["two"], "one ", "stop"),
        ("one two three", ["two", "e t"], "on", "stop"),
        ("one two three", ["twos"], "one two three", "length"),
        ("aaaaab", ["aab"], "aaa", "stop"),
        ("ends in sto", ["stop"], "ends in sto", "length"),
        ("käse\n\nbrot", ["\n\n"], "käse", "stop"),
        ("a ᵀ b", ["ᵀ"], "a ", "stop"),
        ("one<|endoftext|>two", ["two"], "one", "end_of_text"),
    ],
)
def test_stop_strings(text, stop, expected, finish):
    tokenizer = gpt2_tokenizer()
    by_byte = [tokenizer.encode_single_token(bytes([byte])) for byte in text.replace("<|endoftext|>", "").encode()]
    tokens = prompt_tokens(text, tokenizer)[1:]
    for each in (tokens, by_byte) if "<|" not in text else (tokens,):
        found, _ = text_with(each, stop)
        assert (found.text, found.finish) == (expected, finish)


@given(text=st.text("ab", max_size=30), stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_a_text_ends_in_front_of_the_first_stop_string(text, stop):
    ids = [gpt2_tokenizer().encode_single_token(letter.encode()) for letter in text]
    places = [end for end in range(len(text) + 1) if any(text[:end].endswith(each) for each in stop)]
    expected = text
    if places:
        expected = min((text[: places[0] - len(each)] for each in stop if text[: places[0]].endswith(each)), key=len)
    assert text_with(ids, stop)[0].text == expected


def test_what_cannot_begin_a_stop_string_is_shown_at_once():
    ids = [gpt2_tokenizer().encode_single_token(letter.encode()) for letter in "xaabaaz"]
    assert text_with(ids, ["aab!"])[1] == ["x", "", "", "", "aab", "", "aaz"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": [""]}, "--stop: expected strings of 1 to 1000 characters"),
        ({"stop": ["x" * 1001]}, "--stop: expected strings of 1 to 1000 characters"),
        ({"max_tokens": 0}, "--max-tokens: expected at least 1, found 0"),
        ({"num_samples": 0}, "--num-samples: expected 1 to 1024, found 0"),
        ({"num_samples": 10**9}, "--num-samples: expected 1 to 1024"),
        ({"seed": 0}, "--seed: expected at least 1"),
        ({"seed": 2**64 - 1, "num_samples": 2}, "--seed: expected at least 1"),
    ],
)
def test_requests_that_mean_nothing_are_refused_before_any_text(english_model, options, message):
    plan, params = english_model
    with pytest.raises(Gpt2JaxError, match=message):
        samples(plan, params, gpt2_tokenizer(), "", **{"max_tokens": 1} | options)


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
    pieces = complete(plan, params, gpt2_tokenizer(), "Hello", max_tokens=3, say=said.append, sampling=Sampling(**options))
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
    assert sample(logits, np.float32(0.999), Sampling(temperature=temperature)) == 3


@pytest.mark.parametrize("temperature", [1e10, 1e308])
def test_every_high_temperature_is_nearly_even(temperature):
    logits = np.array([0.0, 3.0, 1.0, 2.9], np.float32)
    chosen = [sample(logits, np.float32(coin), Sampling(temperature=temperature)) for coin in (0.1, 0.3, 0.6, 0.9)]
    assert chosen == [0, 1, 2, 3]


def test_top_k_of_zero_or_of_more_than_all_is_all():
    logits = np.zeros(4, np.float32)
    for top_k in (0, 4, 5, 10**9):
        assert [sample(logits, np.float32(coin), Sampling(top_k=top_k)) for coin in (0.1, 0.3, 0.6, 0.9)] == [0, 1, 2, 3]
