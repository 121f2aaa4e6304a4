"""Text to shards as a stream: sources, splits, shards, workers, and what a killed preparation leaves."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax.commands import prepare as command
from gpt2_jax.data import corpus, sources
from gpt2_jax.data import prepare as module
from gpt2_jax.data.chunks import CutRuns
from gpt2_jax.data.prepare import Limits, prepare
from gpt2_jax.data.sources import open_source
from gpt2_jax.data.tokenizer import gpt2_tokenizer
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc.token_shard import open_token_shard, write_token_shard

END = 50256
TENTH = Limits(0.1)


def made(source: str | os.PathLike, folder: Path, limits: Limits = TENTH, field: str = "text", **options):
    """The shards' tokens by their names, through the files."""
    written = prepare(open_source(str(source), field), folder, limits, cuts=CutRuns(), **options)
    shards = {path.name: np.asarray(open_token_shard(path)) for path in written}
    assert [shard.size for shard in shards.values()] == [*written.values()]
    assert sorted(path.name for path in folder.iterdir()) == sorted(shards)
    return shards


def both(source: Path, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    shards = made(source, folder)
    assert [*shards] == [f"{source.stem}_train.bin", f"{source.stem}_val.bin"]
    train, validation = shards.values()
    return train, validation


def texts_of(*shards: np.ndarray) -> list[str]:
    """The documents of shards."""
    found = []
    for shard in shards:
        assert shard[0] == END
        found += gpt2_tokenizer().decode(shard.tolist()).split("<|endoftext|>")[1:]
    return found


def sentences(count: int) -> list[str]:
    return [f"Document {i} has {i * i} words of its own: {'word ' * (i % 7)}." for i in range(count)]


@pytest.fixture
def book(tmp_path):
    return tmp_path / "book.txt"


def test_a_text_file_splits_into_documents_and_a_last_tenth(book, tmp_path):
    book.write_text("Hello world " * 50 + "<|endoftext|>" + "Hello " * 50, encoding="utf-8")
    train, validation = both(book, tmp_path / "new" / "folder")
    tokens = np.concatenate([train, validation])
    assert validation.size == tokens.size // 10
    assert tokens.tolist() == corpus.encode_documents(["Hello world " * 50, "Hello " * 50]).tolist()


@pytest.mark.parametrize("blank", ["", " ", "\n \u3000\n", " " * 100_000])
@pytest.mark.parametrize("texts", [("{}", "words " * 40), ("words " * 40, "{}"), ("one " * 20, "{}", "{}", "two " * 20)])
def test_documents_of_white_space_alone_are_left_out(book, tmp_path, texts, blank):
    book.write_text("<|endoftext|>".join(texts).replace("{}", blank), encoding="utf-8")
    tokens = np.concatenate(both(book, tmp_path / "out"))
    assert tokens.tolist() == corpus.encode_documents([text for text in texts if text != "{}"]).tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc \xff", "expected a text file in UTF-8, found byte 0xff at 4"),
        ("Grüße".encode("latin-1"), "found byte 0xfc at 2\n---> HINT: iconv -f LATIN1 -t UTF-8 "),
        ("word ".encode("utf-16"), "found UTF-16\n---> HINT: iconv -f UTF-16 -t UTF-8 "),
        (b"Hi", "enough text for two splits, found 2 tokens\n---> HINT: "),
        (b" \n" * 100_000, "enough text for two splits, found 0 tokens\n---> HINT: "),
        (b"", "enough text for two splits, found 0 tokens\n---> HINT: "),
    ],
)
def test_unusable_text_files_are_refused(book, tmp_path, content, message):
    book.write_bytes(content)
    with pytest.raises(Gpt2JaxError, match=message):
        both(book, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_missing_text_file_is_refused(tmp_path):
    with pytest.raises(Gpt2JaxError, match="expected a text file"):
        both(tmp_path / "none.txt", tmp_path)


def test_tokens_given_as_text_are_refused_with_the_command_that_takes_them(tmp_path):
    folder = tmp_path / "shakespeare"
    folder.mkdir()
    np.array([50256, 0xD8FF] * 100, "<u2").tofile(folder / "train.bin")
    command = f"python scripts/prepare_data.py --source {folder / 'train.bin'} --source-format nanogpt"
    with pytest.raises(Gpt2JaxError, match=f"expected a text file in UTF-8, found .*\n---> HINT: {re.escape(command)}"):
        both(folder / "train.bin", tmp_path)
    with pytest.raises(Gpt2JaxError, match=f"expected a token shard .*\n---> HINT: {re.escape(command)}"):
        open_token_shard(folder / "train.bin")
    write_token_shard(folder / "train.bin", np.arange(100))
    with pytest.raises(
        Gpt2JaxError, match=r"expected a text file, found a token shard of llm.c's format\n---> HINT: .*--train "
    ):
        both(folder / "train.bin", tmp_path)


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    lines = "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts))
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


def write_parquet(path: Path, texts: list[str | None], field: str = "text", rows: int = 3) -> Path:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"id": list(range(len(texts))), field: pa.array(texts, pa.string())}), path, row_group_size=rows)
    return path


