"""Corpora that are made in one go: the built-in text, llm.c's tinyshakespeare, nanoGPT's tokens.

Every document begins with the end-of-text token, as in llm.c's shards. What makes a corpus writes both splits as streams, so
that memory does not limit how large it is.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from gpt2_jax.data.chunks import chunks
from gpt2_jax.data.download import WITHOUT_NETWORK, download
from gpt2_jax.data.kjv import kjv_chapters
from gpt2_jax.data.tokenizer import encode_chunks, gpt2_tokenizer
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.files import file_size, remove_abandoned_temporaries, write_together
from gpt2_jax.llmc.header import kind_of_file, read_array
from gpt2_jax.llmc.token_shard import MAX_TOKENS, TokenShardWriter, token_shard_writer

# Writes a corpus's tokens: to the training shard and to the validation shard.
Recipe = Callable[[TokenShardWriter, TokenShardWriter], None]

_KJV_VALIDATION_EVERY = 20  # every 20th chapter is for validation, so that both splits have every book
_TINYSHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
_TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
_TINYSHAKESPEARE_VALIDATION_TOKENS = 32768
_TINYSHAKESPEARE_MAX_BYTES = 10_000_000
VALIDATION_FRACTION = 0.1
_TOKENS_AT_ONCE = 2**20
NANOGPT_HINT = "--source openwebtext/train.bin   (or shakespeare/train.bin, which have GPT-2's tokens)"


def kjv(train: TokenShardWriter, validation: TokenShardWriter) -> None:
    """The built-in text: every 20th chapter of the King James Bible for validation, the others for training."""
    chapters = kjv_chapters()
    validation.append(encode_documents(chapters[_KJV_VALIDATION_EVERY - 1 :: _KJV_VALIDATION_EVERY]))
    train.append(encode_documents([chapter for i, chapter in enumerate(chapters) if (i + 1) % _KJV_VALIDATION_EVERY]))


def tinyshakespeare(train: TokenShardWriter, validation: TokenShardWriter) -> None:
    """llm.c's recipe: a document begins at every blank line, the first 32,768 tokens are for validation.

    Downloaded; Gpt2JaxError when there is no network or the file is another.
    """
    content = download(_TINYSHAKESPEARE_URL, "tinyshakespeare", _TINYSHAKESPEARE_MAX_BYTES)
    digest = hashlib.sha256(content).hexdigest()
    if digest != _TINYSHAKESPEARE_SHA256:
        raise Gpt2JaxError(f"tinyshakespeare: expected sha256 {_TINYSHAKESPEARE_SHA256}, found {digest}", WITHOUT_NETWORK)
    # The blank line stays with the part before it.
    parts = content.decode("utf-8").split("\n\n")
    tokens = encode_documents([*(part + "\n\n" for part in parts[:-1]), parts[-1]])
    train.append(tokens[_TINYSHAKESPEARE_VALIDATION_TOKENS:])
    validation.append(tokens[:_TINYSHAKESPEARE_VALIDATION_TOKENS])


def nanogpt(
    path: str | os.PathLike,
    train: TokenShardWriter,
    validation: TokenShardWriter,
    *,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """A file of nanoGPT's, whose GPT-2 tokens are taken over as they are: 16 bits each, no header.

    Beside a `train.bin` its `val.bin` is the validation split; of any other file the last tenth is.
    Gpt2JaxError for an odd number of bytes, for ids that GPT-2 has not, and beside a `meta.pkl`, which says that the ids are
    of another vocabulary.
    """
    path = Path(path)
    files = {path: train}
    if (other := nanogpt_validation(path)) is not None:
        files[other] = validation
    for file, shard in files.items():
        for tokens in _nanogpt_tokens(file):
            shard.append(tokens)
            advance(tokens.nbytes)
    if other is None:
        _move_last_tenth(path, train, validation)


def nanogpt_validation(path: str | os.PathLike) -> Path | None:
    """The val.bin that lies beside a train.bin."""
    other = Path(path).with_name("val.bin")
    return other if Path(path).name == "train.bin" and other.exists() else None


def _nanogpt_tokens(path: Path) -> Iterator[np.ndarray]:
    """The tokens uint16 of a file, some at a time."""
    what = "nanoGPT's tokens, 16 bits each without a header"
    size = file_size(path, what, NANOGPT_HINT)
    _refuse_llmc_file(path, what)
    meta = path.with_name("meta.pkl")
    if meta.exists():
        raise Gpt2JaxError(f"{path}: expected {what}, of GPT-2's vocabulary, found {meta}, which is of another", NANOGPT_HINT)
    if size % 2:
        raise Gpt2JaxError(f"{path}: expected {what}, found an odd number of bytes, {size}", NANOGPT_HINT)
    if size // 2 > MAX_TOKENS:
        split = f"split -b 4000000000 --additional-suffix=.bin {shlex.quote(os.fspath(path))} part_"
        raise Gpt2JaxError(
            f"{path}: expected at most {MAX_TOKENS} tokens, as many as a shard holds, found {size // 2}",
            f"{split}   (and take each part over: --train 'data/part_*_train.bin' takes all of their shards)",
        )
    vocab_size = gpt2_tokenizer().n_vocab
    for start in range(0, size // 2, _TOKENS_AT_ONCE):
        tokens = read_array(path, "<u2", min(_TOKENS_AT_ONCE, size // 2 - start), 2 * start)
        if tokens.max() >= vocab_size:
            first = int(np.argmax(tokens >= vocab_size))
            raise Gpt2JaxError(
                f"{path}: expected token ids below {vocab_size}, found {tokens[first]} at token {start + first}", NANOGPT_HINT
            )
        yield tokens


def _refuse_llmc_file(path: str | os.PathLike, what: str) -> None:
    """Gpt2JaxError for a file of llm.c's where another is expected."""
    if (kind := kind_of_file(path)) is not None:
        source = shlex.quote(os.fspath(path))
        hint = f"python scripts/train.py --train {source}" if kind == "a token shard" else "the text that it was made of"
        raise Gpt2JaxError(f"{path}: expected {what}, found {kind} of llm.c's format", hint)


