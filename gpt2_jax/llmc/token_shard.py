"""llm.c's token shards: a header with the number of tokens, then one uint16 a token."""

from __future__ import annotations

import os

import numpy as np

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.files import Writer, atomic_write
from gpt2_jax.llmc.header import (
    HEADER_BYTES,
    MAGIC_TOKEN_SHARD,
    check_size,
    header_words,
    read_header,
)

HINT = "python scripts/prepare_data.py"
_MAX_TOKENS = 2**31 - 1  # the count is an int32, in llm.c's reader too


def open_token_shard(path: str | os.PathLike) -> np.memmap:
    """The tokens (num_tokens,) uint16 of a shard, memory-mapped: nothing is read until it is looked at."""
    what = "a token shard"
    header, size = read_header(path, what=what, magic=MAGIC_TOKEN_SHARD, versions=(1,), hint=HINT)
    num_tokens = int(header[2])
    if num_tokens < 1:
        raise Gpt2JaxError(f"{path}: expected at least 1 token, found {num_tokens} in the header", HINT)
    check_size(path, what=what, size=size, expected=HEADER_BYTES + 2 * num_tokens, hint=HINT)
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(num_tokens,))


def write_token_shard(path: str | os.PathLike, tokens: np.ndarray, *, write: Writer = atomic_write) -> None:
    """Write tokens (num_tokens,), any integer dtype, each below 65536."""
    if tokens.ndim != 1 or not 1 <= tokens.size <= _MAX_TOKENS:
        raise Gpt2JaxError(f"{path}: expected a row of 1 to {_MAX_TOKENS} tokens, found shape {tokens.shape}")
    if tokens.min() < 0 or tokens.max() >= 2**16:
        raise Gpt2JaxError(f"{path}: expected token ids in [0, 65536), found {tokens.min()} to {tokens.max()}")
    with write(path) as file:
        file.write(header_words({0: MAGIC_TOKEN_SHARD, 1: 1, 2: tokens.size}).tobytes())
        file.write(np.ascontiguousarray(tokens, dtype="<u2").tobytes())
