"""llm.c's training state: both AdamW moments, the step, and where the data loader stands."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

import numpy as np

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc.header import (
    HEADER_BYTES,
    MAGIC_TRAINING_STATE,
    atomic_write,
    check_size,
    header_words,
    read_array,
    read_header,
)
from gpt2_jax.llmc.loader import LoaderState
from gpt2_jax.llmc.random import GENERATOR_STRUCT

_HINT = "python scripts/train.py --resume --out-dir DIR   (takes the newest complete checkpoint)"
_FIRST_ROUNDING_STATE = 13371337  # llm.c's seed of the stochastic rounding stream of rank 0
_MAX_PERMUTATION = 2**31 - 1


@dataclass(frozen=True)
class TrainingState:
    """What a state file of one process without ZeRO holds. `m`, `v`, `master` are (num_parameters,) float32."""

    step: int  # optimizer updates done, the next one to run
    m: np.ndarray
    v: np.ndarray
    loader: LoaderState
    master: np.ndarray | None = None
    # The generator of stochastic rounding: now, and at the start of the last update.
    rounding_state: int = _FIRST_ROUNDING_STATE
    last_rounding_state: int = _FIRST_ROUNDING_STATE


def write_state_file(path: str | os.PathLike, state: TrainingState) -> None:
    """Write the state of one process (rank 0 of 1). Words that llm.c leaves uninitialised are zero."""
    shuffled = state.loader.generator is not None
    header = header_words(
        {0: MAGIC_TRAINING_STATE, 1: 1, 2: 1, 3: 0, 4: int(state.master is not None), 5: int(shuffled), 10: state.step}
    )
    header[20:24] = np.array([state.rounding_state, state.last_rounding_state], dtype="<u8").view("<i4")
    header[30:34] = np.array([state.loader.shard_index, state.loader.sample_index], dtype="<u8").view("<i4")
    with atomic_write(path) as file:
        file.write(header.tobytes())
        for buffer in (state.m, state.v, state.master):
            if buffer is not None:
                file.write(np.ascontiguousarray(buffer, dtype="<f4").data)
        if state.loader.generator is not None:
            for permutation in (state.loader.shard_permutation, state.loader.sample_permutation):
                assert permutation is not None  # a shuffled loader's state has all three
                file.write(struct.pack("<Q", permutation.size))
                file.write(np.ascontiguousarray(permutation, dtype="<i4").tobytes())
            file.write(state.loader.generator.tobytes())


def read_state_file(path: str | os.PathLike, num_parameters: int) -> TrainingState:
    """Read the state of one process for a model of `num_parameters`; Gpt2JaxError if the file is not exactly that."""
    what = "a training state file"
    header, size = read_header(path, what=what, magic=MAGIC_TRAINING_STATE, versions=(1,), hint=_HINT)
    num_processes, rank, has_master, shuffled = map(int, header[2:6])
    step = int(header[10])
    if (num_processes, rank) != (1, 0):
        raise Gpt2JaxError(f"{path}: expected the state of rank 0 of 1 process, found rank {rank} of {num_processes}", _HINT)
    if has_master not in (0, 1) or shuffled not in (0, 1) or step < 0:
        raise Gpt2JaxError(
            f"{path}: expected master and shuffle words of 0 or 1 and a step >= 0, found {has_master}, {shuffled}, {step}",
            _HINT,
        )
    rounding_state, last_rounding_state = map(int, header[20:24].view("<u8"))
    shard_index, sample_index = map(int, header[30:34].view("<u8"))

    buffers_end = HEADER_BYTES + 4 * num_parameters * (2 + has_master)
    if not shuffled:
        check_size(path, what=what, size=size, expected=buffers_end, hint=_HINT)
        loader = LoaderState(shard_index, sample_index)
    else:
        offset = buffers_end
        permutations = []
        for _ in range(2):
            count = int(read_array(path, "<u8", 1, offset)[0]) if offset + 8 <= size else 0
            # Checked against the file before anything of that size is allocated.
            if not 1 <= count <= _MAX_PERMUTATION or offset + 8 + 4 * count > size:
                raise Gpt2JaxError(
                    f"{path}: expected {what} with a loader permutation at byte {offset}, found {size} bytes and "
                    f"{count} entries (truncated or damaged)",
                    _HINT,
                )
            permutations.append(read_array(path, "<i4", count, offset + 8))
            offset += 8 + 4 * count
        check_size(path, what=what, size=size, expected=offset + GENERATOR_STRUCT.itemsize, hint=_HINT)
        generator = read_array(path, GENERATOR_STRUCT, 1, offset)[0]
        loader = LoaderState(shard_index, sample_index, permutations[0], permutations[1], generator)

    buffers = [read_array(path, "<f4", num_parameters, HEADER_BYTES + 4 * num_parameters * i) for i in range(2 + has_master)]
    return TrainingState(
        step=step,
        m=buffers[0],
        v=buffers[1],
        loader=loader,
        master=buffers[2] if has_master else None,
        rounding_state=rounding_state,
        last_rounding_state=last_rounding_state,
    )
