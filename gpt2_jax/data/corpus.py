"""Text to token shards: the built-in text, llm.c's tinyshakespeare, or a file of the user's own; HellaSwag's questions.

Every document begins with the end-of-text token, as in llm.c's shards.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2_jax.data.kjv import kjv_chapters
from gpt2_jax.data.tokenizer import END_OF_TEXT, gpt2_tokenizer
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.files import read_text_file, write_together
from gpt2_jax.llmc.eval_file import NUM_COMPLETIONS, MultipleChoice, write_eval_file
from gpt2_jax.llmc.token_shard import write_token_shard

_KJV_VALIDATION_EVERY = 20  # every 20th chapter is for validation, so that both splits have every book
_TINYSHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
_TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
_TINYSHAKESPEARE_VALIDATION_TOKENS = 32768
_FILE_VALIDATION_FRACTION = 0.1


class Corpus(NamedTuple):
    """Token ids of both splits, uint16 each."""

    train: np.ndarray
    validation: np.ndarray


def kjv() -> Corpus:
    """The built-in corpus: every 20th chapter of the King James Bible for validation, the others for training."""
    chapters = kjv_chapters()
    validation = chapters[_KJV_VALIDATION_EVERY - 1 :: _KJV_VALIDATION_EVERY]
    train = [chapter for i, chapter in enumerate(chapters) if (i + 1) % _KJV_VALIDATION_EVERY]
    return Corpus(encode_documents(train), encode_documents(validation))


def tinyshakespeare() -> Corpus:
    """llm.c's recipe: a document begins at every blank line, the first 32,768 tokens are for validation.

    Downloaded; Gpt2JaxError when there is no network or the file is another.
    """
    try:
        with urllib.request.urlopen(_TINYSHAKESPEARE_URL, timeout=30) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise Gpt2JaxError(
            f"tinyshakespeare: expected to download {_TINYSHAKESPEARE_URL}, found no way to it: {error}",
            "python scripts/prepare_data.py   (the built-in text, no network needed)",
        ) from None
    return tinyshakespeare_from_bytes(content)


def tinyshakespeare_from_bytes(content: bytes) -> Corpus:
    """The corpus from the file's bytes, which are checked against the known SHA-256."""
    digest = hashlib.sha256(content).hexdigest()
    if digest != _TINYSHAKESPEARE_SHA256:
        raise Gpt2JaxError(f"tinyshakespeare: expected sha256 {_TINYSHAKESPEARE_SHA256}, found {digest}")
    # The blank line stays with the part before it.
    parts = content.decode("utf-8").split("\n\n")
    tokens = encode_documents([*(part + "\n\n" for part in parts[:-1]), parts[-1]])
    return Corpus(tokens[_TINYSHAKESPEARE_VALIDATION_TOKENS:], tokens[:_TINYSHAKESPEARE_VALIDATION_TOKENS])


def text_file(path: str | os.PathLike) -> Corpus:
    """A UTF-8 text file; '<|endoftext|>' in it begins a new document. The last tenth of the tokens is for validation."""
    text = read_text_file(path, "a text file")
    tokens = encode_documents([document for document in text.split(END_OF_TEXT) if document.strip()])
    validation_tokens = int(len(tokens) * _FILE_VALIDATION_FRACTION)
    if validation_tokens < 2:
        raise Gpt2JaxError(f"{path}: expected enough text for two splits, found {len(tokens)} tokens")
    return Corpus(tokens[:-validation_tokens], tokens[-validation_tokens:])


def encode_documents(documents: Sequence[str]) -> np.ndarray:
    """All documents' GPT-2 tokens in a row, uint16, each document after an end-of-text token."""
    tokenizer = gpt2_tokenizer()
    rows = tokenizer.encode_ordinary_batch(list(documents))
    return np.array([token for row in rows for token in (tokenizer.eot_token, *row)], dtype=np.uint16)


def write_corpus(corpus: Corpus, name: str, output_dir: str | os.PathLike) -> tuple[Path, Path]:
    """Write NAME_train.bin and NAME_val.bin, both or on an error neither, and return their paths."""
    folder = _output_folder(output_dir)
    paths = folder / f"{name}_train.bin", folder / f"{name}_val.bin"
    with write_together() as write:
        for path, tokens in zip(paths, corpus, strict=True):
            write_token_shard(path, tokens, write=write)
    return paths


def write_examples(examples: Sequence[MultipleChoice], name: str, output_dir: str | os.PathLike) -> Path:
    """Write NAME.bin and return its path."""
    path = _output_folder(output_dir) / f"{name}.bin"
    write_eval_file(path, examples)
    return path


def _output_folder(output_dir: str | os.PathLike) -> Path:
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Gpt2JaxError(f"{folder}: expected a folder to write to, found: {error.strerror}") from None
    return folder


def hellaswag(path: str | os.PathLike) -> list[MultipleChoice]:
    """The questions of HellaSwag's JSONL file (hellaswag_val.jsonl: 10,042), each ending after a space, as llm.c has them.

    Gpt2JaxError, naming the line, for one that is not an object with 'ctx', four 'endings' and the 'label' of one.
    """
    tokenizer = gpt2_tokenizer()
    lines = read_text_file(path, "HellaSwag's JSONL file").splitlines()
    examples = []
    for number, line in enumerate(lines, start=1):
        try:
            question = json.loads(line)
            context, endings, label = question["ctx"], question["endings"], question["label"]
            if not (context and isinstance(context, str) and len(endings) == NUM_COMPLETIONS and label in range(len(endings))):
                raise ValueError("other values")
            parts = [
                np.array(tokenizer.encode_ordinary(text), np.uint16) for text in (context, *(f" {end}" for end in endings))
            ]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Gpt2JaxError(
                f"{path}: expected an object with ctx, {NUM_COMPLETIONS} endings and the label of one on line {number}, "
                f"found: {error}"
            ) from None
        examples.append(MultipleChoice(int(label), parts[0], tuple(parts[1:])))
    return examples
