"""llm.c's set of checkpoint files: model_STEP.bin, state_STEP_RANK.bin and, last of all, DONE_STEP; which sets a folder has.

Beside them lies run_STEP.json, which llm.c does not know and a set may lack. A set without its DONE file, or without a file
of one of its ranks, is incomplete and is never loaded.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc.state_file import num_processes_of
from gpt2_jax.names import near, nearest_path


def newest_step(folder: str | os.PathLike) -> int:
    """The step of the newest complete set in a run folder. Gpt2JaxError when it holds none."""
    steps = complete_steps(folder)
    if not steps:
        parts = files_of_sets(folder)
        found = f"{', '.join(parts) or 'none'}{near(folder) if not os.path.lexists(folder) else ''}"
        raise Gpt2JaxError(
            f"{folder}: expected a run folder with a complete checkpoint "
            f"(model_*.bin, state_*.bin and DONE_* of one step), found {found}",
            _instead_of(folder, parts),
        )
    return steps[-1]


def _instead_of(folder: str | os.PathLike, parts: list[str]) -> str:
    """What helps where a folder has no complete set, but perhaps parts of one: the run that was meant, or the command that
    begins anew."""
    if not os.path.lexists(folder) and (meant := nearest_path(folder)) and complete_steps(meant):
        return f"{shlex.quote(str(meant))}   (the nearest name of a run)"
    models = [name for name in parts if name.startswith("model_")]
    if models:
        return f"{shlex.quote(os.path.join(folder, models[-1]))}   (its weights alone: the --init of a new run)"
    new = f"{folder}-2" if parts or os.path.isfile(folder) else str(folder)
    settings = os.path.join(folder, "config.toml")
    config = f"--config {shlex.quote(settings)} " if os.path.exists(settings) else ""
    return f"python scripts/train.py {config}--out-dir {shlex.quote(new)}   (without --resume: begins anew)"


def files_of_sets(folder: str | os.PathLike) -> list[str]:
    """The names of all files of sets in a folder, complete or not."""
    pattern = r"(model_\d{8}\.bin|state_\d{8}_\d{5}\.bin|DONE_\d{8})"
    return sorted(name for name in _names(folder) if re.fullmatch(pattern, name))


def step_of(folder: str | os.PathLike, step: int | None) -> int:
    """`step`, or the newest one for None. Gpt2JaxError, listing those that are there, when the folder has no complete set
    of it."""
    if step is None:
        return newest_step(folder)
    if step not in (steps := complete_steps(folder)):
        there = f"those of {', '.join(map(str, steps))}" if steps else "none"
        nearest_step = min(steps, key=lambda other: abs(other - step), default=None)
        hint = _instead_of(folder, files_of_sets(folder)) if nearest_step is None else f"--step {nearest_step}"
        raise Gpt2JaxError(f"{folder}: expected the complete checkpoint of step {step}, found {there}", hint)
    return step


def complete_steps(folder: str | os.PathLike) -> list[int]:
    """The steps of all complete sets, ascending."""
    steps = sorted(int(match[1]) for name in _names(folder) if (match := re.fullmatch(r"DONE_(\d{8})", name)))
    return [step for step in steps if _is_complete(folder, step)]


def set_paths(folder: str | os.PathLike, step: int) -> tuple[Path, Path, Path, Path]:
    """Of a set: the model, rank 0's state, the record and the marker."""
    folder = Path(folder)
    model_path, record_path = folder / f"model_{step:08d}.bin", folder / f"run_{step:08d}.json"
    return model_path, state_path(folder, step, 0), record_path, folder / f"DONE_{step:08d}"


def state_path(folder: str | os.PathLike, step: int, rank: int) -> Path:
    return Path(folder) / f"state_{step:08d}_{rank:05d}.bin"


def state_paths(folder: str | os.PathLike, step: int, num_processes: int) -> list[Path]:
    return [state_path(folder, step, rank) for rank in range(num_processes)]


def _names(folder: str | os.PathLike) -> list[str]:
    try:
        return os.listdir(folder)
    except (OSError, ValueError):  # no such folder, no folder, a name that no folder can have
        return []


def _is_complete(folder: str | os.PathLike, step: int) -> bool:
    """Whether every file of a set that has its DONE file is there; a damaged one is, and is the reader's to report."""
    model_path, first_state_path, _, _ = set_paths(folder, step)
    if not (os.path.exists(model_path) and os.path.exists(first_state_path)):
        return False
    try:
        num_processes = num_processes_of(first_state_path)
    except Gpt2JaxError:
        return True
    return all(os.path.exists(state_path(folder, step, rank)) for rank in range(num_processes))
