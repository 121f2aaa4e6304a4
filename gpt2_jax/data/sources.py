"""Where text for training comes from: files, folders, globs, standard input and datasets of the Hugging Face hub.

A source is a list of files in a fixed order. Each is opened when its turn comes and read as a stream, in documents:
  *.jsonl, *.ndjson, also .gz   one document a line, the string under the field's name (JSON Lines)
  *.parquet                     one document a row, the string in the column of this name; needs the extra `data`
  any other                     UTF-8 text, also .gz, in which '<|endoftext|>' ends a document
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import re
import shlex
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from gpt2_jax.data.chunks import documents
from gpt2_jax.data.kjv import kjv_chapters
from gpt2_jax.data.tokenizer import END_OF_TEXT
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.files import decoded_blocks, file_size
from gpt2_jax.interop.hub import DATA_EXTRA, HubFile, dataset_files
from gpt2_jax.llmc.header import kind_of_file
from gpt2_jax.llmc.token_shard import takeover_command
from gpt2_jax.names import near

Advance = Callable[[int], None]  # is given the number of bytes of each block that was read

STANDARD_INPUT = "-"
DATASETS = {
    "tinystories": "hf:roneneldan/TinyStories:data/train-*.parquet",
    "fineweb": "hf:HuggingFaceFW/fineweb:sample/10BT/*.parquet",
    "fineweb-edu": "hf:HuggingFaceFW/fineweb-edu:sample/10BT/*.parquet",
    "fineweb-100B": "hf:HuggingFaceFW/fineweb:sample/100BT/*.parquet",
    "openwebtext": "hf:Skylion007/openwebtext:plain_text/*.parquet",
}
_JSON_LINES = (".jsonl", ".ndjson")
_TEXT = (".txt", ".text", ".md")
_MAX_LINE_BYTES = 2**26  # of JSON Lines, so that a file without line feeds does not fill the memory
_MAX_ROW_GROUP_BYTES = 2**34  # of a Parquet column, unpacked, as its header claims
_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    name: str  # for messages
    size: int | None  # bytes; None where the end is not known
    identity: str  # changes when the content does
    documents: Callable[[Advance], Iterator[tuple[str, bool]]]  # parts of documents, and whether one ends with the part


@dataclass(frozen=True)
class Source:
    """What a corpus is made of."""

    name: str  # of the corpus
    files: list[SourceFile]

    @property
    def size(self) -> int | None:
        sizes = [file.size for file in self.files]
        return None if None in sizes else sum(size for size in sizes if size is not None)


def open_source(source: str, field: str, hint: str | None = None) -> Source:
    """The files of a source, none of them read. `field` is the name of the text in JSON Lines and in Parquet.

    Gpt2JaxError for a file that is not there, with this hint, for a folder or glob without files, and for a dataset that
    the hub does not have or that cannot be asked for.
    """
    if source == STANDARD_INPUT:
        return Source("stdin", [SourceFile("standard input", None, "stdin", _documents_of_standard_input)])
    if source in DATASETS:
        return Source(source.removesuffix("-100B"), _hub_files(DATASETS[source], field))
    if source.startswith("hf:"):
        return Source(_safe_name(source.removeprefix("hf:").partition(":")[0].partition("@")[0]), _hub_files(source, field))
    if os.path.isdir(source):
        paths = [path for path in sorted(Path(source).rglob("*")) if _is_of_a_folder(path)]
        if not paths:
            kinds = ", ".join((*_TEXT, *_JSON_LINES, ".parquet"))
            raise Gpt2JaxError(f"{source}: expected a folder with files of text ({kinds}, also .gz), found a folder without")
        return Source(Path(source).resolve().name, [_local_file(path, field, hint) for path in paths])
    if not os.path.lexists(source) and glob.has_magic(source):
        paths = [Path(path) for path in sorted(glob.glob(os.path.expanduser(source), recursive=True)) if os.path.isfile(path)]
        if not paths:
            raise Gpt2JaxError(f"{source}: expected files of text, found none of such a name{near(source)}", hint)
        stem = re.sub(r"[^A-Za-z0-9]+$", "", re.split(r"[*?\[]", Path(source).name)[0])
        return Source(stem or Path(source).absolute().parent.name, [_local_file(path, field, hint) for path in paths])
    path = Path(source)
    return Source(_stem(path.name), [_local_file(path, field, hint)])


def built_in_source() -> Source:
    """The built-in text, each of its chapters a document."""

    def chapters(advance: Advance) -> Iterator[tuple[str, bool]]:
        for chapter in kjv_chapters():
            advance(len(chapter.encode()))
            yield chapter, True

    size = sum(len(chapter.encode()) for chapter in kjv_chapters())
    return Source("kjv", [SourceFile("the built-in text", size, "kjv", chapters)])


def beginning(source: Source, num_characters: int) -> Iterator[str]:
    """The texts that a source begins with, at least so many characters; the documents in parts."""
    for file in source.files:
        for text, _ in file.documents(lambda num_bytes: None):
            yield text
            num_characters -= len(text)
            if num_characters <= 0:
                return


def _safe_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", name.rpartition("/")[2]) or "dataset"


def _stem(name: str) -> str:
    return Path(name.removesuffix(".gz")).stem


def _kind(name: str) -> str:
    return Path(name.lower().removesuffix(".gz")).suffix


def _is_of_a_folder(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts[1:])
    return not hidden and path.is_file() and _kind(path.name) in (*_TEXT, *_JSON_LINES, ".parquet")


def _local_file(path: Path, field: str, hint: str | None) -> SourceFile:
    what = {".parquet": "a Parquet file"}.get(_kind(path.name), "a text file")
    if _kind(path.name) in _JSON_LINES:
        what = "a file of JSON Lines"
    size = file_size(path, what, hint)
    if (kind := kind_of_file(path)) is not None:
        text = shlex.quote(os.fspath(path))
        wanted = f"python scripts/train.py --train {text}" if kind == "a token shard" else "the text that it was made of"
        raise Gpt2JaxError(f"{path}: expected {what}, found {kind} of llm.c's format", wanted)
    status = os.stat(path)

    def opened() -> BinaryIO:
        return open(path, "rb")

    return SourceFile(
        str(path), size, f"{size} {status.st_mtime_ns}", lambda advance: _documents(str(path), what, opened, field, advance)
    )


def _hub_files(source: str, field: str) -> list[SourceFile]:
    def of(file: HubFile) -> SourceFile:
        what = "a file of a dataset"
        return SourceFile(
            file.name, file.size, file.identity, lambda advance: _documents(file.name, what, file.open, field, advance)
        )

    return [of(file) for file in dataset_files(source)]


def _documents(
    name: str, what: str, opened: Callable[[], BinaryIO], field: str, advance: Advance
) -> Iterator[tuple[str, bool]]:
    """The documents of a file by what its name says it is."""
    try:
        with opened() as raw:
            if _kind(name) == ".parquet":
                yield from _parquet_rows(raw, name, field, advance)
                return
            file = cast(BinaryIO, _Counted(raw, advance))
            if name.endswith(".gz"):
                file = cast(BinaryIO, gzip.GzipFile(fileobj=file))
            if _kind(name) in _JSON_LINES:
                yield from _json_lines(file, name, field)
            else:
                hint = f"{takeover_command(name)}   (if it holds nanoGPT's tokens)" if _kind(name) == ".bin" else None
                yield from documents(decoded_blocks(file, name, what, hint), END_OF_TEXT)
    except (OSError, EOFError, zlib.error) as error:
        raise Gpt2JaxError(f"{name}: expected {what}, found a file that cannot be read: {error}") from None


def _documents_of_standard_input(advance: Advance) -> Iterator[tuple[str, bool]]:
    if sys.stdin is None or sys.stdin.isatty():
        raise Gpt2JaxError(
            "standard input: expected a text from a pipe or a file, found a terminal",
            "python scripts/prepare_data.py --source FILE",
        )
    file = cast(BinaryIO, _Counted(sys.stdin.buffer, advance))
    yield from documents(decoded_blocks(file, "standard input", "a text"), END_OF_TEXT)


class _Counted:
    """A file for reading that tells how much of it has been read."""

    def __init__(self, file: IO[bytes], advance: Advance):
        self._file, self._advance = file, advance

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size)
        self._advance(len(block))
        return block

    def readline(self, size: int = -1) -> bytes:
        line = self._file.readline(size)
        self._advance(len(line))
        return line


def _json_lines(file: BinaryIO, name: str, field: str) -> Iterator[tuple[str, bool]]:
    number = 0
    while line := file.readline(_MAX_LINE_BYTES + 1):
        number += 1
        where = f"{name}: expected on line {number} a JSON object with the text under {field!r}"
        if len(line) > _MAX_LINE_BYTES:
            raise Gpt2JaxError(f"{where}, found more than {_MAX_LINE_BYTES:,} bytes")
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Gpt2JaxError(f"{where}, found: {error}") from None
        if not isinstance(record, dict):
            raise Gpt2JaxError(f"{where}, found {type(record).__name__}")
        text = record.get(field)
        if not isinstance(text, str):
            strings = [key for key, value in record.items() if isinstance(value, str)]
            found = (
                f"{type(text).__name__} there"
                if field in record
                else f"only {', '.join(map(repr, list(record)[:8])) or 'no key'}"
            )
            raise Gpt2JaxError(f"{where}, found {found}", _field_hint(strings))
        yield _without_half_pairs(text), True


def _without_half_pairs(text: str) -> str:
    """The text with U+FFFD for half a pair of UTF-16, which JSON can escape and UTF-8 has not."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _parquet_rows(file: BinaryIO, name: str, field: str, advance: Advance) -> Iterator[tuple[str, bool]]:
    """The rows of one column, some at a time; of each row group its part of the file's bytes is told as read."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise Gpt2JaxError(f"{name}: expected pyarrow, to read Parquet, found none", DATA_EXTRA) from None
    what = f"{name}: expected a Parquet file with a column {field!r} of text"
    try:
        table: Any = pq.ParquetFile(file)
        schema = table.schema_arrow

        def is_text(kind: Any) -> bool:
            return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))

        if field not in schema.names:
            columns = [column.name for column in schema if is_text(column.type)]
            raise Gpt2JaxError(f"{what}, found only {', '.join(map(repr, schema.names[:8]))}", _field_hint(columns))
        kind = schema.field(field).type
        if not is_text(kind):
            raise Gpt2JaxError(f"{what}, found {kind} there")
        for index in range(table.num_row_groups):
            group = table.metadata.row_group(index)
            claimed = sum(
                group.column(i).total_uncompressed_size
                for i in range(group.num_columns)
                if group.column(i).path_in_schema == field
            )
            if not 0 <= claimed <= _MAX_ROW_GROUP_BYTES:
                raise Gpt2JaxError(f"{what}, found a row group that claims {claimed:,} bytes of it")
            for batch in table.iter_batches(_ROWS_AT_ONCE, row_groups=[index], columns=[field]):
                for text in batch.column(0).to_pylist():
                    if text is not None:
                        yield text, True
            advance(sum(group.column(i).total_compressed_size for i in range(group.num_columns)))
    except (pa.ArrowException, UnicodeDecodeError, MemoryError, OverflowError) as error:
        message = str(error).partition("\n")[0] or type(error).__name__
        raise Gpt2JaxError(f"{what}, found: {message}") from None


def _field_hint(names: list[str]) -> str | None:
    return f"--text-field {shlex.quote(names[0])}" if names else None