@pytest.mark.parametrize("name", ["d.jsonl", "d.ndjson", "d.jsonl.gz", "d.parquet", "d.txt", "d.txt.gz"])
def test_every_kind_of_file_has_the_same_tokens(tmp_path, name):
    texts, path = sentences(40), tmp_path / name
    if ".parquet" in name:
        write_parquet(path, texts)
    elif "json" in name:
        write_jsonl(path, texts)
    else:
        text = "<|endoftext|>".join(texts).encode()
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    shards = made(path, tmp_path / "out")
    assert [*shards] == ["d_train.bin", "d_val.bin"]
    train, validation = (texts_of(shard) for shard in shards.values())
    assert sorted([*train, *validation]) == sorted(texts)  # whole, each once
    assert 2 <= len(validation) <= 6
    assert train == [text for text in texts if text in train]  # in their order


def test_a_folder_a_glob_and_standard_input_are_sources(tmp_path, monkeypatch):
    texts, folder = sentences(30), tmp_path / "texts"
    (folder / "inner").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    write_jsonl(folder / "a.jsonl", texts[:10])
    write_parquet(folder / "b.parquet", [*texts[10:20], None])
    (folder / "inner" / "c.txt").write_text("<|endoftext|>".join(texts[20:]), encoding="utf-8")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / ".hidden" / "d.txt").write_text("hidden")
    shards = made(folder, tmp_path / "out")
    assert [*shards] == ["texts_train.bin", "texts_val.bin"]
    assert sorted(texts_of(*shards.values())) == sorted(texts)
    globbed = made(folder / "*.*l*", tmp_path / "out2")
    assert sorted(texts_of(*globbed.values())) == sorted(texts[:10])
    piped = io.TextIOWrapper(io.BytesIO("<|endoftext|>".join(texts).encode()))
    monkeypatch.setattr(sys, "stdin", piped)
    command.main(["--source", "-", "--output-dir", str(tmp_path / "out3")])
    paths = [tmp_path / "out3" / f"stdin_{split}.bin" for split in ("train", "val")]
    assert sorted(texts_of(*(open_token_shard(path) for path in paths))) == sorted(texts)


def test_shards_are_full_and_documents_whole(tmp_path):
    texts = sentences(60)
    shards = made(write_jsonl(tmp_path / "d.jsonl", texts), tmp_path / "out", Limits(0.2, shard_tokens=200))
    assert len(shards) > 4
    assert next(iter(shards)) == "d_train_000001.bin"
    for name, shard in shards.items():
        last = not (tmp_path / "out" / name.replace(name[-10:-4], f"{int(name[-10:-4]) + 1:06d}")).exists()
        assert shard.size >= 200 or last
        assert shard.size - len(gpt2_tokenizer().encode_ordinary(texts_of(shard)[-1])) - 1 < 200
    assert sorted(texts_of(*shards.values())) == sorted(texts)
    with pytest.raises(Gpt2JaxError, match=r"expected no numbered shards of d, found d_train_000001\.bin"):
        made(tmp_path / "d.jsonl", tmp_path / "out")


