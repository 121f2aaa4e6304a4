"""What a run says before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from gpt2_jax.ops.in_place import writes_in_place

from gpt2_jax.compute.backend import Backend
from gpt2_jax.compute.memory import MemoryEstimate
from gpt2_jax.config import RunConfig
from gpt2_jax.llmc.loader import TokenLoader
from gpt2_jax.ops.linear import Choice
from gpt2_jax.training.start_table import start_table
from tests.conftest import CPU, TINY, change

NEEDED = MemoryEstimate(1_000_000_000, 2_000_000_000, 3_000_000_000, 4_000_000_000)
XLA_ON_CPU = Backend("cpu", "cpu", "test", frozenset({"barriers"}))
CHOICE = Choice("xla", "the reference", {"amx": "this CPU has no AMX", "simd": "switched off", "naive": "switched off"})


def lines(config: RunConfig, backend=CPU, choice=CHOICE) -> list[str]:
    data = config.data
    sizes = {"batch_size": data.batch_size, "sequence_length": data.sequence_length, "vocab_size": TINY.vocab_size}
    loaders = TokenLoader(data.train, **sizes), TokenLoader(data.validation, **sizes)
    rows = start_table(config, backend, "a CPU", choice, TINY.layout, 60, NEEDED, *loaders, Path("runs/x"))
    return [f"{name}: {value}" for name, value in rows]


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({}, "backend: cpu: test"),
        ({}, "device: a CPU"),
        ({}, "matmul: xla in XLA's default: the reference"),
        ({}, ": not simd, naive: switched off"),
        ({"model": {"init": "d12"}}, "weights: d12"),
        ({}, "model: 2 layers, 4 heads, 32 channels, 203 tokens (padded to 256), 16 positions"),
        ({"data": {"shuffle": False}}, "training data: {train}: 2,000 tokens, in order"),
        ({"data": {"overfit_one_batch": True}}, "training data: {validation}: 2,000 tokens, of which the first batch is all"),
        ({}, "validation data: {validation}: 300 tokens"),
        ({"data": {"total_batch_size": 96}}, "batch: 3 x 2 x 16 = 96 tokens a step"),
        ({}, f"memory: {NEEDED} expected in a step"),
        ({}, "steps: 60 (0.96 epochs)"),
        (
            {"optimizer": {"schedule": "wsd", "warmup_steps": 7, "final_learning_rate_fraction": 0.25}},
            "learning rate: wsd, peak 0.01, 7 warmup steps, ends at 0.25 of it; weight decay 0.1",
        ),
        (
            {"optimizer": {"skip_loss_z": 3.0, "skip_gradient_z": 5.0, "nonfinite": "skip"}},
            "updates: float32 parameters; outliers skipped: loss above 3 z, gradient norm above 5 z; what is not finite is "
            "skipped; recomputed: none",
        ),
        (
            {"optimizer": {"master_weights": False}, "compute": {"dtype": "bfloat16"}},
            "updates: bfloat16 parameters, rounded stochastically; outliers skipped: none; what is not finite ends the run; "
            "recomputed: none",
        ),
        (
            {"evaluation": {"validate_every": 9, "sample_every": 0, "hellaswag": "h.bin"}},
            "evaluation: validation every 9 steps, no sample, HellaSwag from h.bin",
        ),
        (
            {"run": {"checkpoint_every": 5, "keep_checkpoints": 2, "major_checkpoint_every": 20}},
            "checkpoints: every 5 steps and after the last, of which the newest 2 and every 20th step's are kept",
        ),
        ({}, "run folder: runs/x"),
    ],
)
def test_settings_are_shown(config, sections, line):
    expected = line.format(train=config.data.train, validation=config.data.validation)
    assert expected in lines(change(config, **sections))


def test_what_is_set_in_the_environment_is_shown_with_for_whom(config):
    for backend, whom in (
        (Backend("cpu", "cpu", "x", environment=(("A", "b"),)), "cpu"),
        (Backend("metal", "METAL", "x", plugin="jax-metal", environment=(("A", "b"),)), "jax-metal"),
    ):
        assert f"environment: A=b, set for {whom}" in lines(config, backend)


@pytest.mark.parametrize("recompute", ["gelu", "layernorm", "block"])
def test_recomputing_that_saves_nothing_is_said(config, recompute):
    config = change(config, compute={"recompute": recompute})
    (line,) = (line for line in lines(config, XLA_ON_CPU) if "saves little or no memory" in line)
    assert line.startswith(f": --recompute {recompute} saves little or no memory: XLA for cpu keeps")


@pytest.mark.parametrize(
    ("recompute", "backend", "choice"),
    [
        ("none", XLA_ON_CPU, CHOICE),
        ("block", CPU, CHOICE),
        pytest.param(
            *("block", XLA_ON_CPU, Choice("threaded", "test", {})),
            marks=pytest.mark.skipif(not writes_in_place("threaded"), reason="no library of custom calls, or an old jax"),
        ),
    ],
)
def test_recomputing_that_saves_memory_or_is_not_asked_for_is_not_remarked_on(config, recompute, backend, choice):
    found = lines(change(config, compute={"recompute": recompute}), backend, choice)
    assert not any("saves little or no memory" in line for line in found)
