"""Chunks of a text have, one after another, the tokens of the whole text: places, documents, runs, and how it was read."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt2_jax.data import chunks as chunks_module
from gpt2_jax.data.chunks import CHUNK_LENGTH, CutRuns, chunks, documents
from gpt2_jax.data.tokenizer import END_OF_TEXT, encode, encode_chunks, gpt2_tokenizer

# White space of every kind, and characters that only Python or only Unicode 3.2 takes for it; contractions; digits, letters
# and others, of one to four bytes.
PIECES = [
    *(" ", "  ", "\n", "\r\n", "\t", "\u3000", "\xa0", "\x85", "\u2028", "\x1c", "\x1f", "\u180e", "\u200b", "\ufeff"),
    *("'", "''", "'s", "'ll", "'re", " 've", "s", "l", "e", "It", "word", "é", "中文", "\u0301", "\U00010400", "\u1c80"),
    *("1", "23", "٣", "½", "!", ".", "，", "😀", "\0", "<|endoftext|>", "<|endof", "text|>", "<", "|", "<|", "|>"),
]
# With much of a few kinds, so that runs are longer than the chunks.
TEXTS = st.lists(st.sampled_from(PIECES) | st.characters() | st.sampled_from([" " * 9, "a" * 9, "'" * 9, "\n" * 9])).map(
    "".join
)


def blocks_of(text: str, lengths: list[int]) -> list[str]:
    """The text in blocks of these lengths, and the rest."""
    stops = list(itertools.accumulate(lengths))
    return [text[start:stop] for start, stop in zip([0, *stops], [*stops, None], strict=True)]


def tokens_of(found) -> list[list[int]]:
    """The ids of each document."""
    rows: list[list[int]] = [[]]
    for one in encode_chunks(gpt2_tokenizer(), found):
        assert (one.tokens[:1].tolist() == [gpt2_tokenizer().eot_token]) == one.begins_document
        rows[-1] += one.tokens[int(one.begins_document) :].tolist()
        if one.chunk.ends_document:
            rows.append([])
    assert rows.pop() == []
    return rows


@given(text=TEXTS, lengths=st.lists(st.integers(0, 30)), length=st.integers(4, 40))
@example(text="!!!!!!!!'sss", lengths=[], length=8)
@example(text="        's", lengths=[], length=8)
@settings(max_examples=500)
def test_tokens_do_not_depend_on_the_chunks_nor_on_the_blocks(text, lengths, length):
    found = list(chunks(documents(blocks_of(text, lengths), END_OF_TEXT), length))
    assert found == list(chunks([(part, True) for part in text.split(END_OF_TEXT)], length))
    assert all(len(chunk.text) <= length for chunk in found)
    whole = [gpt2_tokenizer().encode_ordinary(part) for part in text.split(END_OF_TEXT)]
    if any(chunk.cuts_run for chunk in found):
        assert [gpt2_tokenizer().decode(row) for row in tokens_of(found)] == text.split(END_OF_TEXT)
    else:
        assert tokens_of(found) == whole


@given(text=TEXTS)
@settings(max_examples=500)
def test_at_every_safe_place_both_sides_are_tokenized_as_if_they_stood_alone(text):
    tokenizer = gpt2_tokenizer()
    whole = tokenizer.encode_ordinary(text)
    for place in range(1, len(text)):
        if chunks_module._is_safe(text, place):
            parts = tokenizer.encode_ordinary(text[:place]) + tokenizer.encode_ordinary(text[place:])
            assert parts == whole, (text[:place], text[place:])


@pytest.mark.parametrize(
    "text", ["aB3+" * 5000, "中，" * 9000, "word, 12 " * 5000, "\r\n\r\nIt's" * 5000, "a1" * 20_000, "x\n\n" * 9000]
)
def test_text_without_long_runs_is_never_cut_within_one(text):
    """Also where no white space is: minified code, base64, Chinese."""
    found = list(chunks([(text, True)]))
    assert len(found) > 1
    assert not any(chunk.cuts_run for chunk in found)
    assert tokens_of(found) == [gpt2_tokenizer().encode_ordinary(text)]


RUNS = {
    "space": " ",
    "line feed": "\n",
    "tab": "\t",
    "U+3000": "\u3000",
    "no-break space": "\xa0",
    "letter": "a",
    "Chinese": "中",
    "digit": "7",
    "exclamation mark": "!",
    "apostrophe": "'",
    "zero byte": "\0",
    "emoji": "😀",
    "combining": "\u0301",
    "two spaces": "\r\n",
}


@pytest.mark.parametrize("character", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("length", [CHUNK_LENGTH + extra for extra in (-2, -1, 0, 1, 2, 3, CHUNK_LENGTH, CHUNK_LENGTH + 1)])
@pytest.mark.parametrize(("before", "after"), [("", ""), ("x. ", "s t"), ("\n", "\n")], ids=["alone", "in a line", "in lines"])
def test_a_long_run_has_the_tokens_of_shorter_ones(character, length, before, after):
    """Each part of the run has the tokens of a run of its length; on the whole there are about as many as uncut."""
    run = character * (length // len(character))
    tokenizer = gpt2_tokenizer()
    tokens, whole = encode(tokenizer, before + run + after), tokenizer.encode_ordinary(before + run + after)
    assert tokenizer.decode(tokens) == before + run + after
    # A cut splits at most one longest token, of 64 characters, into parts of 32, 16 …; there are two cuts.
    assert abs(len(tokens) - len(whole)) <= 2 * 6
    if not before:
        parts = [run[start : start + CHUNK_LENGTH] for start in range(0, len(run), CHUNK_LENGTH)]
        assert tokens == [token for part in parts for token in tokenizer.encode_ordinary(part)]


@pytest.mark.parametrize("name", ["space", "line feed", "U+3000", "letter", "digit", "apostrophe", "zero byte"])
def test_a_million_of_a_character_are_tokens(name):
    """tiktoken itself ends the process for a million spaces and a letter."""
    text = RUNS[name] * 1_000_000 + "s"
    assert gpt2_tokenizer().decode(encode(gpt2_tokenizer(), text)) == text


def test_the_last_apostrophe_of_a_long_run_begins_no_contraction():
    for extra in range(4):
        tokens = encode(gpt2_tokenizer(), "'" * (CHUNK_LENGTH + extra) + "s")
        assert gpt2_tokenizer().decode(tokens[-1:]) == "s"


def test_runs_that_are_cut_are_counted_and_the_first_is_named():
    cuts = CutRuns()
    text = "word " * 10_000 + "\u3000" * 50_000 + "word" + "7" * 50_000
    assert "".join(chunk.text for chunk in cuts.watch(chunks([(text, True)]))) == text
    assert cuts.number == 2
    assert "2 runs of more than 16,384 characters of one kind" in str(cuts)
    assert r"the first run begins with ' \u3000\u3000" in str(cuts)
    assert "at character 49,999 of the documents" in str(cuts)
    assert str(cuts).isascii()


def test_a_prompt_with_a_long_run_is_announced_once(capfd):
    for _ in range(2):
        encode(gpt2_tokenizer(), "b" * 70_000)
    error = capfd.readouterr().err
    assert error.startswith("note: 1 run of more than 16,384 characters")
    assert error.count("\n") == 1


@given(text=TEXTS, lengths=st.lists(st.integers(0, 30)))
def test_documents_are_those_of_the_whole_text(text, lengths):
    found = [""]
    for part, ends in documents(blocks_of(text, lengths), END_OF_TEXT):
        found[-1] += part
        if ends:
            found.append("")
    assert found == [*text.split(END_OF_TEXT), ""]