def _move_last_tenth(path: str | os.PathLike, train: TokenShardWriter, validation: TokenShardWriter) -> None:
    """Move the last tenth of the training tokens to the validation split; Gpt2JaxError if that is less than two."""
    count = int(train.num_tokens * VALIDATION_FRACTION)
    if count < 2:
        raise Gpt2JaxError(
            f"{path}: expected enough text for two splits, found {train.num_tokens} tokens", "a file of at least 20 tokens"
        )
    train.move_last(count, validation)


def encode_documents(texts: Sequence[str]) -> np.ndarray:
    """All documents' GPT-2 tokens in a row, uint16, each document after an end-of-text token."""
    parts = chunks((text, True) for text in texts)
    return np.concatenate([encoded.tokens for encoded in encode_chunks(gpt2_tokenizer(), parts)])


def write_corpus(recipe: Recipe, name: str, output_dir: str | os.PathLike) -> dict[Path, int]:
    """Write NAME_train.bin and NAME_val.bin, both or on an error neither; returns their paths and numbers of tokens.

    What an earlier process has left half-written of them, since it was killed, is removed.
    """
    folder = output_folder(output_dir)
    train_path, validation_path = folder / f"{name}_train.bin", folder / f"{name}_val.bin"
    for path in (train_path, validation_path):
        remove_abandoned_temporaries(path)
    with (
        write_together() as write,
        token_shard_writer(train_path, write=write) as train,
        token_shard_writer(validation_path, write=write) as validation,
    ):
        recipe(train, validation)
    return {train_path: train.num_tokens, validation_path: validation.num_tokens}


def output_folder(output_dir: str | os.PathLike) -> Path:
    """The folder, made if it was not there; Gpt2JaxError when it cannot be made."""
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Gpt2JaxError(f"{folder}: expected a folder to write to, found: {error.strerror}") from None
    return folder
