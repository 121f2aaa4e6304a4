"""A run's checkpoints: llm.c's set of files, model_STEP.bin, state_STEP_RANK.bin and, last of all, DONE_STEP; beside them
run_STEP.json, which llm.c does not know and a set may lack.

NumPy only. A set without its DONE file, or without a file of one of its ranks, is incomplete and is never loaded.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.files import write_together, write_with_others
from gpt2_jax.llmc.checkpoint_set import complete_steps, set_paths, state_paths
from gpt2_jax.llmc.checkpoint_set import state_path as rank_path
from gpt2_jax.llmc.loader import LoaderState
from gpt2_jax.llmc.model_file import (
    hint_for,
    read_model_config,
    read_model_file,
    read_model_rows,
    write_model_file,
    write_model_parts,
)
from gpt2_jax.llmc.rounding import FIRST_STATE, RoundingStream, stochastically_rounded
from gpt2_jax.llmc.state_file import (
    ProcessState,
    merged_parts,
    num_processes_of,
    read_state_files,
    read_state_rows,
    write_state_file,
    write_state_files,
)
from gpt2_jax.processes.group import Group
from gpt2_jax.training.run_record import STEP, Best, RunRecord, read_run_record, write_run_record


@dataclass(frozen=True)
class Part:
    """What one rank of several saves."""

    params: np.ndarray
    m: np.ndarray
    v: np.ndarray
    loader: LoaderState
    rounding: RoundingStream


@dataclass(frozen=True)
class Checkpoint:
    """Everything of a run at one step; buffers are (num_parameters,) float32 on the host. To be saved by several ranks
    they are rank 0's, whole or its ZeRO-1 part, and `others` has the rest; loaded for some ranks, they are those ranks'."""

    model: GPT2Config
    params: np.ndarray
    m: np.ndarray
    v: np.ndarray
    step: int  # optimizer updates done
    loader: LoaderState | None  # None when several processes, each with a loader of its own, saved the set
    dtype: str = "float32"  # of the model file
    master_weights: bool = True  # False: the parameters hold only what `dtype` can represent
    rounding: RoundingStream = field(default_factory=RoundingStream)
    record: RunRecord | None = None
    others: tuple[Part, ...] = ()  # to be saved: of the ranks behind rank 0
    processes: tuple[ProcessState, ...] = ()  # loaded: of every rank that saved the set


def save_checkpoint(folder: str | os.PathLike, checkpoint: Checkpoint) -> Path:
    """Write the set, all of its files under temporary names first and DONE last; returns the model file's path.

    A bfloat16 model file holds llm.c's own rounding of the parameters, and the state then the float32 ones as master
    weights. A set of this step that is there stays whole until all files of the new one are. Gpt2JaxError when a file
    cannot be written; what was written of the set is removed then.
    """
    step, layout = checkpoint.step, checkpoint.model.layout
    model_path, _, record_path, done_path = set_paths(folder, step)
    if checkpoint.loader is None:
        raise ValueError("save_checkpoint: expected the loader's state, found none")
    first = Part(checkpoint.params, checkpoint.m, checkpoint.v, checkpoint.loader, checkpoint.rounding)
    parts = (first, *checkpoint.others)
    is_divided = first.m.size < layout.num_parameters
    of_part = layout.part(len(parts)) if is_divided else layout
    has_masters = checkpoint.dtype == "bfloat16" and checkpoint.master_weights
    rounded = [
        stochastically_rounded(part.params, of_part, part.rounding.last_seeds()) if has_masters else part.params
        for part in (parts if is_divided else parts[:1])
    ]
    params = merged_parts(rounded, layout) if is_divided else rounded[0]
    processes = [ProcessState(part.loader, part.rounding.state, part.rounding.last_update_state) for part in parts]
    with write_together(done_path) as write:
        write_model_file(model_path, checkpoint.model, params, checkpoint.dtype, write=write)
        for rank, (part, process) in enumerate(zip(parts, processes, strict=True)):
            buffers = [part.m, part.v, *([part.params] if has_masters else [])]
            path = rank_path(folder, step, rank)
            write_state_file(path, step, buffers, process, rank=rank, num_processes=len(parts), write=write)
        if checkpoint.record is not None:
            write_run_record(record_path, checkpoint.record, write=write)
    return model_path


def save_with_others(
    folder: str | os.PathLike,
    group: Group,
    step: int,
    model: GPT2Config,
    parts: Mapping[int, Part],
    tensors: Iterable[np.ndarray],
    *,
    num_ranks: int,
    dtype: str,
    master_weights: bool,
    record: RunRecord,
) -> Path:
    """Write the set of a step together with the other processes, each the states of its own ranks, `parts`; returns the model
    file's path. `tensors` are all parameters as the model file has them, by their tensors, made by all processes together;
    process 0 writes them, the record and DONE.

    AgreedError, on all, when a file cannot be written on one: all that was written of the set is removed then, everywhere.
    """
    model_path, _, record_path, done_path = set_paths(folder, step)
    has_masters = dtype == "bfloat16" and master_weights
    with group.agreed():
        if group.is_first and os.path.lexists(done_path):
            raise Gpt2JaxError(f"{done_path}: expected no set of step {step}, found one", f"rm {done_path}")
    with write_with_others(group.agree, done_path if group.is_first else None) as write:
        made = iter(tensors)
        try:
            if group.is_first:
                write_model_parts(model_path, model, made, dtype, write=write)
                write_run_record(record_path, record, write=write)
        finally:  # also after a failure, since the others wait in the making of each
            for _ in made:
                pass
        for rank, part in parts.items():
            group.progress += 1
            buffers = [part.m, part.v, *([part.params] if has_masters else [])]
            process = ProcessState(part.loader, part.rounding.state, part.rounding.last_update_state)
            path = rank_path(folder, step, rank)
            write_state_file(path, step, buffers, process, rank=rank, num_processes=num_ranks, write=write)
    return model_path


def reshard_checkpoint(
    folder: str | os.PathLike,
    step: int,
    output_folder: str | os.PathLike,
    loaders: Sequence[LoaderState],
    *,
    num_micro_batches: int,
    zero: bool,
) -> list[Path]:
    """Write the set of a step, of however many processes it is, for as many as there are loaders; returns the states' paths.

    llm.c resumes it with that many processes, `zero` meaning its -z 1. Moments, master weights and model stay as they
    are. Each process has the loader given for it, and its rank's rounding stream after as many steps of
    `num_micro_batches` each. Gpt2JaxError for a folder that has a set of this step, and when a file cannot be written;
    what was written is removed then.
    """
    model_path, state_path, _, _ = set_paths(folder, step)
    layout = read_model_config(model_path).layout
    state = read_state_files(state_paths(folder, step, num_processes_of(state_path)), layout)
    processes = []
    for rank, loader in enumerate(loaders):
        stream = RoundingStream(FIRST_STATE + rank, FIRST_STATE + rank)
        for _ in range(step):
            stream.step_done(num_micro_batches, applied=True)
        processes.append(ProcessState(loader, stream.state, stream.last_update_state))
    new_model_path, _, _, new_done_path = set_paths(output_folder, step)
    new_paths = state_paths(output_folder, step, len(loaders))
    if os.path.lexists(new_done_path):  # written over, it would be a mixture if the writing were interrupted
        raise Gpt2JaxError(f"{output_folder}: expected no set of step {step} in it, found one", "another --output-dir")
    try:
        Path(output_folder).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        cause = getattr(error, "strerror", None) or error
        raise Gpt2JaxError(f"{output_folder}: expected to make the folder, found: {cause}") from None
    with write_together(new_done_path) as write:
        with write(new_model_path) as target, open(model_path, "rb") as source:
            shutil.copyfileobj(source, target)
        write_state_files(new_paths, dataclasses.replace(state, processes=tuple(processes)), layout, zero=zero, write=write)
    return new_paths


def load_checkpoint(
    folder: str | os.PathLike, step: int, *, master_weights: bool = True, ranks: range | None = None, num_ranks: int = 1
) -> Checkpoint:
    """Read a complete set, of one process or of several, whose states are merged. With `ranks` the three buffers are only
    those ranks' parts of `num_ranks`, (len(ranks), num_parameters / num_ranks), and nothing else is read.

    The parameters are the state's master weights, if it has them and they are wanted, else the model file's. Raises
    Gpt2JaxError for a damaged file, or a state whose step is not its name's.
    """
    model_path, state_path, record_path, _ = set_paths(folder, step)
    model = read_model_config(model_path)
    paths = state_paths(folder, step, num_processes_of(state_path))
    read = read_state_files if ranks is None else partial(read_state_rows, ranks=ranks, num_ranks=num_ranks)
    state = read(paths, model.layout)
    if state.step != step:
        raise Gpt2JaxError(f"{state_path}: expected the state of step {step}, found step {state.step} in its header")
    if state.master is not None and master_weights:
        params = state.master
        if any(np.count_nonzero(part) for part in _padding(model, params, ranks, num_ranks)):
            raise Gpt2JaxError(f"{state_path}: expected zeros in the padding rows of wte's master weights, found other values")
    elif ranks is None:
        params = read_model_file(model_path)[1]
    else:
        params = read_model_rows(model_path, ranks, num_ranks)
        if any(np.count_nonzero(part) for part in _padding(model, params, ranks, num_ranks)):
            raise Gpt2JaxError(
                f"{model_path}: expected zeros in the padding rows of wte, found other values", hint_for(model_path)
            )
    first = state.processes[0]
    return Checkpoint(
        model=model,
        params=params,
        m=state.m,
        v=state.v,
        step=step,
        loader=first.loader if len(state.processes) == 1 else None,
        master_weights=state.master is not None,
        rounding=RoundingStream(first.rounding_state, first.last_rounding_state),
        record=read_run_record(record_path) if os.path.lexists(record_path) else None,
        processes=state.processes,
    )


def _padding(model: GPT2Config, params: np.ndarray, ranks: range | None, num_ranks: int) -> list[np.ndarray]:
    """wte's padding rows of a whole buffer, or what of them each rank's part has."""
    whole = model.layout["wte"]
    start, stop = whole.padding_span
    if ranks is None:
        return [params[start:stop]]
    size, offset = whole.size // num_ranks, model.layout.part(num_ranks)["wte"].offset
    firsts = [max(0, start - whole.offset - rank * size) for rank in ranks]
    return [row[offset + first : offset + size] for row, first in zip(params, firsts, strict=True) if first < size]


def delete_old_checkpoints(folder: str | os.PathLike, step: int, *, every: int, keep: int, major_every: int) -> list[int]:
    """After the set of `step` was written: delete the complete sets that need not be kept; returns their steps.

    Of those saved at their step llm.c's -nk and -nm decide: all up to step - keep * every go, but for the multiples of
    `major_every`; with `keep` 0 all are kept, with `major_every` 0 none is major. A set saved because time had passed goes
    as soon as there is a newer one, that of the best loss when another is the best. Gpt2JaxError when a file cannot be
    deleted.
    """
    _, best = _why_kept(folder, step)
    deleted = []
    for found in complete_steps(folder):
        if _why_kept(folder, found)[0] == STEP:
            is_old = bool(keep and every) and 0 < found <= step - keep * every
            is_kept = not is_old or (major_every > 0 and found % major_every == 0)
        else:
            is_kept = found >= step
        if not is_kept and (best is None or found != best.step):
            _delete(folder, found)
            deleted.append(found)
    return deleted


def _why_kept(folder: str | os.PathLike, step: int) -> tuple[str, Best | None]:
    """Why a set was saved, and the run's best then; without a readable record it is one saved at its step."""
    try:
        record = read_run_record(set_paths(folder, step)[2])
    except Gpt2JaxError:
        return STEP, None
    return record.kept, record.best


def _delete(folder: str | os.PathLike, step: int) -> None:
    model_path, state_path, record_path, done_path = set_paths(folder, step)
    # Without its DONE file first, the rest is no checkpoint any more, whatever happens.
    for path in (done_path, *state_paths(folder, step, num_processes_of(state_path)), model_path, record_path):
        _remove(path)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise Gpt2JaxError(f"{path}: expected to delete it, found: {error.strerror or error}") from None
