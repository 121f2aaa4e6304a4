"""Shards that a long preparation writes in a folder of its own, so that a killed one goes on where it was.

The folder `.NAME.partial` beside the shards has one file a shard and `state.json`: what is prepared, how far the source has
been read, and how many tokens each shard has up to there. What lies in the files beyond is cut off before going on.
The shards get their names when all of them are complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.files import atomic_write, read_text_file
from gpt2_jax.llmc.header import HEADER_BYTES
from gpt2_jax.llmc.token_shard import MAX_TOKENS, TokenShardWriter

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SPLITS = ("train", "val")
_MAX_STATE_BYTES = 10_000_000


class SplitWriter:
    """The shards of one split, each of `shard_tokens` tokens and the rest of the document that passes this number."""

    def __init__(self, folder: Path, split: str, shard_tokens: int, counts: list[int]):
        self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
        self._done, self._current = counts[:-1], None
        if counts:
            self._current = self._open(counts[-1])

    @property
    def counts(self) -> list[int]:
        """Tokens of each shard."""
        current = 0 if self._current is None else self._current[0].num_tokens
        return [*self._done, *([current] if current else [])]

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)

    @property
    def paths(self) -> list[Path]:
        return [self._path(number) for number in range(len(self.counts))]

    def append(self, tokens: np.ndarray, *, begins_document: bool) -> None:
        """Write tokens; a shard that is full ends where a document begins, or where llm.c's reader knows no larger one."""
        if self._current is not None:
            count = self._current[0].num_tokens
            if (begins_document and count >= self._shard_tokens) or count + tokens.size > MAX_TOKENS:
                self._end_shard()
        if self._current is None:
            self._current = self._open(0)
        self._current[0].append(tokens)

    def truncate(self, num_tokens: int) -> None:
        """Drop tokens of the last shard, all but the first `num_tokens` of the split."""
        if self._current is not None:
            self._current[0].truncate(max(0, num_tokens - sum(self._done)))

    def move_last(self, num_tokens: int, other: SplitWriter) -> None:
        """Move the last tokens of the last shard to the end of another split."""
        assert self._current is not None
        if other._current is None:
            other._current = other._open(0)
        self._current[0].move_last(num_tokens, other._current[0])

    def flush(self) -> None:
        """Bring to the disk what has been written."""
        if self._current is not None:
            _sync(self._current[1])

    def close(self, *, complete: bool) -> None:
        """Close the files; `complete` writes the last one's header."""
        if self._current is not None and complete and self._current[0].num_tokens:
            self._end_shard()
        elif self._current is not None:
            self._current[1].close()
            self._current = None

    def _end_shard(self) -> None:
        assert self._current is not None
        writer, file = self._current
        self._done.append(writer.num_tokens)
        writer.write_header()
        _sync(file)
        file.close()
        self._current = None

    def _open(self, count: int) -> tuple[TokenShardWriter, BinaryIO]:
        path = self._path(len(self._done))
        file = open(path, "r+b" if count else "w+b")  # noqa: SIM115 (open until the shard ends)
        writer = TokenShardWriter(path, file)
        writer.write_header()  # keeps its place
        writer.truncate(count)
        return writer, file

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._split}_{number + 1:06d}.bin"


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


class Staging:
    """The folder of a preparation; `open_staging` makes one."""

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.folder, self._identity = folder, identity
        self._state_path = folder / "state.json"
        self.progress = self._read()

    def save(self, progress: dict[str, Any]) -> None:
        """Keep how far the preparation is; everything that it tells of must be on the disk."""
        with atomic_write(self._state_path) as file:
            file.write(json.dumps({"identity": self._identity, "progress": progress}).encode("utf-8", "backslashreplace"))
        self.progress = progress

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self) -> dict[str, Any] | None:
        """The progress of an earlier process that prepared the same; None without one, or where its shards are not there."""
        try:
            text = read_text_file(self._state_path, "the state of a preparation", max_bytes=_MAX_STATE_BYTES)
            state = json.loads(text)
            progress = state["progress"]
            if state["identity"] != self._identity or not isinstance(progress, dict):
                return None
            for split in SPLITS:
                for number, count in enumerate(progress["counts"][split]):
                    size = os.path.getsize(self.folder / f"{split}_{number + 1:06d}.bin")
                    if type(count) is not int or size < HEADER_BYTES + 2 * count:
                        return None
        except (Gpt2JaxError, OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return progress


@contextmanager
def open_staging(output: Path, name: str, identity: dict[str, Any]) -> Iterator[Staging]:
    """The folder `.NAME.partial` of a preparation, kept from other processes. Left behind when the block ends with an error
    after progress was saved; removed otherwise."""
    folder = output / f".{name}.partial"
    try:
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise Gpt2JaxError(f"{folder}: expected to make a folder for what is half done, found: {error.strerror}") from None
    try:
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Gpt2JaxError(
                    f"{folder}: expected to prepare {name}, found another process doing so", "--output-dir DIR"
                ) from None
            except OSError:  # a file system without locks
                pass
        staging = Staging(folder, identity)
        try:
            yield staging
        except BaseException:
            if staging.progress is None:
                staging.remove()
            raise
        staging.remove()
    finally:
        os.close(descriptor)
