"""llm.c's debug state: one batch with the logits, loss and gradients that a model must give for it."""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.files import Writer, atomic_write
from gpt2_jax.llmc.header import (
    HEADER_BYTES,
    MAGIC_DEBUG_STATE,
    check_size,
    header_words,
    read_array,
    read_header,
)

_HINT = "python scripts/write_starter_pack.py --init d12 --output-dir DIR   (writes gpt2_d12_debug_state.bin)"


class DebugState(NamedTuple):
    """`grads` is of the plain mean cross-entropy, before clipping; wte's is the tied total."""

    x_BT: np.ndarray  # int32
    y_BT: np.ndarray  # int32
    logits_BTV: np.ndarray  # float32, without the padding columns
    loss: np.float32
    grads: np.ndarray  # (num_parameters,) float32, in the layout's order


def read_debug_state(path: str | os.PathLike, config: GPT2Config) -> DebugState:
    """Read a debug state (version 2) of a model of these sizes; Gpt2JaxError if the file is not exactly that."""
    what = "a debug state file"
    header, size = read_header(path, what=what, magic=MAGIC_DEBUG_STATE, versions=(2,), hint=_HINT)
    B, T = int(header[2]), int(header[3])
    if B < 1 or not 1 <= T <= config.max_sequence_length:
        raise Gpt2JaxError(
            f"{path}: expected batch size >= 1 and sequence length 1 to {config.max_sequence_length}, found {B} and {T}",
            _HINT,
        )
    V, N = config.vocab_size, config.layout.num_parameters
    expected = HEADER_BYTES + 4 * (2 * B * T + B * T * V + 1 + N)
    check_size(path, what=f"{what} for this model", size=size, expected=expected, hint=_HINT)

    offset = HEADER_BYTES
    parts = []
    for dtype, count in (("<i4", B * T), ("<i4", B * T), ("<f4", B * T * V), ("<f4", 1), ("<f4", N)):
        parts.append(read_array(path, dtype, count, offset))
        offset += 4 * count
    x, y, logits, loss, grads = parts
    for tokens in (x, y):
        if tokens.min() < 0 or tokens.max() >= V:
            raise Gpt2JaxError(f"{path}: expected token ids in [0, {V}), found {tokens.min()} to {tokens.max()}", _HINT)
    return DebugState(x.reshape(B, T), y.reshape(B, T), logits.reshape(B, T, V), loss[0], grads)


def write_debug_state(path: str | os.PathLike, state: DebugState, *, write: Writer = atomic_write) -> None:
    """Write version 2. Shapes as in DebugState."""
    B, T = state.x_BT.shape
    with write(path) as file:
        file.write(header_words({0: MAGIC_DEBUG_STATE, 1: 2, 2: B, 3: T}).tobytes())
        for array, dtype in (
            (state.x_BT, "<i4"),
            (state.y_BT, "<i4"),
            (state.logits_BTV, "<f4"),
            (state.loss, "<f4"),
            (state.grads, "<f4"),
        ):
            file.write(np.ascontiguousarray(array, dtype=dtype).tobytes())