@given(
    lengths=st.lists(st.integers(0, 400), min_size=1, max_size=80),
    fraction=st.sampled_from([0.01, 0.1, 0.3, 0.9]),
    workers=st.integers(1, 4),
)
@settings(max_examples=25)
def test_the_split_has_its_fraction_whatever_the_number_of_workers(tmp_path_factory, lengths, fraction, workers):
    folder = tmp_path_factory.mktemp("split")
    texts = [f"{i}" + " word" * length for i, length in enumerate(lengths)]
    path = write_jsonl(folder / "d.jsonl", texts)
    if sum(map(len, texts)) < 300:
        return
    one = made(path, folder / "one", Limits(fraction), workers=1)
    many = made(path, folder / "many", Limits(fraction), workers=workers)
    assert {name: shard.tobytes() for name, shard in one.items()} == {name: shard.tobytes() for name, shard in many.items()}
    train, validation = (shard.size for shard in one.values())
    # The last document may be all that lacks or is too many.
    assert abs(validation - fraction * (train + validation)) <= max(lengths) + 4 + (train + validation) / len(texts)


def test_as_many_tokens_as_were_asked_for(tmp_path, capsys):
    write_jsonl(tmp_path / "d.jsonl", sentences(500))
    command.main(["--source", str(tmp_path / "d.jsonl"), "--output-dir", str(tmp_path / "out"), "--tokens", "0.5k"])
    total = sum(int(n.replace(",", "")) for n in re.findall(r"([\d,]+) tokens", capsys.readouterr().out))
    assert 500 <= total < 530


def test_no_validation_where_none_is_wanted(tmp_path):
    shards = made(write_jsonl(tmp_path / "d.jsonl", ["Hi", " ", "there"]), tmp_path / "out", Limits(0.0))
    assert [*shards] == ["d_train.bin"]
    assert texts_of(*shards.values()) == ["Hi", "there"]


class Killed(BaseException):
    """A process that ends anywhere."""


@pytest.mark.parametrize("long_document", [False, True])
def test_a_killed_preparation_goes_on_to_the_same_bytes(tmp_path, monkeypatch, long_document):
    """Killed after every few chunks, with what was written after the last record cut off."""
    monkeypatch.setattr("gpt2_jax.data.tokenizer._CHARACTERS_AT_ONCE", 500)
    monkeypatch.setattr(module, "CHUNK_LENGTH", 64)
    monkeypatch.setattr(module, "chunks", lambda parts: itertools.chain(chunks_of(parts, 64)))
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("<|endoftext|>".join([*sentences(20), " ", "long " * 900 if long_document else "x"]))
    write_jsonl(folder / "b.jsonl", [*sentences(40), "", "end"])
    limits = Limits(0.1, shard_tokens=150)
    straight = made(folder, tmp_path / "straight", limits)
    said, starts = [], 0
    while True:
        starts += 1
        left = itertools.count(17, -1)

        def advance(num_bytes, num_tokens, earlier=False, left=left):
            if num_tokens and not earlier and next(left) == 0:
                raise Killed

        try:
            killed = made(folder, tmp_path / "killed", limits, advance=advance, say=said.append, save_seconds=0.0)
            break
        except Killed:
            assert [path.name for path in (tmp_path / "killed").iterdir()] == [".texts.partial"]
    assert starts > 3
    assert len(said) == starts - 1
    assert {name: shard.tobytes() for name, shard in killed.items()} == {n: s.tobytes() for n, s in straight.items()}


def chunks_of(parts, length):
    from gpt2_jax.data.chunks import chunks

    return chunks(parts, length)


