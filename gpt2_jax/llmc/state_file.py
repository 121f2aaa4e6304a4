"""llm.c's training state: both AdamW moments, the step, and where the data loader stands; one file a process.

With ZeRO-1 each process keeps a part of the buffers: of every layer of every tensor the elements [r * s, (r + 1) * s),
s being the layer's size over the number of processes, packed in the order of the tensors.
"""

from __future__ import annotations

import os
import re
import shlex
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gpt2_jax.buffer.layout import ParameterLayout
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.files import Writer, atomic_write
from gpt2_jax.llmc.header import (
    HEADER_BYTES,
    MAGIC_TRAINING_STATE,
    check_size,
    header_words,
    read_array,
    read_header,
)
from gpt2_jax.llmc.loader import LoaderState
from gpt2_jax.llmc.random import GENERATOR_STRUCT
from gpt2_jax.llmc.rounding import FIRST_STATE
from gpt2_jax.llmc.rows import Source, read_rows

_WHAT = "a training state file"
_MAX_PERMUTATION = 2**31 - 1


class ProcessState(NamedTuple):
    """What each process has of its own: its loader, and its generator of stochastic rounding, now and at the start of
    the last update."""

    loader: LoaderState
    rounding_state: int = FIRST_STATE
    last_rounding_state: int = FIRST_STATE


@dataclass(frozen=True)
class TrainingState:
    """The state files of all processes taken together. `m`, `v`, `master` are (num_parameters,) float32."""

    step: int  # optimizer updates done, the next one to run
    m: np.ndarray
    v: np.ndarray
    processes: tuple[ProcessState, ...]  # by rank
    master: np.ndarray | None = None


def write_state_files(
    paths: Sequence[str | os.PathLike],
    state: TrainingState,
    layout: ParameterLayout,
    *,
    zero: bool = False,
    write: Writer = atomic_write,
) -> None:
    """Write the file of every process, by rank, words that llm.c leaves uninitialised as zero. With `zero` each holds its
    ZeRO-1 part of the buffers, else all of them; Gpt2JaxError if the number of processes does not divide every layer."""
    num_processes = len(state.processes)
    for rank, (path, process) in enumerate(zip(paths, state.processes, strict=True)):
        buffers = [buffer for buffer in (state.m, state.v, state.master) if buffer is not None]
        if zero:
            buffers = [_part(buffer, layout, rank, num_processes) for buffer in buffers]
        write_state_file(path, state.step, buffers, process, rank=rank, num_processes=num_processes, write=write)


def read_state_files(paths: Sequence[str | os.PathLike], layout: ParameterLayout) -> TrainingState:
    """Read the files of all processes, by rank, and merge them; Gpt2JaxError if they are not exactly those of one step."""
    first, size, processes = _checked_set(paths, layout)
    # Without ZeRO every process has the same whole buffers.
    parts = [
        [read_array(path, "<f4", size, HEADER_BYTES + 4 * size * i) for i in range(first.num_buffers)]
        for path in (paths if size < layout.num_parameters else paths[:1])
    ]
    buffers = parts[0] if len(parts) == 1 else [merged_parts(list(same), layout) for same in zip(*parts, strict=True)]
    return TrainingState(first.step, buffers[0], buffers[1], processes, buffers[2] if first.has_master else None)


def read_state_rows(
    paths: Sequence[str | os.PathLike], layout: ParameterLayout, ranks: Sequence[int], num_ranks: int
) -> TrainingState:
    """The same state of the same files with only the ZeRO-1 parts of some of `num_ranks` ranks as its buffers,
    (len(ranks), num_parameters / num_ranks) each; nothing else is read."""
    first, size, processes = _checked_set(paths, layout)
    of_all = paths if size < layout.num_parameters else paths[:1]
    m, v, *master = (
        read_rows([Source(path, HEADER_BYTES + 4 * size * number) for path in of_all], layout, ranks, num_ranks)
        for number in range(first.num_buffers)
    )
    return TrainingState(first.step, m, v, processes, master[0] if master else None)


