"""llm.c's tokenizer files."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc.tokenizer_file import read_tokenizer_file, write_tokenizer_file
from tests.llmc.twins import header

TOKENS = [b"a", b"\x00", b" the", bytes(range(255)), b"\xff" * 255, b"<|endoftext|>"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokenizer.bin"


def body(tokens: list[bytes]) -> bytes:
    return b"".join(bytes([len(token)]) + token for token in tokens)


def refusal(path: Path) -> str:
    with pytest.raises(Gpt2JaxError) as raised:
        read_tokenizer_file(path)
    assert str(raised.value).startswith(f"{path}: expected ")
    assert "---> HINT: python scripts/write_starter_pack.py" in str(raised.value)
    return str(raised.value)


def test_bytes_of_a_written_file(path):
    write_tokenizer_file(path, TOKENS, 5)
    assert path.read_bytes() == header(20240328, 2, 6, 5) + body(TOKENS)


def test_what_was_written_is_read(path):
    write_tokenizer_file(path, TOKENS, 5)
    assert read_tokenizer_file(path) == (TOKENS, 5)


def test_end_of_text_may_be_any_token(path):
    for end_of_text in range(6):
        write_tokenizer_file(path, TOKENS, end_of_text)
        assert read_tokenizer_file(path).end_of_text == end_of_text


def test_version_1_is_gpt2s_vocabulary_with_its_last_token_as_end_of_text(path):
    tokens = [b"x%d" % i for i in range(50257)]
    path.write_bytes(header(20240328, 1, 50257, 12) + body(tokens))
    assert read_tokenizer_file(path) == (tokens, 50256)


def test_version_1_with_another_vocabulary_is_refused(path):
    path.write_bytes(header(20240328, 1, 6) + body(TOKENS))
    assert "expected 50257 tokens in version 1, found 6" in refusal(path)


def test_version_3_is_refused(path):
    path.write_bytes(header(20240328, 3, 6, 5) + body(TOKENS))
    assert "expected a tokenizer file of version 2 or 1, found version 3" in refusal(path)


@pytest.mark.parametrize(("num_tokens", "end_of_text"), [(0, 0), (-1, 0), (65537, 5), (2**31 - 1, 5), (6, 6), (6, -1)])
def test_counts_and_ids_out_of_range_are_refused(path, num_tokens, end_of_text):
    path.write_bytes(header(20240328, 2, num_tokens, end_of_text) + body(TOKENS))
    expected = "expected 1 to 65536 tokens and an end-of-text id among them"
    assert f"{expected}, found {num_tokens} tokens and id {end_of_text}" in refusal(path)


def test_largest_vocabulary_of_one_byte_tokens_is_read(path):
    write_tokenizer_file(path, [b"x"] * 65536, 65535)
    token_bytes, end_of_text = read_tokenizer_file(path)
    assert (len(token_bytes), end_of_text) == (65536, 65535)


@pytest.mark.parametrize("removed", [1, 13, 14, 200])
def test_truncated_file_names_the_token_that_is_cut(path, removed):
    path.write_bytes((header(20240328, 2, 6, 5) + body(TOKENS))[:-removed])
    token_id = 5 if removed <= 14 else 4
    assert f"expected 1 to 255 bytes for token {token_id} of 6, found the end of the file" in refusal(path)


def test_empty_token_is_refused_with_its_place(path):
    path.write_bytes(header(20240328, 2, 3, 0) + b"\x02ab" + b"\x00" + b"\x01c")
    assert "expected 1 to 255 bytes for token 1 of 3, found the end of the file or an empty token at byte 1027" in refusal(path)


def test_bytes_after_the_last_token_are_refused(path):
    path.write_bytes(header(20240328, 2, 6, 5) + body(TOKENS) + b"xyz")
    assert "expected the end of the file after 6 tokens, found 3 bytes" in refusal(path)


def test_file_larger_than_any_vocabulary_is_refused_unread(path):
    with open(path, "wb") as file:
        file.write(header(20240328, 2, 6, 5) + body(TOKENS))
        file.truncate(2**40)
    assert "found 1099511627776 bytes (grown)" in refusal(path)


@pytest.mark.parametrize("token", [b"", b"x" * 256])
def test_tokens_that_one_length_byte_cannot_describe_are_not_written(path, token):
    with pytest.raises(Gpt2JaxError, match=f"expected 1 to 255 bytes for token 1, found {len(token)}"):
        write_tokenizer_file(path, [b"a", token], 0)
    assert not path.exists()


@pytest.mark.parametrize(("tokens", "end_of_text"), [([], 0), ([b"a"], 1), ([b"a"], -1), ([b"x"] * 65537, 0)])
def test_vocabularies_that_the_reader_refuses_are_not_written(path, tokens, end_of_text):
    with pytest.raises(Gpt2JaxError, match="expected 1 to 65536 tokens and an end-of-text id among them"):
        write_tokenizer_file(path, tokens, end_of_text)
    assert not path.exists()
