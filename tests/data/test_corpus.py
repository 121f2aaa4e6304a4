"""The built-in text, llm.c's tinyshakespeare recipe, and a text file of the user's own."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import json
import socket
import urllib.error

import numpy as np
import pytest

from gpt2_jax.commands import prepare
from gpt2_jax.data import corpus, kjv
from gpt2_jax.data.tokenizer import gpt2_tokenizer
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc.eval_file import read_eval_file
from gpt2_jax.llmc.token_shard import open_token_shard


def test_the_built_in_text_is_whole_and_plain():
    chapters = kjv.kjv_chapters()
    assert len(chapters) == 1189
    assert sum(len(chapter.encode()) for chapter in chapters) > 4_000_000
    assert chapters[0].startswith("In the beginning God created the heaven and the earth. And the earth was without form")
    assert chapters[-1].endswith("The grace of our Lord Jesus Christ be with you all. Amen.")
    assert not any(character in chapter for chapter in chapters for character in "[]’")


@pytest.mark.parametrize("content", [b"", b"no gzip", gzip.compress(b"another text"), gzip.compress(b"In the beginning")[:-9]])
def test_a_damaged_built_in_text_is_refused(tmp_path, monkeypatch, content):
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "kjv.txt.gz").write_bytes(content)
    monkeypatch.setattr(kjv, "files", lambda package: tmp_path)
    with pytest.raises(Gpt2JaxError, match=r"kjv\.txt\.gz: expected the built-in text, found"):
        kjv.kjv_chapters()


def test_the_built_in_texts_shards_never_change(tmp_path, monkeypatch):
    """The same bytes on every machine and in every version: runs on them can be compared. No network is needed."""
    monkeypatch.setattr(socket, "socket", None)
    prepare.main(["--output-dir", str(tmp_path)])
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()} == {
        "kjv_train.bin": "da59bd5cd571fe2ca8bf755eb4191fbe70890f2356860e196dbf283aab6da258",
        "kjv_val.bin": "58085ef24973f6d5b7bbba2b76ef8c3a494b90dcd413ff675053a13ea7944df2",
    }


def test_documents_begin_with_end_of_text():
    assert corpus.encode_documents(["Hello world", "Hello"]).tolist() == [50256, 15496, 995, 50256, 15496]


def test_a_text_file_splits_into_documents_and_a_last_tenth(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("Hello world " * 50 + "<|endoftext|>" + "Hello " * 50, encoding="utf-8")
    train, validation = corpus.text_file(path)
    tokens = np.concatenate([train, validation])
    assert validation.size == tokens.size // 10
    assert (tokens == 50256).sum() == 2


@pytest.mark.parametrize(
    ("content", "message"), [(b"\xff\xfe", "expected a text file in UTF-8, found byte 0xff at 0"), (b"Hi", "enough text")]
)
def test_unusable_text_files_are_refused(tmp_path, content, message):
    path = tmp_path / "book.txt"
    path.write_bytes(content)
    with pytest.raises(Gpt2JaxError, match=message):
        corpus.text_file(path)


def test_a_missing_text_file_is_refused(tmp_path):
    with pytest.raises(Gpt2JaxError, match="expected a text file"):
        corpus.text_file(tmp_path / "none.txt")


def test_shards_hold_the_tokens(tmp_path):
    made = corpus.Corpus(np.arange(10, dtype=np.uint16), np.arange(5, dtype=np.uint16))
    train_path, validation_path = corpus.write_corpus(made, "mine", tmp_path / "new" / "folder")
    assert (train_path.name, validation_path.name) == ("mine_train.bin", "mine_val.bin")
    np.testing.assert_array_equal(open_token_shard(train_path), made.train)
    np.testing.assert_array_equal(open_token_shard(validation_path), made.validation)


@pytest.mark.parametrize("error", [urllib.error.URLError("no network"), http.client.IncompleteRead(b"no network")])
def test_tinyshakespeare_without_a_network_is_an_honest_error(monkeypatch, error):
    def refuse(*arguments, **options):
        raise error

    monkeypatch.setattr(corpus.urllib.request, "urlopen", refuse)
    with pytest.raises(Gpt2JaxError, match=r"found no way to it(.|\n)*python scripts/prepare_data.py"):
        corpus.tinyshakespeare()


def test_another_file_in_tinyshakespeares_place_is_refused():
    with pytest.raises(Gpt2JaxError, match="expected sha256"):
        corpus.tinyshakespeare_from_bytes(b"<html>")


def test_tinyshakespeares_recipe(monkeypatch):
    """The blank line stays with the part before it, the first tokens are for validation."""
    text = "A:\nOne.\n\nB:\nTwo.\n\nC:\nThree.\n"
    monkeypatch.setattr(corpus, "_TINYSHAKESPEARE_SHA256", hashlib.sha256(text.encode()).hexdigest())
    monkeypatch.setattr(corpus, "_TINYSHAKESPEARE_VALIDATION_TOKENS", 4)
    train, validation = corpus.tinyshakespeare_from_bytes(text.encode())
    expected = gpt2_tokenizer().encode("<|endoftext|>" + text.replace("\n\n", "\n\n<|endoftext|>"), allowed_special="all")
    assert validation.tolist() == expected[:4]
    assert train.tolist() == expected[4:]


QUESTION = {
    "ind": 24,
    "ctx": "Roof shingle removal: A man is sitting on a roof. he",
    "endings": ["a.", "b b.", "c.", "d."],
    "label": 3,
}


def test_hellaswags_questions_have_endings_after_a_space(tmp_path):
    path = tmp_path / "hellaswag_val.jsonl"
    path.write_text("\n".join(json.dumps(QUESTION | {"label": label}) for label in (3, 0)), encoding="utf-8")
    examples = corpus.hellaswag(path)
    assert [example.label for example in examples] == [3, 0]
    tokenizer = gpt2_tokenizer()
    assert tokenizer.decode(examples[0].context.tolist()) == QUESTION["ctx"]
    assert [tokenizer.decode(part.tolist()) for part in examples[1].completions] == [" a.", " b b.", " c.", " d."]
    written = corpus.write_examples(examples, "hellaswag_val", tmp_path / "data")
    assert written == tmp_path / "data" / "hellaswag_val.bin"
    assert [example.label for example in read_eval_file(written)] == [3, 0]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[]",
        "7",
        json.dumps({"ctx": "a"}),
        json.dumps(QUESTION | {"label": 4}),
        json.dumps(QUESTION | {"label": "x"}),
        json.dumps(QUESTION | {"endings": ["a"]}),
        json.dumps(QUESTION | {"endings": 5}),
        json.dumps(QUESTION | {"ctx": ""}),
        json.dumps(QUESTION | {"ctx": 5}),
        "[" * 100_000,
    ],
    ids=range(12),
)
def test_a_line_that_is_no_question_is_named(tmp_path, line):
    path = tmp_path / "hellaswag_val.jsonl"
    path.write_text(json.dumps(QUESTION) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(Gpt2JaxError, match="expected an object with ctx, 4 endings and the label of one on line 2"):
        corpus.hellaswag(path)


def test_a_corpus_is_written_whole_or_not_at_all(tmp_path):
    old, new = np.arange(5, dtype=np.uint16), np.arange(9, dtype=np.uint16)
    paths = corpus.write_corpus(corpus.Corpus(old, old), "text", tmp_path)
    with pytest.raises(Gpt2JaxError, match=r"text_val\.bin: expected a row of 1 to"):
        corpus.write_corpus(corpus.Corpus(new, new[:0]), "text", tmp_path)
    assert [open_token_shard(path).size for path in paths] == [5, 5]
