"""What a run says before it starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from gpt2_jax import jax_compat
from gpt2_jax.compute import metal_plugins
from gpt2_jax.compute.backend import Backend, metal_backend
from gpt2_jax.compute.memory import MemoryEstimate
from gpt2_jax.compute.plan import Plan, make_plan
from gpt2_jax.config import RunConfig
from gpt2_jax.data.batches import open_data
from gpt2_jax.training.dry_run import estimate
from gpt2_jax.training.start_table import start_table
from tests.conftest import CPU, TINY, available, change

NEEDED = MemoryEstimate(1_000_000_000, 2_000_000_000, 3_000_000_000, 4_000_000_000)
KEEPS_BARRIERS = dataclasses.replace(CPU, lacks=CPU.lacks - {"barriers"})
LOSES_BARRIERS = dataclasses.replace(CPU, lacks=CPU.lacks | {"barriers"})


def lines(config: RunConfig, backend=CPU, matmul="xla", *, verbose=True) -> list[str]:
    config = change(config, compute={"matmul": matmul}, run={"verbose": verbose})
    data = open_data(change(config, evaluation={"hellaswag": "", "validate_every": 1}), TINY)
    plan = make_plan(config.compute, backend, TINY)
    rows = start_table(config, plan, "a CPU", data, 60, NEEDED, Path("runs/x"))
    return [f"{name}: {value}" for name, value in rows]


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({}, "backend: cpu: test"),
        ({}, "device: a CPU"),
        ({}, "matmul: xla in XLA's default: asked for with --matmul xla"),
        ({}, "ops: concatenate for writer: the reference, on every device"),
        ({"model": {"init": "d12"}}, "weights: d12"),
        ({}, "model: 2 layers, 4 heads, 32 channels, 203 tokens (padded to 256), 16 positions"),
        ({"data": {"shuffle": False}}, "training data: {train}: 2,000 tokens, in order"),
        ({"data": {"overfit_one_batch": True}}, "training data: {validation}: 300 tokens, of which the first batch is all"),
        ({}, "validation data: {validation}: 300 tokens"),
        ({"data": {"total_batch_size": 96}}, "batch: 3 x 2 x 16 = 96 tokens a step"),
        ({}, f"memory: {NEEDED} in a step"),
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
            "checkpoints: every 5 steps and after the last, and every 10 minutes, "
            "of which the newest 2 and every 20th step's are kept",
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


def test_what_the_plugin_has_reads_and_is_newer_than_is_said(config, monkeypatch):
    backend = metal_backend(metal_plugins.plugin_named("jax-mps"), "x")
    monkeypatch.setenv("JAX_MPS_ASYNC_DISPATCH", "1")
    found = lines(config, backend, "auto")
    assert "jax-mps, one operation: attention, GELU, LayerNorm, a product and its bias" in found
    assert any(line.startswith("jax-mps, bfloat16: products have the dtype of their operands") for line in found)
    assert "JAX_MPS_ASYNC_DISPATCH: '1'; 1: a step does not wait for the one before; experimental" in found
    assert not any("newer than the table" in line for line in found)
    monkeypatch.setattr(metal_plugins, "version_text", lambda name: "1.0")
    (line,) = (line for line in lines(config, backend, "auto", verbose=False) if "newer than the table" in line)
    assert line.startswith("warning: jax-mps 1.0")


@pytest.mark.parametrize("recompute", ["gelu", "layernorm", "block"])
def test_recomputing_that_saves_nothing_is_said(config, recompute):
    config = change(config, compute={"recompute": recompute})
    (line,) = (line for line in lines(config, LOSES_BARRIERS) if "little or no memory is saved" in line)
    assert line.startswith(f": --recompute {recompute}: XLA for cpu keeps")


@pytest.mark.parametrize(
    ("recompute", "backend", "matmul"),
    [
        ("none", LOSES_BARRIERS, "xla"),
        ("block", KEEPS_BARRIERS, "xla"),
        *(pytest.param("block", LOSES_BARRIERS, *one.values, marks=one.marks) for one in available(["threaded"])),
    ],
)
def test_recomputing_that_saves_memory_or_is_not_asked_for_is_not_remarked_on(config, recompute, backend, matmul):
    if matmul != "xla" and not jax_compat.ffi_call_can_alias():
        pytest.skip("this jax cannot alias a custom call's argument and result")
    found = lines(change(config, compute={"recompute": recompute}), backend, matmul)
    assert not any("little or no memory" in line for line in found)


def test_what_was_refused_is_said_with_its_reason(config, monkeypatch):
    monkeypatch.setenv("GPT2_JAX_DISABLE", "simd,naive")
    assert ": not simd, naive: switched off by GPT2_JAX_DISABLE" in lines(config)


def test_ten_rows_say_the_most_important_and_that_there_are_more(config, monkeypatch):
    every = lines(config)
    shown = lines(config, verbose=False)
    assert len(shown) == 10 < len(every)
    assert shown[-1] == f": and {len(every) - 9} rows more: --verbose"
    assert set(shown[:-1]) <= set(every)
    for name in ("backend", "weights", "model", "training data", "validation data"):
        assert any(line.startswith(f"{name}: ") for line in shown)


def test_what_is_switched_off_or_misleads_comes_first_and_what_is_asked_for_next(config, monkeypatch):
    monkeypatch.setenv("GPT2_JAX_DISABLE", "simd,naive")
    config = change(config, data={"validation": config.data.train}, evaluation={"validate_every": 9})
    shown = lines(config, verbose=False)
    assert shown[0] == ": not simd, naive: switched off by GPT2_JAX_DISABLE"
    assert shown[1].startswith("warning: validation data that are trained on too")
    assert [line.partition(":")[0] for line in shown[2:5]] == ["learning rate", "updates", "evaluation"] or [
        line.partition(":")[0] for line in shown[2:4]
    ] == ["learning rate", "evaluation"]


def test_no_warning_is_left_out_where_there_are_many(config, monkeypatch):
    reasons = [f"reason {number}" for number in range(14)]
    monkeypatch.setattr(Plan, "fallbacks", lambda self: reasons)
    monkeypatch.setattr(Plan, "rows", lambda self: [("", f"not x: {reason}") for reason in reasons])
    shown = lines(config, verbose=False)
    assert len(shown) == 10
    assert all(any(f"not x: {reason}" in line for line in shown) for reason in reasons)


@pytest.mark.parametrize(
    ("steps", "seconds", "settings", "said"),
    [
        (231, 62.0, {}, "231 steps at 62 s: about 4.0 h; a validation about 6.9 min"),
        (500, 0.124, {"validation_batches": 40}, "500 steps at 124 ms: about 62 s; a validation about 1.7 s"),
        (100000, 10.0, {"validate_every": 0}, "100000 steps at 10 s: about 12 days"),
        (10, 130.0, {"validation_batches": -1}, "10 steps at 2.2 min: about 22 min"),
    ],
)
def test_how_long_it_takes_is_said_in_units_of_their_own(config, steps, seconds, settings, said):
    config = change(config, evaluation={"validate_every": 20, "validation_batches": 20, **settings})
    assert estimate(config, steps, seconds) == said
