"""The built-in text, llm.c's tinyshakespeare recipe, and a text file of the user's own."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import os
import socket
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from gpt2_jax.commands import prepare
from gpt2_jax.data import corpus, kjv
from gpt2_jax.data.tokenizer import gpt2_tokenizer
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc.token_shard import open_token_shard, write_token_shard


def test_the_built_in_text_is_whole_and_plain():
    chapters = kjv.kjv_chapters()
    assert len(chapters) == 1189
    assert sum(len(chapter.encode()) for chapter in chapters) > 4_000_000
    assert chapters[0].startswith("In the beginning God created the heaven and the earth. And the earth was without form")
    assert chapters[-1].endswith("The grace of our Lord Jesus Christ be with you all. Amen.")
    assert not any(character in chapter for chapter in chapters for character in "[]’")


@pytest.mark.parametrize(
    "content",
    # Without the time in it, which would give the test another name in every process.
    [b"", b"no gzip", gzip.compress(b"another text", mtime=0), gzip.compress(b"In the beginning", mtime=0)[:-9]],
)
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


def made(recipe: corpus.Recipe, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of both splits, through the files."""
    paths = list(corpus.write_corpus(recipe, "made", folder))
    assert [path.name for path in paths] == ["made_train.bin", "made_val.bin"]
    return np.asarray(open_token_shard(paths[0])), np.asarray(open_token_shard(paths[1]))


@pytest.mark.parametrize("error", [urllib.error.URLError("no network"), http.client.IncompleteRead(b"no network")])
def test_tinyshakespeare_without_a_network_is_an_honest_error(monkeypatch, tmp_path, error):
    def refuse(*arguments, **options):
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(Gpt2JaxError, match=r"found no way to it(.|\n)*python scripts/prepare_data.py"):
        made(corpus.tinyshakespeare, tmp_path)


@pytest.fixture
def download(monkeypatch):
    """A function that sets what a download gives."""
    return lambda content: monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: io.BytesIO(content))


def test_another_file_in_tinyshakespeares_place_is_refused(download, tmp_path):
    download(b"<html>")
    with pytest.raises(Gpt2JaxError, match="expected sha256"):
        made(corpus.tinyshakespeare, tmp_path)


def test_tinyshakespeares_recipe(monkeypatch, download, tmp_path):
    """The blank line stays with the part before it, the first tokens are for validation."""
    text = "A:\nOne.\n\nB:\nTwo.\n\nC:\nThree.\n"
    monkeypatch.setattr(corpus, "_TINYSHAKESPEARE_SHA256", hashlib.sha256(text.encode()).hexdigest())
    monkeypatch.setattr(corpus, "_TINYSHAKESPEARE_VALIDATION_TOKENS", 4)
    download(text.encode())
    train, validation = made(corpus.tinyshakespeare, tmp_path)
    expected = gpt2_tokenizer().encode("<|endoftext|>" + text.replace("\n\n", "\n\n<|endoftext|>"), allowed_special="all")
    assert validation.tolist() == expected[:4]
    assert train.tolist() == expected[4:]


def test_a_corpus_is_written_whole_or_not_at_all(tmp_path):
    def recipe(num_train: int, num_validation: int) -> corpus.Recipe:
        def write(train, validation):
            train.append(np.arange(num_train))
            validation.append(np.arange(num_validation))

        return write

    paths = corpus.write_corpus(recipe(5, 5), "text", tmp_path)
    for bad in (recipe(9, 0), recipe(0, 9), recipe(9, 2**16 + 1)):
        with pytest.raises(Gpt2JaxError, match=r"text_(train|val)\.bin: expected"):
            corpus.write_corpus(bad, "text", tmp_path)
    assert [open_token_shard(path).size for path in paths] == [5, 5]
    assert sorted(tmp_path.iterdir()) == sorted(paths)


@pytest.fixture
def dataset(tmp_path):
    """A function that makes a folder of nanoGPT's: files of uint16 by name."""
    folder = tmp_path / "shakespeare"
    folder.mkdir()

    def make(**files) -> Path:
        for name, ids in files.items():
            np.array(ids, "<u2").tofile(folder / f"{name}.bin")
        return folder

    return make


def test_nanogpts_splits_are_taken_over_as_they_are(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_TOKENS_AT_ONCE", 7)
    ids = np.random.default_rng(0).integers(0, 50257, 120)
    folder = dataset(train=ids[:100], val=ids[100:])
    train, validation = made(partial(corpus.nanogpt, folder / "train.bin"), tmp_path)
    assert (train.tolist(), validation.tolist()) == (ids[:100].tolist(), ids[100:].tolist())


@pytest.mark.parametrize("files", [{"train": range(100)}, {"mine": range(100), "val": [9]}], ids=["no val.bin", "another name"])
def test_of_a_nanogpt_file_that_is_alone_the_last_tenth_is_for_validation(dataset, tmp_path, files):
    path = dataset(**files) / f"{next(iter(files))}.bin"
    train, validation = made(partial(corpus.nanogpt, path), tmp_path)
    assert (train.tolist(), validation.tolist()) == ([*range(90)], [*range(90, 100)])


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "an odd number of bytes, 201"),
        (lambda path: np.array([*range(99), 50257], "<u2").tofile(path), "50257 at token 99"),
        (lambda path: (path.parent / "meta.pkl").touch(), "meta.pkl, which is of another"),
        (lambda path: write_token_shard(path, np.arange(100)), "a token shard of llm.c's format\n---> HINT: .*--train '/"),
        (lambda path: path.write_bytes(b""), "0 tokens"),
        (lambda path: os.truncate(path, 2**32), "at most 2147483647 tokens, .* found 2147483648\\n---> HINT: split -b .*'/"),
        (lambda path: path.unlink(), "no such file"),
    ],
    ids=["odd", "large id", "other vocabulary", "shard", "empty", "large", "missing"],
)
def test_what_is_no_file_of_nanogpts_is_refused(dataset, tmp_path, damage, found):
    path = dataset(train=range(100)).rename(tmp_path / "a folder") / "train.bin"
    damage(path)
    with pytest.raises(Gpt2JaxError, match=found):
        made(partial(corpus.nanogpt, path), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