def test_a_source_that_changed_is_begun_anew(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", sentences(50))

    def die(num_bytes, num_tokens):
        if num_tokens > 0 and (tmp_path / "out" / ".d.partial" / "state.json").exists():
            raise Killed

    with pytest.raises(Killed):
        made(path, tmp_path / "out", advance=die, save_seconds=0.0)
    write_jsonl(path, ["another"] * 30)
    said = []
    shards = made(path, tmp_path / "out", say=said.append)
    assert said == []
    assert set(texts_of(*shards.values())) == {"another"}


def test_another_text_from_standard_input_does_not_go_on(tmp_path, monkeypatch):
    """Nothing tells one standard input from another but what it holds."""

    def give(text):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    def die(num_bytes, num_tokens):
        if num_tokens > 0 and (tmp_path / "out" / ".stdin.partial" / "state.json").exists():
            raise Killed

    text = "<|endoftext|>".join(sentences(50))
    give(text)
    with pytest.raises(Killed):
        made("-", tmp_path / "out", advance=die, save_seconds=0.0)
    give("another " + text)
    with pytest.raises(Gpt2JaxError, match=r"found another\n---> HINT: rm -r .*\.stdin\.partial"):
        made("-", tmp_path / "out")
    give(text)
    assert sorted(texts_of(*made("-", tmp_path / "out", say=lambda text: None).values())) == sorted(sentences(50))


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("d.jsonl", b'{"text": "a"}\n{"text": ', "on line 2 a JSON object .* found: "),
        ("d.jsonl", b"[" * 200_000, "on line 1 .* found: "),
        ("d.jsonl", b'["text"]', "on line 1 .* found list"),
        ("d.jsonl", b'{"content": "a", "n": 1}', "found only 'content', 'n'\n---> HINT: --text-field content"),
        ("d.jsonl", b'{"text": 7}', "found int there"),
        ("d.jsonl", b"\xff\xfe\x00", "on line 1 .* found: "),
        ("d.jsonl", b"x" * 100, "found more than 50 bytes"),
        ("d.txt.gz", b"no gzip", "cannot be read: Not a gzipped file"),
        ("d.txt.gz", gzip.compress(b"words " * 1000, mtime=0)[:-9], "cannot be read: "),
        ("d.txt", b"a\0b", "found a zero byte at 1"),
        ("d.parquet", b"PAR1", "expected a Parquet file with a column 'text' of text, found: "),
        ("d.parquet", b"PAR1" + b"\xff" * 64 + b"\xf0\xff\xff\x7fPAR1", "found: "),
    ],
)
def test_damaged_files_are_refused(tmp_path, monkeypatch, name, content, found):
    pytest.importorskip("pyarrow")
    if found.endswith("50 bytes"):
        monkeypatch.setattr(sources, "_MAX_LINE_BYTES", 50)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Gpt2JaxError, match=found):
        made(tmp_path / name, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("field", "found"), [("no", "found only 'id', 'text'\n---> HINT: --text-field text"), ("id", "found int64 there")]
)
def test_a_parquet_column_of_another_name_or_kind_is_refused(tmp_path, field, found):
    path = write_parquet(tmp_path / "d.parquet", ["a"] * 9)
    with pytest.raises(Gpt2JaxError, match=found):
        made(path, tmp_path / "out", field=field)


@given(data=st.data())
@settings(max_examples=40)
def test_a_parquet_file_with_changed_bytes_never_crashes(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    path = write_parquet(folder / "d.parquet", sentences(20))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    try:
        made(path, folder / "out")
    except Gpt2JaxError as error:
        assert "d.parquet" in str(error)  # noqa: PT017


def test_two_processes_never_prepare_the_same(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", sentences(50))

    def another(num_bytes, num_tokens):
        with pytest.raises(Gpt2JaxError, match="expected to prepare d, found another process doing so"):
            made(path, tmp_path / "out")

    made(path, tmp_path / "out", advance=another)


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (["--tokens", "many"], "--tokens: expected a number of tokens such as 100M, found 'many'"),
        (["--tokens", "nan"], "found 'nan'"),
        (["--shard-tokens", "0"], "--shard-tokens: expected"),
        (["--validation-fraction", "1"], "expected 0 or more, below 1, found 1.0"),
        (["--workers", "0"], "--workers: expected 1 to 1024"),
    ],
)
def test_wrong_flags_are_refused(tmp_path, flags, found):
    (tmp_path / "d.txt").write_text("word " * 100)
    with pytest.raises(Gpt2JaxError, match=re.escape(found)):
        command.main(["--source", str(tmp_path / "d.txt"), "--output-dir", str(tmp_path), *flags])
