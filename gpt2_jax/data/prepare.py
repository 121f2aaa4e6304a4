"""Text of any size to token shards: read as a stream, tokenized by all CPUs, split by whole documents, resumed when killed."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import tiktoken

from gpt2_jax.data.chunks import CHUNK_LENGTH, Chunk, CutRuns, chunks
from gpt2_jax.data.corpus import output_folder
from gpt2_jax.data.sources import Source
from gpt2_jax.data.staging import SPLITS, SplitWriter, Staging, open_staging
from gpt2_jax.data.tokenizer import Encoded, encode_chunks, gpt2_tokenizer, token_bytes
from gpt2_jax.errors import Gpt2JaxError

SHARD_TOKENS = 100_000_000
_SAVE_SECONDS = 10.0  # between two records of how far it is
_VERSION = 1  # of the record; another one is not gone on from


@dataclass
class _Progress:
    """How far a preparation is: all that is needed to go on behind the last chunk that was written."""

    file: int = 0  # of the source's
    chunks: int = 0  # of this file that were written
    checksum: int = 0  # of their text
    documents: int = 0  # that were written whole
    split: str = "train"  # of the document that has begun
    start: int = 0  # tokens of this split before it
    is_blank: bool = True  # so far
    is_inside: bool = False  # whether a document has begun and not ended


@dataclass(frozen=True)
class Limits:
    """What of a source is taken, and how it is divided."""

    validation_fraction: float
    tokens: int | None = None  # stop with the document that reaches so many
    shard_tokens: int = SHARD_TOKENS
    numbered: bool = False  # number the shards even if each split has one


def prepare(
    source: Source,
    output_dir: str | os.PathLike,
    limits: Limits,
    *,
    tokenizer: tiktoken.Encoding | None = None,
    workers: int | None = None,
    cuts: CutRuns,
    advance: Callable[..., None] = lambda num_bytes, num_tokens, earlier=False: None,
    say: Callable[[str], None] = print,
    save_seconds: float = _SAVE_SECONDS,
) -> dict[Path, int]:
    """Write NAME_train.bin and NAME_val.bin, or where they are several or `limits` ask for it NAME_train_000001.bin …; returns
    their paths and numbers of tokens.

    A document is for validation when the validation split lacks half a mean document of its fraction. Of too few documents
    for that, the end of the last is taken. Documents of white space alone are left out. The files are the same whatever
    the number of workers, and whether or not the preparation was killed and started again. `advance` is called with the
    bytes that were read and the tokens that were written since, with earlier=True for those of a process before.

    Without a `tokenizer` the tokens are GPT-2's.
    """
    tokenizer = tokenizer or gpt2_tokenizer()
    folder = output_folder(output_dir)
    _refuse_older(folder, source.name)
    identity = {
        "version": _VERSION,
        "files": [[file.name, file.identity] for file in source.files],
        "limits": [limits.validation_fraction, limits.tokens, limits.shard_tokens],
        "chunk": CHUNK_LENGTH,
        "vocabulary": _digest(tokenizer),
    }
    with open_staging(folder, source.name, identity) as staging, ExitStack() as stack:
        progress = _Progress()
        counts: dict[str, list[int]] = {split: [] for split in SPLITS}
        if (saved := staging.progress) is not None:
            try:
                progress, counts = _Progress(**saved["at"]), saved["counts"]
            except (KeyError, TypeError):
                progress = _Progress()
        writers = {}
        for split in SPLITS:
            writers[split] = SplitWriter(staging.folder, split, limits.shard_tokens, counts[split])
            stack.callback(writers[split].close, complete=False)
        if progress.documents or progress.chunks:
            done = sum(writer.num_tokens for writer in writers.values())
            again = "; give the same text again" if source.files[0].name == "standard input" else ""
            say(f"going on with {staging.folder}: {done:,} tokens are there{again}")
            advance(sum(file.size or 0 for file in source.files[: progress.file]), done, earlier=True)
        _write(source, limits, staging, progress, writers, tokenizer, workers, cuts, advance, save_seconds)
        _make_validation(source, limits, writers)
        named = _names(folder, source.name, writers, numbered=limits.numbered)
        for writer in writers.values():
            writer.close(complete=True)
        for path, (staged, _) in named.items():
            os.replace(staged, path)
    return {path: count for path, (_, count) in named.items()}


def _write(
    source: Source,
    limits: Limits,
    staging: Staging,
    progress: _Progress,
    writers: dict[str, SplitWriter],
    tokenizer: tiktoken.Encoding,
    workers: int | None,
    cuts: CutRuns,
    advance: Callable[..., None],
    save_seconds: float,
) -> None:
    """Write all documents of the source, or as many as the limits say."""
    read, saved_at = 0, time.monotonic()

    def count(num_bytes: int) -> None:
        nonlocal read
        read += num_bytes

    def total() -> int:
        return sum(writer.num_tokens for writer in writers.values())

    for number in range(progress.file, len(source.files)):
        skipped = progress.chunks if number == progress.file else 0
        if number != progress.file:
            progress.file, progress.chunks, progress.checksum = number, 0, 0
        parts = _chunks_of(source, number, count)
        _skip(parts, skipped, progress.checksum, source.files[number].name, staging.folder)
        encoded = encode_chunks(tokenizer, cuts.watch(parts), workers=workers, begins=not progress.is_inside)
        for one in encoded:
            before = total()
            _write_chunk(one, limits, progress, writers)
            advance(read, total() - before)
            read = 0
            if not progress.is_inside and limits.tokens is not None and total() >= limits.tokens:
                encoded.close()
                return
            if (now := time.monotonic()) - saved_at >= save_seconds:
                _save(staging, progress, writers)
                saved_at = now


def tokens_of_source(source: Source, tokenizer: tiktoken.Encoding, most: int | None = None) -> np.ndarray:
    """The tokens (num_tokens,) uint16 of a source's documents that are not blank, each behind an end-of-text token; of more
    than `most` the first so many."""
    rows: list[np.ndarray] = []
    num_tokens, start, is_blank = 0, 0, True
    for file in source.files:
        for one in encode_chunks(tokenizer, chunks(file.documents(lambda num_bytes: None))):
            if one.begins_document:
                start, is_blank = len(rows), True
            is_blank = is_blank and not one.chunk.text.strip()
            rows.append(one.tokens)
            num_tokens += one.tokens.size
            if one.chunk.ends_document and is_blank:
                num_tokens -= sum(row.size for row in rows[start:])
                del rows[start:]
            if most is not None and num_tokens >= most:
                return np.concatenate(rows)[:most]
    return np.concatenate(rows) if rows else np.zeros(0, np.uint16)


def _digest(tokenizer: tiktoken.Encoding) -> str:
    """What tells one vocabulary from another."""
    return hashlib.sha256(b"\0".join(token_bytes(tokenizer))).hexdigest()


def _chunks_of(source: Source, number: int, count: Callable[[int], None]) -> Iterator[Chunk]:
    return chunks(source.files[number].documents(count))


def _skip(parts: Iterator[Chunk], number: int, checksum: int, name: str, folder: Path) -> None:
    """Pass over the chunks that are written already; Gpt2JaxError when they are others than those."""
    found = 0
    for chunk in islice(parts, number):
        found = _checksum(chunk, found)
    if found != checksum:
        raise Gpt2JaxError(
            f"{name}: expected the text of the preparation that was stopped, found another",
            f"rm -r {shlex.quote(str(folder))}   (begins anew)",
        )


def _checksum(chunk: Chunk, before: int) -> int:
    return zlib.crc32(chunk.text.encode("utf-8", "surrogatepass"), before)


def _write_chunk(one: Encoded, limits: Limits, progress: _Progress, writers: dict[str, SplitWriter]) -> None:
    if one.begins_document:
        progress.split = _split_of_next(limits.validation_fraction, progress.documents, writers)
        progress.start, progress.is_blank = writers[progress.split].num_tokens, True
    writer = writers[progress.split]
    progress.is_inside = not one.chunk.ends_document
    progress.is_blank = progress.is_blank and not one.chunk.text.strip()
    progress.chunks += 1
    progress.checksum = _checksum(one.chunk, progress.checksum)
    # An empty document need not begin a shard.
    if not (one.chunk.ends_document and one.begins_document and progress.is_blank):
        writer.append(one.tokens, begins_document=one.begins_document)
        if one.chunk.ends_document and progress.is_blank:
            writer.truncate(progress.start)
    if one.chunk.ends_document and not progress.is_blank:
        progress.documents += 1


def _split_of_next(fraction: float, documents: int, writers: dict[str, SplitWriter]) -> str:
    """The split of the next document: what the validation lacks of its fraction is compared with half a mean document."""
    validation = writers["val"].num_tokens
    total = writers["train"].num_tokens + validation
    return "val" if documents and fraction * total - validation >= total / documents / 2 else "train"


def _save(staging: Staging, progress: _Progress, writers: dict[str, SplitWriter]) -> None:
    for writer in writers.values():
        writer.flush()
    staging.save({"at": vars(progress), "counts": {split: writer.counts for split, writer in writers.items()}})


def _make_validation(source: Source, limits: Limits, writers: dict[str, SplitWriter]) -> None:
    """The end of the training tokens for the validation, where there were too few documents; Gpt2JaxError if that is less
    than two tokens."""
    train, validation = writers["train"], writers["val"]
    total = train.num_tokens + validation.num_tokens
    place = source.files[0].name if len(source.files) == 1 else source.name
    if total < 1 or limits.validation_fraction == 0:
        if total < 1:
            raise Gpt2JaxError(f"{place}: expected enough text for two splits, found 0 tokens", "a text of at least 20 tokens")
        return
    if validation.num_tokens:
        return
    count = min(int(total * limits.validation_fraction), train.counts[-1] - 1)
    if count < 2:
        raise Gpt2JaxError(
            f"{place}: expected enough text for two splits, found {total} tokens",
            "a text of at least 20 tokens, or --validation-fraction 0",
        )
    train.move_last(count, validation)


def _names(folder: Path, name: str, writers: dict[str, SplitWriter], *, numbered: bool) -> dict[Path, tuple[Path, int]]:
    """The shards' names: where they lie until then, and their tokens."""
    numbered = numbered or any(len(writer.counts) > 1 for writer in writers.values())
    named = {}
    for split, writer in writers.items():
        for staged, count in zip(writer.paths, writer.counts, strict=True):
            number = staged.stem.removeprefix(split) if numbered else ""
            named[folder / f"{name}_{split}{number}.bin"] = (staged, count)
    return named


def _refuse_older(folder: Path, name: str) -> None:
    """Gpt2JaxError where numbered shards of this name are there: a pattern would take those that stay for this one's."""
    of_the_name = re.compile(rf"{re.escape(name)}_(train|val)_\d{{6}}\.bin")
    for path in sorted(folder.glob("*.bin")):
        if of_the_name.fullmatch(path.name):
            pattern = shlex.quote(str(folder / name))
            raise Gpt2JaxError(
                f"{folder}: expected no numbered shards of {name}, found {path.name}",
                f"--output-dir DIR, or rm {pattern}_train_??????.bin {pattern}_val_??????.bin",
            )
