"""Parts of a buffer read straight from llm.c's files, whatever number of parts the files hold: by ranges of bytes, so that no
more than the wanted parts is ever in memory. NumPy only."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from gpt2_jax.buffer.layout import ParameterLayout
from gpt2_jax.errors import Gpt2JaxError


class Source(NamedTuple):
    """Where a file has a buffer, or its ZeRO-1 part."""

    path: str | os.PathLike
    offset: int  # bytes


def read_rows(
    sources: Sequence[Source], layout: ParameterLayout, ranks: Sequence[int], num_ranks: int, dtype: DTypeLike = "<f4"
) -> np.ndarray:
    """The ZeRO-1 parts (len(ranks), num_parameters / num_ranks) float32 of these ranks, from the parts of one buffer that the
    sources have, by rank; one source has all of it. Gpt2JaxError for a file that cannot be read or is too short."""
    rows = np.empty((len(ranks), layout.num_parameters // num_ranks), np.float32)
    saved, wanted = layout.part(len(sources)).tensors, layout.part(num_ranks).tensors
    with ExitStack() as stack:
        files = [stack.enter_context(_open(source.path)) for source in sources]
        for row, rank in zip(rows, ranks, strict=True):
            for old, new in zip(saved, wanted, strict=True):
                # The part of each layer that is wanted, and what of it each source has.
                start, stop = rank * new.layer_size, (rank + 1) * new.layer_size
                for number in range(start // old.layer_size, -(-stop // old.layer_size)):
                    first, end = max(start, number * old.layer_size), min(stop, (number + 1) * old.layer_size)
                    for layer in range(new.num_layers):
                        target = row[new.layer_offset(layer) + first - start : new.layer_offset(layer) + end - start]
                        place = old.layer_offset(layer) + first - number * old.layer_size
                        _read_into(files[number], sources[number], place, target, np.dtype(dtype))
    return rows


def _open(path: str | os.PathLike) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise Gpt2JaxError(f"{path}: expected to read it, found: {error.strerror or error}") from None


def _read_into(file: BinaryIO, source: Source, place: int, target: np.ndarray, dtype: np.dtype) -> None:
    """Fill `target` with the elements of the source's buffer from `place` on."""
    values = target if dtype == target.dtype else np.empty(target.size, dtype)
    try:
        file.seek(source.offset + dtype.itemsize * place)
        read = file.readinto(values.view(np.uint8).data)  # type: ignore[attr-defined]
    except OSError as error:
        raise Gpt2JaxError(f"{source.path}: expected to read it, found: {error.strerror or error}") from None
    if read != values.nbytes:
        raise Gpt2JaxError(f"{source.path}: expected {values.nbytes} bytes at element {place}, found {read}: the file changed")
    if values is not target:
        target[:] = values
