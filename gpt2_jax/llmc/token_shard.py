"""llm.c's token shards: a header with the number of tokens, then one uint16 a token."""

from __future__ import annotations

import glob
import os
import re
import shlex
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.files import Writer, atomic_write, file_size
from gpt2_jax.llmc.header import (
    HEADER_BYTES,
    MAGIC_TOKEN_SHARD,
    check_size,
    header_words,
    kind_of_file,
    read_header,
)
from gpt2_jax.names import nearest_path

_PREPARE = "python scripts/prepare_data.py"
# What brings the shards whose names begin so, and how many of its tokens.
_DATASETS = {
    "edu_fineweb": ("edu_fineweb-shards", "1B"),
    "fineweb": ("fineweb", "10B"),
    "openwebtext": ("openwebtext", "1B"),
    "tinystories": ("tinystories", "1B"),
}
MAX_TOKENS = 2**31 - 1  # the count is an int32, in llm.c's reader too
_ENDS = 2**15  # tokens of either end that count for a checksum
_TOKENS_AT_ONCE = 2**20  # checked, converted and written
_COUNT = f"a row of 1 to {MAX_TOKENS} tokens"
_SPLIT_HINT = "split -C 4G SOURCE part_ and prepare each part: --train 'data/part_*_train.bin' takes all of their shards"


def takeover_command(path: str | os.PathLike) -> str:
    """The command that makes shards of a file of nanoGPT's."""
    return f"{_PREPARE} --source {shlex.quote(os.fspath(path))} --source-format nanogpt"


def hint_for(pattern: str | os.PathLike) -> str:
    """The command that brings the shards of this name or pattern: llm.c's published ones, or those made of a text."""
    folder, name = os.path.split(pattern)
    if (meant := _meant_by(os.fspath(pattern))) is not None:
        return f"{shlex.quote(meant)}   (the nearest name of token shards)"
    for prefix, (source, tokens) in _DATASETS.items():
        if name.startswith(prefix):
            of_100b = prefix == "fineweb" and "100B" in folder
            source, tokens = ("fineweb-100B", "100B") if of_100b else (source, tokens)
            return (
                f"{_PREPARE} --source {source} --tokens {tokens} --output-dir {shlex.quote(folder or '.')}   (needs a network)"
            )
    if "tiny" in name and "shakespeare" in name:
        return f"{_PREPARE} --source tinyshakespeare   (data/tinyshakespeare_train.bin)"
    if name.startswith("kjv_"):
        return _PREPARE
    if own := re.match(r"kjv(\d{3,5})_", name):
        return f"{_PREPARE} --vocabulary {own[1]}"
    return f"{_PREPARE} --source TEXT_FILE   (makes shards of a text; without --source of the built-in one)"


def _meant_by(pattern: str) -> str | None:
    """What there is instead of shards that are not there: the same pattern in the folder that was meant, or the shard of the
    nearest name. Validation shards never stand for training shards."""
    folder, name = os.path.split(pattern)
    if os.path.lexists(pattern) or glob.glob(pattern):
        return None
    elsewhere = os.path.join(nearest_path(folder) or folder, name)
    if os.path.lexists(elsewhere) or glob.glob(elsewhere):
        return elsewhere
    shard = nearest_path(pattern)
    if shard is None or kind_of_file(shard) != "a token shard":
        return None
    roles = [set(re.findall("train|val", text)) for text in (name, shard.name)]
    return str(shard) if not roles[0] or roles[0] == roles[1] else None


