"""Saving: a run's checkpoints when their step is due, when time has passed, and of the lowest validation loss."""

from __future__ import annotations

import dataclasses
import math
import time

import numpy as np

from gpt2_jax.compute.parallel import parts_of
from gpt2_jax.compute.stability import WATCHED
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.jax_compat import on_host
from gpt2_jax.llmc.checkpoint_set import set_paths
from gpt2_jax.training import checkpoint
from gpt2_jax.training.run_record import BEST, STEP, TIME, Best, RunRecord, read_run_record, write_run_record
from gpt2_jax.training.run_state import Run, failure_text


def save(run: Run, kept: str = STEP) -> None:
    """Write a checkpoint and delete those that need not be kept. A failure of whatever kind is reported; it is raised if
    there is no later step to save."""
    run.saved_step = run.step
    try:
        path = checkpoint.save_checkpoint(run.folder, _checkpoint(run, kept))
    except Exception as error:
        if run.step == run.steps:
            raise
        run.display.line(f"NO checkpoint of step {run.step}: {failure_text(error)}\n{run.newest_checkpoint()}")
        return
    finally:
        run.saved_at = time.monotonic()
    why = {STEP: "", TIME: " (time has passed)", BEST: " (the lowest validation loss so far)"}[kept]
    run.display.line(f"checkpoint of step {run.step}{why}: {path}")
    _delete_old(run)


def is_time_to_save(run: Run) -> bool:
    """Whether --checkpoint-minutes have passed without a checkpoint."""
    minutes = run.config.run.checkpoint_minutes
    return minutes > 0 and time.monotonic() - run.saved_at >= 60 * minutes


def save_by_time(run: Run) -> None:
    """Write a checkpoint that goes when there is a newer one, unless this step has been saved already."""
    if run.saved_step != run.step:
        save(run, TIME)


def keep_best(run: Run, loss: float) -> None:
    """With --keep-best or --patience: save the step of the lowest validation loss so far, or note it in the record of its
    checkpoint."""
    is_best = math.isfinite(loss) and (run.best is None or loss < run.best.loss)
    if not (run.config.keeps_best and is_best and run.step > 0):
        return
    before, run.best = run.best, Best(run.step, loss)
    if run.is_saved:
        run.attempt(lambda: _note_best(run))
    else:
        save(run, BEST)
        if not run.is_saved:
            run.best = before  # whose checkpoint is still there to be kept


def _note_best(run: Run) -> None:
    path = set_paths(run.folder, run.step)[2]
    write_run_record(path, dataclasses.replace(read_run_record(path), best=run.best))
    _delete_old(run)


def _delete_old(run: Run) -> None:
    every, keep, major = run.config.run.checkpoint_every, run.config.run.keep_checkpoints, run.config.run.major_checkpoint_every
    run.attempt(lambda: checkpoint.delete_old_checkpoints(run.folder, run.step, every=every, keep=keep, major_every=major))


def _checkpoint(run: Run, kept: str) -> checkpoint.Checkpoint:
    state, config = run.state, run.config
    assert isinstance(run.plan.config, GPT2Config)  # llm.c's files are of GPT-2s
    record = RunRecord(
        batch_size=config.data.batch_size,
        sequence_length=config.data.sequence_length,
        dtype=config.compute.dtype,
        computed_by=run.computed_by,
        windows=dict(zip(WATCHED, np.asarray(state.windows), strict=True)),
        averages=run.clock.averages,
        settings=dataclasses.asdict(config),
        plan=tuple(run.plan.rows()),
        kept=kept,
        best=run.best,
    )
    params, m, v = (
        [on_host(part) for part in parts_of(buffer)] for buffer in (state.params, state.optimizer.m, state.optimizer.v)
    )
    loaders, streams = run.data.train.states(), (run.rounding, *run.other_roundings)
    parts = [checkpoint.Part(*of_rank) for of_rank in zip(params, m, v, loaders, streams, strict=True)]
    return checkpoint.Checkpoint(
        model=run.plan.config,
        params=params[0],
        m=m[0],
        v=v[0],
        step=run.step,
        loader=loaders[0],
        others=tuple(parts[1:]),
        dtype=config.compute.dtype,
        master_weights=config.optimizer.master_weights,
        rounding=run.rounding,
        record=record,
    )
