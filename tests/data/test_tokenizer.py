"""GPT-2's tokenizer without a network, and the encoder that a llm.c tokenizer file implies."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_jax.data.tokenizer import gpt2_tokenizer, token_bytes, tokenizer_from_file
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc.tokenizer_file import write_tokenizer_file


@pytest.fixture(scope="module")
def from_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "gpt2_tokenizer.bin"
    tokenizer = gpt2_tokenizer()
    write_tokenizer_file(path, token_bytes(tokenizer), tokenizer.eot_token)
    return tokenizer_from_file(path)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [15496, 995]),
        ("Hello, I'm a language model,", [15496, 11, 314, 1101, 257, 3303, 2746, 11]),
        ("", []),
    ],
)
def test_known_encodings(text, ids):
    assert gpt2_tokenizer().encode_ordinary(text) == ids


def test_works_with_no_network(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("the tokenizer asked for the network")

    monkeypatch.setattr(socket, "socket", refuse)
    gpt2_tokenizer.cache_clear()
    tokenizer = gpt2_tokenizer()
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (50257, 50256)


@given(st.text())
def test_every_text_round_trips_and_both_encoders_agree(from_file, text):
    ids = gpt2_tokenizer().encode_ordinary(text)
    assert gpt2_tokenizer().decode(ids) == text
    assert from_file.encode_ordinary(text) == ids


def test_a_vocabulary_without_all_bytes_is_refused(tmp_path):
    path = tmp_path / "small.bin"
    write_tokenizer_file(path, [b"a", b"b", b"<|endoftext|>"], end_of_text=2)
    with pytest.raises(Gpt2JaxError, match="no token for byte 0"):
        tokenizer_from_file(path)


def test_a_vocabulary_with_a_token_twice_is_refused(tmp_path):
    path = tmp_path / "twice.bin"
    write_tokenizer_file(path, [*(bytes([byte]) for byte in range(256)), b"a", b"<|endoftext|>"], end_of_text=257)
    with pytest.raises(Gpt2JaxError, match="two ids for one token"):
        tokenizer_from_file(path)