def open_token_shard(path: str | os.PathLike) -> np.memmap:
    """The tokens (num_tokens,) uint16 of a shard, memory-mapped: nothing is read until it is looked at."""
    what = "a token shard"
    file_size(path, what, hint_for(path))
    hint = (
        hint_for(path)
        if kind_of_file(path)
        else f"{takeover_command(path)}   (if it holds nanoGPT's tokens, which have no header)"
    )
    header, size = read_header(path, what=what, magic=MAGIC_TOKEN_SHARD, versions=(1,), hint=hint)
    num_tokens = int(header[2])
    if num_tokens < 1:
        raise Gpt2JaxError(f"{path}: expected at least 1 token, found {num_tokens} in the header", hint)
    check_size(path, what=what, size=size, expected=HEADER_BYTES + 2 * num_tokens, hint=hint)
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(num_tokens,))


def checksum(path: str | os.PathLike) -> str:
    """A few characters that tell a shard from others: of its tokens' number, and of the first and the last of them."""
    tokens = open_token_shard(path)
    ends = zlib.crc32(tokens[-_ENDS:].tobytes(), zlib.crc32(tokens[:_ENDS].tobytes()))
    return f"{len(tokens)}:{ends:08x}"


class TokenShardWriter:
    """A shard that is written as a stream; `token_shard_writer` makes one."""

    def __init__(self, path: str | os.PathLike, file: BinaryIO):
        self.num_tokens = 0
        self._path, self._file = path, file

    def append(self, tokens: np.ndarray) -> None:
        """Write further tokens (n,), any integer dtype, each below 65536; Gpt2JaxError for others, and for too many."""
        if tokens.ndim != 1:
            raise Gpt2JaxError(f"{self._path}: expected {_COUNT}, found shape {tokens.shape}")
        if self.num_tokens + tokens.size > MAX_TOKENS:
            raise Gpt2JaxError(f"{self._path}: expected {_COUNT}, found at least {self.num_tokens + tokens.size}", _SPLIT_HINT)
        for start in range(0, tokens.size, _TOKENS_AT_ONCE):
            part = tokens[start : start + _TOKENS_AT_ONCE]
            if part.min() < 0 or part.max() >= 2**16:
                raise Gpt2JaxError(f"{self._path}: expected token ids in [0, 65536), found {part.min()} to {part.max()}")
            self._file.write(np.ascontiguousarray(part, dtype="<u2").tobytes())
            self.num_tokens += part.size

    def truncate(self, num_tokens: int) -> None:
        """Drop all tokens but the first `num_tokens`."""
        self._file.seek(HEADER_BYTES + 2 * num_tokens)
        self._file.truncate()
        self.num_tokens = num_tokens

    def move_last(self, num_tokens: int, other: TokenShardWriter) -> None:
        """Move the last `num_tokens` tokens to the end of another shard."""
        kept = self.num_tokens - num_tokens
        for start in range(kept, self.num_tokens, _TOKENS_AT_ONCE):
            self._file.seek(HEADER_BYTES + 2 * start)
            count = min(_TOKENS_AT_ONCE, self.num_tokens - start)
            other.append(np.frombuffer(self._file.read(2 * count), dtype="<u2"))
        self.truncate(kept)

    def write_header(self) -> None:
        """Write how many tokens there are; called once, before the first of them (as 0) and after the last."""
        self._file.seek(0)
        self._file.write(header_words({0: MAGIC_TOKEN_SHARD, 1: 1, 2: self.num_tokens}).tobytes())


@contextmanager
def token_shard_writer(path: str | os.PathLike, *, write: Writer = atomic_write) -> Iterator[TokenShardWriter]:
    """Write a shard of 1 to 2**31 - 1 tokens as a stream; `path` gets its name when all of it is there."""
    with write(path) as file:
        writer = TokenShardWriter(path, file)
        writer.write_header()  # keeps its place
        yield writer
        if not writer.num_tokens:
            raise Gpt2JaxError(f"{path}: expected {_COUNT}, found none")
        writer.write_header()


def write_token_shard(path: str | os.PathLike, tokens: np.ndarray, *, write: Writer = atomic_write) -> None:
    """Write tokens (num_tokens,), any integer dtype, each below 65536."""
    with token_shard_writer(path, write=write) as writer:
        writer.append(tokens)
