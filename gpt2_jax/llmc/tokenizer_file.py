"""llm.c's tokenizer file: for each token id in order one length byte and that many raw bytes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.files import Writer, atomic_write
from gpt2_jax.llmc.header import (
    HEADER_BYTES,
    MAGIC_TOKENIZER,
    header_words,
    read_header,
)

_HINT = "python scripts/write_starter_pack.py --init d12 --output-dir DIR   (writes gpt2_tokenizer.bin)"
_VERSION_1_TOKENS, _VERSION_1_END_OF_TEXT = 50257, 50256
_MAX_TOKENS = 2**16  # token shards hold 16 bits a token
_MAX_BYTES = HEADER_BYTES + 256 * _MAX_TOKENS


class TokenizerFile(NamedTuple):
    token_bytes: list[bytes]  # by id
    end_of_text: int


def read_tokenizer_file(path: str | os.PathLike) -> TokenizerFile:
    """Read version 2, or 1 (which must be GPT-2's vocabulary, as llm.c assumes)."""
    what = "a tokenizer file"
    header, size = read_header(path, what=what, magic=MAGIC_TOKENIZER, versions=(2, 1), hint=_HINT)
    version, num_tokens, end_of_text = map(int, header[1:4])
    if version == 1:
        end_of_text = _VERSION_1_END_OF_TEXT
        if num_tokens != _VERSION_1_TOKENS:
            raise Gpt2JaxError(f"{path}: expected {_VERSION_1_TOKENS} tokens in version 1, found {num_tokens}", _HINT)
    if not 1 <= num_tokens <= _MAX_TOKENS or not 0 <= end_of_text < num_tokens:
        raise Gpt2JaxError(
            f"{path}: expected 1 to {_MAX_TOKENS} tokens and an end-of-text id among them, "
            f"found {num_tokens} tokens and id {end_of_text}",
            _HINT,
        )
    if size > _MAX_BYTES:
        raise Gpt2JaxError(f"{path}: expected {what} of at most {_MAX_BYTES} bytes, found {size} bytes (grown)", _HINT)
    body = np.fromfile(path, dtype=np.uint8, offset=HEADER_BYTES).tobytes()
    tokens: list[bytes] = []
    position = 0
    for token_id in range(num_tokens):
        length = body[position] if position < len(body) else 0
        token = body[position + 1 : position + 1 + length]
        if length == 0 or len(token) != length:
            raise Gpt2JaxError(
                f"{path}: expected 1 to 255 bytes for token {token_id} of {num_tokens}, found the end of the file or an "
                f"empty token at byte {HEADER_BYTES + position} (truncated or damaged)",
                _HINT,
            )
        tokens.append(token)
        position += 1 + length
    check_end = len(body) - position
    if check_end:
        raise Gpt2JaxError(f"{path}: expected the end of the file after {num_tokens} tokens, found {check_end} bytes", _HINT)
    return TokenizerFile(tokens, end_of_text)


def write_tokenizer_file(
    path: str | os.PathLike, token_bytes: Sequence[bytes], end_of_text: int, *, write: Writer = atomic_write
) -> None:
    """Write version 2. Every token must have 1 to 255 bytes, and `end_of_text` be one of at most 65536 tokens."""
    if not 0 <= end_of_text < len(token_bytes) <= _MAX_TOKENS:
        raise Gpt2JaxError(
            f"{path}: expected 1 to {_MAX_TOKENS} tokens and an end-of-text id among them, "
            f"found {len(token_bytes)} tokens and id {end_of_text}"
        )
    for token_id, token in enumerate(token_bytes):
        if not 1 <= len(token) <= 255:
            raise Gpt2JaxError(f"{path}: expected 1 to 255 bytes for token {token_id}, found {len(token)}")
    with write(path) as file:
        file.write(header_words({0: MAGIC_TOKENIZER, 1: 2, 2: len(token_bytes), 3: end_of_text}).tobytes())
        file.write(b"".join(bytes([len(token)]) + token for token in token_bytes))
