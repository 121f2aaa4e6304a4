"""The header that all of llm.c's binary files have: 256 32-bit words, checked before anything else is read."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.family import family_of_magic
from gpt2_jax.families.gpt2 import FILE_MAGIC
from gpt2_jax.files import file_size

HEADER_WORDS = 256
HEADER_BYTES = 4 * HEADER_WORDS

# Every magic number of llm.c's GPT-2 files, so that a reader can say what it was given instead.
MAGIC_MODEL = FILE_MAGIC
MAGIC_DEBUG_STATE = 20240327
MAGIC_TOKENIZER = 20240328
MAGIC_TOKEN_SHARD = 20240520
MAGIC_EVAL = 20240522
MAGIC_TRAINING_STATE = 20240527
_FILE_KINDS = {
    MAGIC_DEBUG_STATE: "a debug state file",
    MAGIC_TOKENIZER: "a tokenizer file",
    MAGIC_TOKEN_SHARD: "a token shard",
    MAGIC_EVAL: "a multiple-choice evaluation file",
    MAGIC_TRAINING_STATE: "a training state file",
    20240801: "a Llama-3 token shard",
    20240803: "a Llama-3 file",
}


def header_words(values: dict[int, int]) -> np.ndarray:
    """A header (256,) int32 with the given words set and every other word zero."""
    header = np.zeros(HEADER_WORDS, dtype="<i4")
    for index, value in values.items():
        header[index] = value
    return header


def read_header(
    path: str | os.PathLike, *, what: str, magic: int, versions: Sequence[int], hint: str
) -> tuple[np.ndarray, int]:
    """The header words (256,) int32 and the file's size in bytes, with magic and version checked.

    `what` names the expected kind of file and `hint` is the command that makes one; both go into the error.
    """
    size = file_size(path, what, hint)
    if size < HEADER_BYTES:
        raise Gpt2JaxError(f"{path}: expected {what} with a header of {HEADER_BYTES} bytes, found {size} bytes", hint)
    try:
        header = np.fromfile(path, dtype="<i4", count=HEADER_WORDS)
    except OSError as error:
        raise Gpt2JaxError(f"{path}: expected {what}, found a file that cannot be read: {error.strerror}", hint) from None
    if header[0] != magic:
        found = _kind_of_magic(int(header[0])) or "no file of llm.c's"
        raise Gpt2JaxError(f"{path}: expected {what} (magic {magic}), found magic {header[0]} ({found})", hint)
    if header[1] not in versions:
        expected = " or ".join(map(str, versions))
        raise Gpt2JaxError(f"{path}: expected {what} of version {expected}, found version {header[1]}", hint)
    return header, size


def check_size(path: str | os.PathLike, *, what: str, size: int, expected: int, hint: str) -> None:
    """Gpt2JaxError unless a file is exactly as long as its header says."""
    if size != expected:
        state = "truncated" if size < expected else "grown"
        raise Gpt2JaxError(f"{path}: expected {what} of {expected} bytes by its header, found {size} bytes ({state})", hint)


def read_array(path: str | os.PathLike, dtype: DTypeLike, count: int, offset: int) -> np.ndarray:
    """`count` elements from byte `offset` of a file whose size has been checked already."""
    try:
        array = np.fromfile(path, dtype=dtype, count=count, offset=offset)
    except OSError as error:
        raise Gpt2JaxError(f"{path}: expected {count} elements at byte {offset}, found: {error.strerror}") from None
    if array.size != count:
        raise Gpt2JaxError(f"{path}: expected {count} elements at byte {offset}, found {array.size}: the file changed")
    return array


def kind_of_file(path: str | os.PathLike) -> str | None:
    """The kind of llm.c file that the first word of a file says; None if it is no file of llm.c's."""
    try:
        word = np.fromfile(path, dtype="<i4", count=1)
    except OSError:
        return None
    return _kind_of_magic(int(word[0])) if word.size else None


def _kind_of_magic(magic: int) -> str | None:
    family = family_of_magic(magic)
    return f"a model file of the family {family.name}" if family else _FILE_KINDS.get(magic)
