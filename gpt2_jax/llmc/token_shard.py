"""llm.c's token shards: a header with the number of tokens, then one uint16 a token."""

from __future__ import annotations

import os
import shlex

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

_PREPARE = "python scripts/prepare_data.py"
# llm.c's published shards, of 100M tokens each; shard 0 is the validation data.
_PUBLISHED = {
    "edu_fineweb": "https://huggingface.co/datasets/karpathy/fineweb-edu-100B-gpt2-token-shards/resolve/main/",
    "fineweb": "https://huggingface.co/datasets/chrisdryden/FineWebTokenizedGPT2/resolve/main/",
}
_MAX_TOKENS = 2**31 - 1  # the count is an int32, in llm.c's reader too


def hint_for(pattern: str | os.PathLike) -> str:
    """The command that brings the shards of this name or pattern: llm.c's published ones, or those made of a text."""
    folder, name = os.path.split(pattern)
    for kind, url in _PUBLISHED.items():
        if name.startswith(kind):
            files = f"{kind}_{{val_000000,train_000001,train_000002}}.bin"
            output = shlex.quote(f"{os.path.join(folder, kind)}_#1.bin")
            return f"curl -fL --create-dirs -o {output} '{url}{files}'   (100M tokens a shard; up to train_001000)"
    if "tiny" in name and "shakespeare" in name:
        return f"{_PREPARE} --source tinyshakespeare   (data/tinyshakespeare_train.bin)"
    if name.startswith("kjv_"):
        return _PREPARE
    return f"{_PREPARE} --source TEXT_FILE   (makes shards of a text; without --source of the built-in one)"


def open_token_shard(path: str | os.PathLike) -> np.memmap:
    """The tokens (num_tokens,) uint16 of a shard, memory-mapped: nothing is read until it is looked at."""
    what, hint = "a token shard", hint_for(path)
    header, size = read_header(path, what=what, magic=MAGIC_TOKEN_SHARD, versions=(1,), hint=hint)
    num_tokens = int(header[2])
    if num_tokens < 1:
        raise Gpt2JaxError(f"{path}: expected at least 1 token, found {num_tokens} in the header", hint)
    check_size(path, what=what, size=size, expected=HEADER_BYTES + 2 * num_tokens, hint=hint)
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
