"""llm.c's multiple-choice evaluation files."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc.eval_file import MultipleChoice, read_eval_file, write_eval_file
from tests.llmc.twins import header


def choice(label: int, context: list[int], *completions: list[int]) -> MultipleChoice:
    return MultipleChoice(label, np.array(context, np.uint16), tuple(np.array(part, np.uint16) for part in completions))


FIRST = choice(2, [10, 11, 12], [20], [21, 22], [23], [24, 25, 26])
SECOND = choice(0, [50256], [1], [2], [3], [4])


def words_of(example: MultipleChoice, index: int) -> list[int]:
    body = [index, example.label, 4, example.context.size, *example.context]
    for completion in example.completions:
        body += [completion.size, *completion]
    return [65535, 2 * (len(body) + 2), *map(int, body)]


def file_bytes(*streams: list[int], num_examples: int | None = None, longest: int | None = None) -> bytes:
    count = len(streams) if num_examples is None else num_examples
    size = max(2 * len(stream) for stream in streams) if longest is None else longest
    words = [word for stream in streams for word in stream]
    return header(20240522, 1, count, size) + struct.pack(f"<{len(words)}H", *words)


def refusal(folder: Path, content: bytes) -> str:
    path = folder / "eval.bin"
    path.write_bytes(content)
    with pytest.raises(Gpt2JaxError) as raised:
        read_eval_file(path)
    assert str(raised.value).startswith(f"{path}: expected ")
    assert "---> HINT: python scripts/prepare_data.py --hellaswag" in str(raised.value)
    return str(raised.value)


def as_lists(example: MultipleChoice) -> tuple:
    return example.label, example.context.tolist(), [completion.tolist() for completion in example.completions]


def test_bytes_are_those_of_llmcs_format(tmp_path):
    path = tmp_path / "eval.bin"
    write_eval_file(path, [FIRST, SECOND])
    assert path.read_bytes() == file_bytes(words_of(FIRST, 0), words_of(SECOND, 1))
    # Start mark, bytes, index, label, completions, then a count before the context and before each completion.
    assert struct.unpack_from("<8H", path.read_bytes(), 1024) == (65535, 2 * 20, 0, 2, 4, 3, 10, 11)


def test_a_file_of_llmcs_is_read(tmp_path):
    path = tmp_path / "eval.bin"
    path.write_bytes(file_bytes(words_of(FIRST, 0), words_of(SECOND, 1)))
    assert [as_lists(example) for example in read_eval_file(path)] == [as_lists(FIRST), as_lists(SECOND)]
    assert [example.longest for example in read_eval_file(path)] == [6, 2]


tokens = st.lists(st.integers(0, 65535), min_size=1, max_size=6)
examples = st.builds(choice, st.integers(0, 3), tokens, tokens, tokens, tokens, tokens)


@given(written=st.lists(examples, min_size=1, max_size=5))
def test_what_was_written_is_read(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("eval") / "eval.bin"
    write_eval_file(path, written)
    assert [as_lists(example) for example in read_eval_file(path)] == [as_lists(example) for example in written]


@pytest.mark.parametrize(
    ("place", "word"), [(0, 1), (1, 32), (1, 28), (1, 0), (2, 2), (3, 4), (4, 3), (4, 5), (5, 0), (5, 4), (9, 0), (9, 9)]
)
def test_an_example_with_a_wrong_word_is_refused_by_number_and_place(tmp_path, place, word):
    wrong = words_of(SECOND, 1)
    wrong[place] = word
    first = words_of(FIRST, 0)
    assert f"expected example 1 of 2 at byte {1024 + 2 * len(first)}" in refusal(tmp_path, file_bytes(first, wrong))


def test_header_that_does_not_fit_the_examples_is_refused(tmp_path):
    streams = words_of(FIRST, 0), words_of(SECOND, 1)
    assert "expected example 2 of 3" in refusal(tmp_path, file_bytes(*streams, num_examples=3))
    assert "found 30 more bytes" in refusal(tmp_path, file_bytes(*streams, num_examples=1))
    assert "the longest of 42 bytes, found 0 more bytes and a longest example of 40" in refusal(
        tmp_path, file_bytes(*streams, longest=42)
    )
    for count in (0, -1, 65536):
        assert f"found {count} examples" in refusal(tmp_path, file_bytes(*streams, num_examples=count))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "1 to 65535 examples, found 0"),
        ([FIRST, FIRST._replace(label=4)], "expected example 1 .* found label 4"),
        ([FIRST._replace(completions=FIRST.completions[:3])], "found label 2, 3 completions"),
        ([FIRST._replace(context=np.array([], np.uint16))], "expected example 0"),
        ([FIRST._replace(context=np.array([65536]))], "expected example 0"),
        ([FIRST._replace(context=np.zeros(33000, np.uint16))], "found label 2, 4 completions and 66034 bytes"),
    ],
)
def test_examples_that_the_format_cannot_hold_are_refused(tmp_path, wrong, message):
    with pytest.raises(Gpt2JaxError, match=message):
        write_eval_file(tmp_path / "eval.bin", wrong)
    assert list(tmp_path.iterdir()) == []
