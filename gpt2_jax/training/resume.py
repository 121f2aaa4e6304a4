"""Resuming: the settings that must stay the same, and the state that a checkpoint gives back."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from gpt2_jax.compute import step
from gpt2_jax.compute.plan import Plan
from gpt2_jax.compute.stability import WATCHED, WINDOW, empty_windows
from gpt2_jax.compute.step import TrainState
from gpt2_jax.config import RunConfig, load_saved_config
from gpt2_jax.data.ranks import RankLoaders
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.jax_compat import version_text
from gpt2_jax.llmc.rounding import FIRST_STATE, RoundingStream
from gpt2_jax.machine import processor_name
from gpt2_jax.ops.cpu import library
from gpt2_jax.report.display import Display
from gpt2_jax.training.checkpoint import Checkpoint
from gpt2_jax.training.run_record import RunRecord


def check_settings(config: RunConfig) -> None:
    """Gpt2JaxError for other model or data settings, or another seed, than the run folder's, if it says what they were:
    one that llm.c wrote does not. The batch size may be another, of which a step then has more or fewer."""
    saved = load_saved_config(config.run.out_dir)
    if saved is None:
        return
    for section in ("model", "data"):
        before, now = getattr(saved, section), getattr(config, section)
        for field in dataclasses.fields(before):
            if field.name == "batch_size":
                continue
            _expect_the_same(f"{section}.{field.name}", getattr(before, field.name), getattr(now, field.name))
    _expect_the_same("run.seed", saved.run.seed, config.run.seed)


def computed_by(plan: Plan) -> str:
    """Dtype, products, versions and processor in one line: with others the run's bits would differ."""
    products = f"{plan.linear.name} in {plan.describe_precision()}"
    if library.serves(plan):
        products += f" ({library.description()['kernel']})"
    processor = processor_name() if plan.backend.platform == "cpu" else jax.devices()[0].device_kind
    if plan.devices > 1:
        products += f", {plan.devices} devices, ZeRO stage {plan.zero}"
    if plan.processes > 1:
        products += f", {plan.processes} processes"
    return f"{plan.dtype}, {products}, jax {version_text('jax')}, jaxlib {version_text('jaxlib')}, {processor}"


def resumed_state(
    plan: Plan,
    fresh: TrainState,
    config: RunConfig,
    resumed: Checkpoint,
    train_loader: RankLoaders,
    display: Display,
    *,
    computed_by: str,
) -> TrainState:
    """A fresh state of the saved parameters made the saved one, and the data put where they stood; says what is other.

    Gpt2JaxError for a checkpoint of another sequence length, with which the data would be others.
    """
    windows = empty_windows()
    if resumed.record is None:
        display.line("the checkpoint has no run_*.json: the outlier window begins empty")
    else:
        _check_record(resumed.record, config)
        if resumed.record.computed_by != computed_by:
            display.line(f"so far the run was computed by {resumed.record.computed_by}")
            display.line(f"from here on by {computed_by}: its bits are no longer those of a straight run")
        windows = np.stack([resumed.record.windows[name] for name in WATCHED])
    saved, now = len(resumed.processes), plan.devices
    batch_size = config.data.batch_size if resumed.record is None else resumed.record.batch_size
    if batch_size != config.data.batch_size:
        train_loader.skip(resumed.step * config.num_micro_batches)
        display.line(f"the checkpoint is of --batch-size {batch_size}: the training data go on in the order of another")
    elif saved == now:
        train_loader.restore([process.loader for process in resumed.processes])
    else:
        train_loader.skip(resumed.step * config.num_micro_batches)
        if now == 1:
            display.line("the checkpoint is of several processes: the training data go on in the order of one process")
        else:
            display.line(f"the checkpoint is of {saved} process(es): the training data go on in the order of {now}")
    return step.resumed_state(plan, fresh, resumed.step, resumed.m, resumed.v, windows)


def roundings(plan: Plan, resumed: Checkpoint | None) -> list[RoundingStream]:
    """The streams of all ranks: the saved ones where as many ranks saved them, else new ones of llm.c's seeds."""
    numbers = [(FIRST_STATE + rank, FIRST_STATE + rank) for rank in range(plan.devices)]
    if resumed is not None and len(resumed.processes) == plan.devices:
        numbers = [(process.rounding_state, process.last_rounding_state) for process in resumed.processes]
    elif resumed is not None:
        numbers[0] = (resumed.rounding.state, resumed.rounding.last_update_state)
    return [RoundingStream(*states, num_tensors=len(plan.layout.tensors)) for states in numbers]


def _check_record(record: RunRecord, config: RunConfig) -> None:
    _expect_the_same("data.sequence_length", record.sequence_length, config.data.sequence_length)
    if {name: window.size for name, window in record.windows.items()} != dict.fromkeys(WATCHED, WINDOW):
        raise Gpt2JaxError(f"--resume: expected the record of {WINDOW} values each of {' and '.join(WATCHED)}, found others")


def _expect_the_same(setting: str, before: object, now: object) -> None:
    if before != now:
        raise Gpt2JaxError(
            f"--resume: expected the run's {setting} = {before!r}, found {now!r}",
            "leave it out: a resumed run takes its settings from its folder",
        )