def _checked_set(paths: Sequence[str | os.PathLike], layout: ParameterLayout) -> tuple[_Header, int, tuple[ProcessState, ...]]:
    """Rank 0's header, the elements of each buffer in each file, and what each process has of its own."""
    first = _read_header(paths[0])
    if first.num_processes != len(paths):
        raise Gpt2JaxError(
            f"{paths[0]}: expected the state of one of {len(paths)} process(es), found one of {first.num_processes}",
            _hint_for(paths[0]),
        )
    processes: list[ProcessState] = []
    size_of_first = 0
    for rank, path in enumerate(paths):
        header = _read_header(path)
        if header.rank != rank or header[:4] != first[:4]:
            raise Gpt2JaxError(
                f"{path}: expected the state of rank {rank} of {first.num_processes} process(es) at step {first.step}, "
                f"found rank {header.rank} of {header.num_processes} at step {header.step}",
                _hint_for(path),
            )
        size, loader = _read_loader(path, header, layout)
        processes.append(ProcessState(loader, header.rounding_state, header.last_rounding_state))
        size_of_first = size_of_first or size
        if size != size_of_first:
            raise Gpt2JaxError(
                f"{path}: expected buffers of {size_of_first} elements as in rank 0's, found {size}", _hint_for(path)
            )
    return first, size_of_first, tuple(processes)


def num_processes_of(path: str | os.PathLike) -> int:
    """How many processes wrote their states beside this one; Gpt2JaxError if it is no state file."""
    return _read_header(path).num_processes


class _Header(NamedTuple):
    num_processes: int
    has_master: int
    shuffled: int
    step: int
    rank: int
    rounding_state: int
    last_rounding_state: int
    shard_index: int
    sample_index: int
    file_size: int

    @property
    def num_buffers(self) -> int:
        return 2 + self.has_master


def _hint_for(path: str | os.PathLike) -> str:
    """The command after which a run goes on from the checkpoint before that of a state file which cannot be read: without
    its DONE file this one is incomplete."""
    folder, name = os.path.split(path)
    if (match := re.fullmatch(r"state_(\d{8})_\d{5}\.bin", name)) is None:
        return "python scripts/train.py --resume --out-dir DIR   (takes the newest complete checkpoint)"
    marker = shlex.quote(os.path.join(folder, f"DONE_{match[1]}"))
    return f"rm {marker}   (then --resume takes the checkpoint before this one)"


def _read_header(path: str | os.PathLike) -> _Header:
    words, size = read_header(path, what=_WHAT, magic=MAGIC_TRAINING_STATE, versions=(1,), hint=_hint_for(path))
    num_processes, rank, has_master, shuffled = map(int, words[2:6])
    step = int(words[10])
    if not 0 <= rank < num_processes or has_master not in (0, 1) or shuffled not in (0, 1) or step < 0:
        raise Gpt2JaxError(
            f"{path}: expected a rank below the number of processes, master and shuffle words of 0 or 1 and a step >= 0, "
            f"found rank {rank} of {num_processes}, {has_master}, {shuffled}, {step}",
            _hint_for(path),
        )
    rounding_state, last_rounding_state = map(int, words[20:24].view("<u8"))
    shard_index, sample_index = map(int, words[30:34].view("<u8"))
    return _Header(
        num_processes=num_processes,
        has_master=has_master,
        shuffled=shuffled,
        step=step,
        rank=rank,
        rounding_state=rounding_state,
        last_rounding_state=last_rounding_state,
        shard_index=shard_index,
        sample_index=sample_index,
        file_size=size,
    )


