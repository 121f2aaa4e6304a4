"""Saving: a run's checkpoints when their step is due, when time has passed, and of the lowest validation loss."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from gpt2_jax.buffer.layout import ParameterLayout
from gpt2_jax.compute.parallel import make_tensor_rows, parts_of
from gpt2_jax.compute.stability import WATCHED
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.jax_compat import on_host
from gpt2_jax.llmc.checkpoint_set import set_paths
from gpt2_jax.llmc.rounding import stochastically_rounded
from gpt2_jax.training import checkpoint
from gpt2_jax.training.run_record import BEST, STEP, TIME, Best, RunRecord, read_run_record, write_run_record
from gpt2_jax.training.run_state import Run, failure_text


def save(run: Run, kept: str = STEP) -> None:
    """Write a checkpoint and delete those that need not be kept. A failure of whatever kind is reported; it is raised if
    there is no later step to save."""
    run.saved_step = run.step
    try:
        path = _save_alone(run, kept) if run.group.number == 1 else _save_with_others(run, kept)
    except Exception as error:
        if run.step == run.steps:
            raise
        run.display.line(f"NO checkpoint of step {run.step}: {failure_text(error)}\n{run.newest_checkpoint()}")
        return
    finally:
        run.saved_at, run.is_to_save = time.monotonic(), False
    why = {STEP: "", TIME: " (time has passed)", BEST: " (the lowest validation loss so far)"}[kept]
    run.display.line(f"checkpoint of step {run.step}{why}: {path}")
    _delete_old(run)


def is_time_to_save(run: Run) -> bool:
    """Whether --checkpoint-minutes have passed without a checkpoint, by process 0's clock."""
    return run.is_time_to_save if run.group.number == 1 else run.is_to_save


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
        if run.group.is_first:
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
    if not run.group.is_first:
        return
    every, keep, major = run.config.run.checkpoint_every, run.config.run.keep_checkpoints, run.config.run.major_checkpoint_every
    run.attempt(lambda: checkpoint.delete_old_checkpoints(run.folder, run.step, every=every, keep=keep, major_every=major))


def _record(run: Run, kept: str) -> RunRecord:
    config = run.config
    return RunRecord(
        batch_size=config.data.batch_size,
        sequence_length=config.data.sequence_length,
        dtype=config.compute.dtype,
        computed_by=run.computed_by,
        windows=dict(zip(WATCHED, np.asarray(run.state.windows), strict=True)),
        averages=run.clock.averages,
        settings=dataclasses.asdict(config),
        plan=tuple(run.plan.rows()),
        kept=kept,
        best=run.best,
    )


def _parts(run: Run) -> dict[int, checkpoint.Part]:
    """What each of this process's ranks saves."""
    state, ranks = run.state, run.data.train.ranks
    params, m, v = (
        [on_host(part) for part in parts_of(buffer)] for buffer in (state.params, state.optimizer.m, state.optimizer.v)
    )
    streams = (run.rounding, *run.other_roundings)[ranks.start : ranks.stop]
    of_ranks = zip(ranks, params, m, v, run.data.train.states(), streams, strict=True)
    return {rank: checkpoint.Part(*of_rank) for rank, *of_rank in of_ranks}


def _save_alone(run: Run, kept: str) -> Path:
    assert isinstance(run.plan.config, GPT2Config)  # llm.c's files are of GPT-2s
    first, *others = _parts(run).values()
    whole = checkpoint.Checkpoint(
        model=run.plan.config,
        params=first.params,
        m=first.m,
        v=first.v,
        step=run.step,
        loader=first.loader,
        others=tuple(others),
        dtype=run.config.compute.dtype,
        master_weights=run.config.optimizer.master_weights,
        rounding=run.rounding,
        record=_record(run, kept),
    )
    return checkpoint.save_checkpoint(run.folder, whole)


def _save_with_others(run: Run, kept: str) -> Path:
    assert isinstance(run.plan.config, GPT2Config)
    return checkpoint.save_with_others(
        run.folder,
        run.group,
        run.step,
        run.plan.config,
        _parts(run),
        _model_tensors(run),
        num_ranks=run.plan.devices,
        dtype=run.config.compute.dtype,
        master_weights=run.config.optimizer.master_weights,
        record=_record(run, kept),
    )


def _model_tensors(run: Run) -> Iterator[np.ndarray]:
    """The parameters as the model file has them, one tensor after another; of several processes only process 0 gets values,
    but all make them together. With bfloat16 and master weights they are rounded as `save_checkpoint` does."""
    plan, streams = run.plan, (run.rounding, *run.other_roundings)
    rounds = run.config.compute.dtype == "bfloat16" and run.config.optimizer.master_weights
    if not plan.zero:
        if run.group.is_first:
            params = on_host(parts_of(run.state.params)[0])
            yield stochastically_rounded(params, plan.layout, run.rounding.last_seeds()) if rounds else params
        return
    seeds = [stream.last_seeds() for stream in streams]
    for number, tensor in enumerate(plan.layout.part(plan.devices).tensors):
        run.group.progress += 1
        rows = make_tensor_rows(plan, number)(run.state.params)
        if not run.group.is_first:
            jax.block_until_ready(rows)
            yield np.empty(0, np.float32)
            continue
        parts = np.asarray(rows)
        if rounds:
            alone = ParameterLayout((tensor,))
            of_ranks = zip(parts, seeds, strict=True)
            parts = np.stack([stochastically_rounded(part, alone, own[number : number + 1]) for part, own in of_ranks])
        yield parts.reshape(plan.devices, tensor.num_layers, -1).swapaxes(0, 1)
