"""Resuming: the settings that must stay the same, and the state that a checkpoint gives back."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.buffer.adamw import AdamWState
from gpt2_jax.compute.plan import Plan
from gpt2_jax.compute.stability import WATCHED, WINDOW, empty_windows
from gpt2_jax.compute.step import TrainState
from gpt2_jax.config import RunConfig, load_saved_config
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.jax_compat import version_text
from gpt2_jax.llmc.loader import TokenLoader
from gpt2_jax.machine import processor_name
from gpt2_jax.ops.cpu import library
from gpt2_jax.report.display import Display
from gpt2_jax.training.checkpoint import Checkpoint
from gpt2_jax.training.run_record import RunRecord


def check_settings(config: RunConfig) -> None:
    """Gpt2JaxError for other model or data settings, or another seed, than the run folder's, if it says what they were:
    one that llm.c wrote does not."""
    saved = load_saved_config(config.run.out_dir)
    if saved is None:
        return
    for section in ("model", "data"):
        before, now = getattr(saved, section), getattr(config, section)
        for field in dataclasses.fields(before):
            _expect_the_same(f"{section}.{field.name}", getattr(before, field.name), getattr(now, field.name))
    _expect_the_same("run.seed", saved.run.seed, config.run.seed)


def computed_by(plan: Plan) -> str:
    """Dtype, products, versions and processor in one line: with others the run's bits would differ."""
    products = f"{plan.linear.name} in {plan.describe_precision()}"
    if library.serves(plan):
        products += f" ({library.description()['kernel']})"
    processor = processor_name() if plan.backend.platform == "cpu" else jax.devices()[0].device_kind
    return f"{plan.dtype}, {products}, jax {version_text('jax')}, jaxlib {version_text('jaxlib')}, {processor}"


def resumed_state(
    fresh: TrainState,
    config: RunConfig,
    resumed: Checkpoint,
    train_loader: TokenLoader,
    display: Display,
    *,
    computed_by: str,
) -> TrainState:
    """A fresh state of the saved parameters made the saved one, and the data put where they stood; says what is other.

    Gpt2JaxError for a checkpoint of another batch size or sequence length, with which the data would be others.
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
    if resumed.loader is not None:
        train_loader.restore(resumed.loader)
    else:
        train_loader.skip(resumed.step * config.num_micro_batches)
        display.line("the checkpoint is of several processes: the training data go on in the order of one process")
    moments = AdamWState(jnp.array(resumed.step, jnp.int32), jnp.array(resumed.m), jnp.array(resumed.v))
    return dataclasses.replace(fresh, optimizer=moments, windows=jnp.array(windows))


def _check_record(record: RunRecord, config: RunConfig) -> None:
    for name in ("batch_size", "sequence_length"):
        _expect_the_same(f"data.{name}", getattr(record, name), getattr(config.data, name))
    if {name: window.size for name, window in record.windows.items()} != dict.fromkeys(WATCHED, WINDOW):
        raise Gpt2JaxError(f"--resume: expected the record of {WINDOW} values each of {' and '.join(WATCHED)}, found others")


def _expect_the_same(setting: str, before: object, now: object) -> None:
    if before != now:
        raise Gpt2JaxError(
            f"--resume: expected the run's {setting} = {before!r}, found {now!r}",
            "leave it out: a resumed run takes its settings from its folder",
        )