def _read_loader(path: str | os.PathLike, header: _Header, layout: ParameterLayout) -> tuple[int, LoaderState]:
    """The elements of one buffer in this file, whole or a ZeRO-1 part, and the loader's state behind the buffers.

    The header does not say which it is; only one of them fits the length of the file.
    """
    sizes = [layout.num_parameters]
    if header.num_processes > 1 and layout.num_parameters % header.num_processes == 0:
        sizes.append(layout.num_parameters // header.num_processes)
    for size in sizes:
        try:
            return size, _read_loader_at(path, header, HEADER_BYTES + 4 * size * header.num_buffers)
        except Gpt2JaxError:
            if size == sizes[-1]:
                raise
    raise AssertionError("every size was tried")


def _read_loader_at(path: str | os.PathLike, header: _Header, offset: int) -> LoaderState:
    if not header.shuffled:
        check_size(path, what=_WHAT, size=header.file_size, expected=offset, hint=_hint_for(path))
        return LoaderState(header.shard_index, header.sample_index)
    permutations = []
    for _ in range(2):
        count = int(read_array(path, "<u8", 1, offset)[0]) if offset + 8 <= header.file_size else 0
        # Checked against the file before anything of that size is allocated.
        if not 1 <= count <= _MAX_PERMUTATION or offset + 8 + 4 * count > header.file_size:
            raise Gpt2JaxError(
                f"{path}: expected {_WHAT} with a loader permutation at byte {offset}, found {header.file_size} bytes and "
                f"{count} entries (truncated or damaged)",
                _hint_for(path),
            )
        permutations.append(read_array(path, "<i4", count, offset + 8))
        offset += 8 + 4 * count
    check_size(path, what=_WHAT, size=header.file_size, expected=offset + GENERATOR_STRUCT.itemsize, hint=_hint_for(path))
    generator = read_array(path, GENERATOR_STRUCT, 1, offset)[0]
    return LoaderState(header.shard_index, header.sample_index, permutations[0], permutations[1], generator)


def write_state_file(
    path: str | os.PathLike,
    step: int,
    buffers: Sequence[np.ndarray],
    process: ProcessState,
    *,
    rank: int,
    num_processes: int,
    write: Writer = atomic_write,
) -> None:
    """Write one process's file: both moments and, where there are any, master weights, each whole or its ZeRO-1 part."""
    loader = process.loader
    header = header_words(
        {
            0: MAGIC_TRAINING_STATE,
            1: 1,
            2: num_processes,
            3: rank,
            4: int(len(buffers) == 3),
            5: int(loader.generator is not None),
            10: step,
        }
    )
    header[20:24] = np.array([process.rounding_state, process.last_rounding_state], dtype="<u8").view("<i4")
    header[30:34] = np.array([loader.shard_index, loader.sample_index], dtype="<u8").view("<i4")
    with write(path) as file:
        file.write(header.tobytes())
        for buffer in buffers:
            file.write(np.ascontiguousarray(buffer, dtype="<f4").data)
        if loader.generator is not None:
            for permutation in (loader.shard_permutation, loader.sample_permutation):
                assert permutation is not None  # a shuffled loader's state has all three
                file.write(struct.pack("<Q", permutation.size))
                file.write(np.ascontiguousarray(permutation, dtype="<i4").tobytes())
            file.write(loader.generator.tobytes())


def _part(buffer: np.ndarray, layout: ParameterLayout, rank: int, num_processes: int) -> np.ndarray:
    """The ZeRO-1 part of a buffer that a process keeps, (num_parameters / num_processes,)."""
    pieces = _layers_by_process(buffer, layout, num_processes)
    return np.concatenate([piece[:, rank].reshape(-1) for piece in pieces])


def merged_parts(parts: Sequence[np.ndarray], layout: ParameterLayout) -> np.ndarray:
    """The buffer whose ZeRO-1 parts, by rank, these are."""
    buffer = np.empty(layout.num_parameters, dtype=np.float32)
    start = 0
    for piece in _layers_by_process(buffer, layout, len(parts)):
        layers, _, size = piece.shape
        for rank, part in enumerate(parts):
            piece[:, rank] = part[start : start + layers * size].reshape(layers, size)
        start += layers * size
    return buffer


def _layers_by_process(buffer: np.ndarray, layout: ParameterLayout, num_processes: int) -> list[np.ndarray]:
    """For every tensor a view (layers, num_processes, elements of one process)."""
    layout.part(num_processes)  # refuses a number that does not divide every layer
    return [buffer[tensor.offset : tensor.stop].reshape(tensor.num_layers, num_processes, -1) for tensor in layout.tensors]
