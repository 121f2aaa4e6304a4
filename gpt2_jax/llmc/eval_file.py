"""llm.c's multiple-choice evaluation files (hellaswag_val.bin): contexts, each with four completions, one of them right."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.files import atomic_write
from gpt2_jax.llmc.header import (
    HEADER_BYTES,
    MAGIC_EVAL,
    header_words,
    read_array,
    read_header,
)

NUM_COMPLETIONS = 4  # llm.c's scorer knows no other number
HINT = "python scripts/prepare_data.py --hellaswag hellaswag_val.jsonl"
_START_OF_EXAMPLE = 65535
_MAX_EXAMPLES = _MAX_EXAMPLE_BYTES = 2**16 - 1  # the index and the size of an example are 16 bits each


class MultipleChoice(NamedTuple):
    """One example, token ids uint16: completion number `label` continues the context rightly."""

    label: int
    context: np.ndarray
    completions: tuple[np.ndarray, ...]  # NUM_COMPLETIONS

    @property
    def longest(self) -> int:
        """Tokens of the context with its longest completion."""
        return self.context.size + max(completion.size for completion in self.completions)


def read_eval_file(path: str | os.PathLike) -> list[MultipleChoice]:
    """All examples of a file; Gpt2JaxError, naming the example, if the file is not exactly what its header says."""
    what = "a multiple-choice evaluation file"
    header, size = read_header(path, what=what, magic=MAGIC_EVAL, versions=(1,), hint=HINT)
    num_examples, longest_bytes = int(header[2]), int(header[3])
    body_bytes = size - HEADER_BYTES
    if not 1 <= num_examples <= _MAX_EXAMPLES or body_bytes % 2 or body_bytes > num_examples * _MAX_EXAMPLE_BYTES:
        raise Gpt2JaxError(
            f"{path}: expected {what} of 1 to {_MAX_EXAMPLES} examples of 16-bit words, "
            f"found {num_examples} examples in {size} bytes",
            HINT,
        )
    words = read_array(path, "<u2", body_bytes // 2, HEADER_BYTES)
    examples: list[MultipleChoice] = []
    start = longest_found = 0
    for index in range(num_examples):
        stop = start + (int(words[start + 1]) // 2 if start + 1 < words.size else 0)
        example = _parse_example(words[start:stop].tolist(), index) if stop <= words.size else None
        if example is None:
            raise Gpt2JaxError(
                f"{path}: expected example {index} of {num_examples} at byte {HEADER_BYTES + 2 * start}, found the end of the "
                f"file or other words (truncated or damaged)",
                HINT,
            )
        examples.append(example)
        longest_found = max(longest_found, 2 * (stop - start))
        start = stop
    if start != words.size or longest_found != longest_bytes:
        raise Gpt2JaxError(
            f"{path}: expected the end of the file after {num_examples} examples, the longest of {longest_bytes} bytes, "
            f"found {2 * (words.size - start)} more bytes and a longest example of {longest_found} bytes",
            HINT,
        )
    return examples


def write_eval_file(path: str | os.PathLike, examples: Sequence[MultipleChoice]) -> None:
    """Write version 1: 1 to 65,535 examples, each shorter than 65,536 bytes and with a right one of four completions."""
    if not 1 <= len(examples) <= _MAX_EXAMPLES:
        raise Gpt2JaxError(f"{path}: expected 1 to {_MAX_EXAMPLES} examples, found {len(examples)}")
    streams = []
    for index, example in enumerate(examples):
        parts = (example.context, *example.completions)
        num_bytes = 2 * (5 + sum(1 + part.size for part in parts))
        fits = num_bytes <= _MAX_EXAMPLE_BYTES and all(part.size and part.min() >= 0 and part.max() < 2**16 for part in parts)
        if not fits or len(example.completions) != NUM_COMPLETIONS or not 0 <= example.label < NUM_COMPLETIONS:
            raise Gpt2JaxError(
                f"{path}: expected example {index} to have a label below {NUM_COMPLETIONS}, a context and {NUM_COMPLETIONS} "
                f"completions of 16-bit tokens, below 65536 bytes in all, found label {example.label}, "
                f"{len(example.completions)} completions and {num_bytes} bytes"
            )
        words = [_START_OF_EXAMPLE, num_bytes, index, example.label, NUM_COMPLETIONS]
        streams.append(np.concatenate([words, *(piece for part in parts for piece in ([part.size], part))]).astype("<u2"))
    with atomic_write(path) as file:
        longest_bytes = max(stream.nbytes for stream in streams)
        file.write(header_words({0: MAGIC_EVAL, 1: 1, 2: len(streams), 3: longest_bytes}).tobytes())
        file.write(np.concatenate(streams).tobytes())


def _parse_example(words: list[int], index: int) -> MultipleChoice | None:
    """The example that fills these words exactly, or None."""
    if len(words) < 5 or words[:3] != [_START_OF_EXAMPLE, 2 * len(words), index]:
        return None
    label, num_completions = words[3:5]
    if label >= NUM_COMPLETIONS or num_completions != NUM_COMPLETIONS:
        return None
    parts, position = [], 5
    for _ in range(1 + NUM_COMPLETIONS):
        length = words[position] if position < len(words) else 0
        parts.append(np.array(words[position + 1 : position + 1 + length], dtype=np.uint16))
        if not length or parts[-1].size != length:
            return None
        position += 1 + length
    return MultipleChoice(label, parts[0], tuple(parts[1:])) if position == len(words) else None


def check_questions(
    examples: Sequence[MultipleChoice],
    path: str,
    *,
    vocab_size: int,
    sequence_length: int,
    hint: str = "a larger --sequence-length, or --hellaswag '' to go without",
) -> None:
    """Gpt2JaxError, naming the file, unless every question fits below `sequence_length` and has tokens of the vocabulary."""
    longest = max(example.longest for example in examples)
    largest = max(int(part.max()) for example in examples for part in (example.context, *example.completions))
    if longest >= sequence_length or largest >= vocab_size:
        raise Gpt2JaxError(
            f"{path}: expected questions below {sequence_length} tokens, with token ids below {vocab_size}, "
            f"found one of {longest} tokens and id {largest}",
            hint,
        )
