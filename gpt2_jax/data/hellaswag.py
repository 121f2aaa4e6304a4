"""HellaSwag's questions: from its JSONL file to llm.c's evaluation file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.data.corpus import output_folder
from gpt2_jax.data.download import download
from gpt2_jax.data.tokenizer import encode, gpt2_tokenizer
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.files import atomic_write, json_lines, read_text_file
from gpt2_jax.llmc.eval_file import NUM_COMPLETIONS, MultipleChoice, write_eval_file

_URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
_MAX_BYTES = 100_000_000


def read_hellaswag(path: str | os.PathLike) -> list[MultipleChoice]:
    """The questions of HellaSwag's JSONL file (hellaswag_val.jsonl: 10,042), each ending after a space, as llm.c has them.

    Gpt2JaxError, naming the line, for one that is not an object with 'ctx', four 'endings' and the 'label' of one, which
    may be a string of its digit.
    """
    tokenizer = gpt2_tokenizer()
    examples = []
    for number, line in json_lines(read_text_file(path, "HellaSwag's JSONL file")):
        try:
            question = json.loads(line)
            context, endings, label = question["ctx"], question["endings"], _label(question["label"])
            if not (context and isinstance(context, str) and isinstance(endings, list) and len(endings) == NUM_COMPLETIONS):
                raise ValueError(f"ctx {context!r:.40}, endings {endings!r:.40}")
            parts = [np.array(encode(tokenizer, text), np.uint16) for text in (context, *(f" {end}" for end in endings))]
        except KeyError as error:
            raise _refusal(path, number, f"no {error}") from None
        except (ValueError, TypeError, RecursionError) as error:
            raise _refusal(path, number, error) from None
        examples.append(MultipleChoice(label, parts[0], tuple(parts[1:])))
    return examples


def write_hellaswag(examples: Sequence[MultipleChoice], name: str, output_dir: str | os.PathLike) -> Path:
    """Write NAME.bin and return its path."""
    path = output_folder(output_dir) / f"{name}.bin"
    write_eval_file(path, examples)
    return path


def download_hellaswag(output_dir: str | os.PathLike) -> tuple[Path, int]:
    """Download hellaswag_val.jsonl and write hellaswag_val.bin; its path and the number of questions. Gpt2JaxError when there
    is no network, and for another file in its place."""
    folder = output_folder(output_dir)
    path = folder / "hellaswag_val.jsonl"
    if not path.exists():
        content = download(_URL, "HellaSwag's questions", _MAX_BYTES)
        with atomic_write(path) as file:
            file.write(content)
    examples = read_hellaswag(path)
    return write_hellaswag(examples, path.stem, output_dir), len(examples)


def _label(value: Any) -> int:
    """A number, or a string of one, as Hugging Face's copy of the file has it. ValueError for all else."""
    label = int(value) if isinstance(value, str) else value
    if type(label) is not int or label not in range(NUM_COMPLETIONS):
        raise ValueError(f"label {value!r:.40}")
    return label


def _refusal(path: str | os.PathLike, number: int, found: object) -> Gpt2JaxError:
    return Gpt2JaxError(
        f"{path}: expected an object with ctx, {NUM_COMPLETIONS} endings and the label of one on line {number}, found: {found}",
        "https://github.com/rowanz/hellaswag has hellaswag_val.jsonl; its test questions have no labels",
    )
