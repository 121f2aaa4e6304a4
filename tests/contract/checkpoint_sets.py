"""Checkpoint sets for the tests: made, written, and compared with what is loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gpt2_jax.llmc.checkpoint_set import newest_step
from gpt2_jax.llmc.loader import LoaderState
from gpt2_jax.llmc.model_file import write_model_file
from gpt2_jax.llmc.rounding import rounded_to_nearest
from gpt2_jax.llmc.state_file import ProcessState, TrainingState, write_state_files
from gpt2_jax.training.checkpoint import Checkpoint, load_checkpoint, reshard_checkpoint
from gpt2_jax.training.run_record import Averages, RunRecord
from tests.conftest import TINY

MODEL_BYTES = 1024 + 4 * TINY.layout.num_parameters


def checkpoint_of(step: int, loader: LoaderState | None = None) -> Checkpoint:
    """Other arrays for every step."""
    layout = TINY.layout
    params, m, v = np.random.default_rng(step).normal(size=(3, layout.num_parameters)).astype(np.float32)
    params[slice(*layout["wte"].padding_span)] = 0
    windows = {name: np.full(128, np.nan, np.float32) for name in ("loss", "gradient_norm")}
    windows["loss"][-3:] = params[:3]
    record = RunRecord(2, 16, "float32", "a test", windows, Averages(step, 0.25 * step, 100.0), {"run": {"steps": 40}})
    return Checkpoint(TINY, params, m, v, step, loader or LoaderState(0, 3), record=record)


def assert_newest_is(folder: Path, saved: Checkpoint) -> None:
    assert newest_step(folder) == saved.step
    loaded = load_checkpoint(folder, saved.step)
    assert (loaded.model, loaded.step) == (saved.model, saved.step)
    for name in ("params", "m", "v"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(saved, name), err_msg=name)
    assert loaded.loader == saved.loader
    assert loaded.rounding == saved.rounding
    for name, window in saved.record.windows.items():
        np.testing.assert_array_equal(loaded.record.windows[name], window, err_msg=name)
    assert loaded.record.averages == saved.record.averages


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def set_of(step: int) -> set[str]:
    return {f"model_{step:08d}.bin", f"state_{step:08d}_00000.bin", f"run_{step:08d}.json", f"DONE_{step:08d}"}


def save_of_two_ranks(folder: Path, step: int, *, zero: bool) -> Checkpoint:
    """As llm.c leaves it: a model, a state for each rank, DONE."""
    saved = checkpoint_of(step)
    states = [folder / f"state_{step:08d}_{rank:05d}.bin" for rank in range(2)]
    processes = tuple(ProcessState(LoaderState(0, rank), 100 + rank, 200 + rank) for rank in range(2))
    write_model_file(folder / f"model_{step:08d}.bin", TINY, rounded_to_nearest(saved.params), "bfloat16")
    state = TrainingState(step, saved.m, saved.v, processes, saved.params)
    write_state_files(states, state, TINY.layout, zero=zero)
    (folder / f"DONE_{step:08d}").touch()
    return saved


def reshard_for_two(source: Path, target: Path) -> None:
    reshard_checkpoint(source, 5, target, [LoaderState(0, rank) for rank in range(2)], num_micro_batches=1, zero=True)
