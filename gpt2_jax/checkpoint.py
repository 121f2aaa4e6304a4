"""A run's checkpoints: llm.c's set of three files, model_STEP.bin, state_STEP_00000.bin and, last of all, DONE_STEP.

NumPy only. A set without its DONE file is incomplete and is never loaded.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.layout import ModelConfig, ParameterLayout
from gpt2_jax.llmc.header import atomic_write
from gpt2_jax.llmc.loader import LoaderState
from gpt2_jax.llmc.model_file import read_model_file, write_model_file
from gpt2_jax.llmc.state_file import ProcessState, TrainingState, read_state_files, write_state_files


@dataclass(frozen=True)
class Checkpoint:
    """Everything of a run at one step; buffers are (num_parameters,) float32 on the host."""

    model: ModelConfig
    params: np.ndarray
    m: np.ndarray
    v: np.ndarray
    step: int  # optimizer updates done
    loader: LoaderState


def save_checkpoint(folder: str | os.PathLike, checkpoint: Checkpoint) -> Path:
    """Write the three files, each atomically and DONE last; returns the model file's path."""
    model_path, state_path, done_path = _paths(folder, checkpoint.step)
    done_path.unlink(missing_ok=True)  # a set that is written again is incomplete meanwhile
    write_model_file(model_path, checkpoint.model, checkpoint.params)
    state = TrainingState(checkpoint.step, checkpoint.m, checkpoint.v, (ProcessState(checkpoint.loader),))
    write_state_files([state_path], state, ParameterLayout(checkpoint.model))
    with atomic_write(done_path):
        pass
    return model_path


def newest_step(folder: str | os.PathLike) -> int:
    """The step of the newest complete set in a run folder. Gpt2JaxError when it holds none."""
    try:
        names = os.listdir(folder)
    except (OSError, ValueError):  # no such folder, no folder, a name that no folder can have
        names = []
    steps = [int(match[1]) for name in names if (match := re.fullmatch(r"DONE_(\d{8})", name))]
    for step in sorted(steps, reverse=True):
        if all(path.exists() for path in _paths(folder, step)):
            return step
    raise Gpt2JaxError(
        f"{folder}: expected a run folder with a complete checkpoint "
        f"(model_*.bin, state_*.bin and DONE_* of one step), found none",
        "start the run anew, without --resume and in another --out-dir",
    )


def load_checkpoint(folder: str | os.PathLike, step: int) -> Checkpoint:
    """Read a complete set. Raises Gpt2JaxError for a damaged file, or a state whose step is not its name's."""
    model_path, state_path, _ = _paths(folder, step)
    model, params = read_model_file(model_path)
    state = read_state_files([state_path], ParameterLayout(model))
    if state.step != step:
        raise Gpt2JaxError(f"{state_path}: expected the state of step {step}, found step {state.step} in its header")
    return Checkpoint(model=model, params=params, m=state.m, v=state.v, step=step, loader=state.processes[0].loader)


def _paths(folder: str | os.PathLike, step: int) -> tuple[Path, Path, Path]:
    folder = Path(folder)
    return folder / f"model_{step:08d}.bin", folder / f"state_{step:08d}_00000.bin", folder / f"DONE_{step:08d}"
