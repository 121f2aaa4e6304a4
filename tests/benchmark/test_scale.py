"""bench_scale.py: several devices compute what one does, in every system; ratios are of what was measured alike."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from gpt2_jax import jax_compat
from gpt2_jax.benchmark import scale
from gpt2_jax.benchmark.scale import STRONG, WEAK, Row
from gpt2_jax.benchmark.train_report import Measured, System, Workload
from gpt2_jax.benchmark.train_system import ON_SEVERAL, Request, Result, measure_system
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2Config

# A vocabulary that is its own padding, so that the peers' softmax is over the same tokens.
CONFIG = GPT2Config(max_sequence_length=16, vocab_size=256, num_layers=1, num_heads=2, channels=32)
WORK = Workload("tiny", CONFIG, batch_size=2, sequence_length=16, backend="cpu")
REQUEST = Request(
    "gpt2_jax", "auto", "float32", "default", "cpu", dataclasses.asdict(CONFIG), 2, 16, 2, micro_batches=2, devices=2, zero=1
)
several = pytest.mark.skipif(not jax_compat.serves_several_devices(), reason="this jax does not serve several devices")


@several
@pytest.mark.torch
def test_every_system_computes_the_same_on_two_devices():
    """Two devices with two micro-batches each train as one device with four of the same rows; float32's roundings apart."""
    ours = measure_system(REQUEST).losses
    assert ours[-1] < ours[0] - 1e-3
    for name in ON_SEVERAL:
        request = dataclasses.replace(REQUEST, name=name, matmul="")
        program = [sys.executable, "-m", "gpt2_jax.benchmark.train_system", json.dumps(dataclasses.asdict(request))]
        ended = subprocess.run(program, input="9 60\n", capture_output=True, text=True, timeout=120, check=True)
        losses = json.loads(ended.stdout.splitlines()[-1]).get("losses", ended.stdout)
        assert losses == pytest.approx(ours, abs=2e-6 * ours[0]), name


@several
def test_more_devices_than_there_are_are_refused():
    with pytest.raises(NotImplementedError, match="at most the 4"):
        measure_system(dataclasses.replace(REQUEST, devices=8))


def row(scaling, devices, name, seconds, stage="", micro_batches=1):
    result = Result("auto", [seconds], 1.0, 5_000_000, [3.0], "cpu", "F32_F32_F32", "F32_F32_F32")
    work = dataclasses.replace(WORK, devices=devices, micro_batches=micro_batches)
    return Row(scaling, work, Measured(System(name, "", "float32", stage=stage), result))


def test_ratios_are_of_tokens_a_second():
    """By hand: 32 tokens a device and micro-batch."""
    rows = [
        row(WEAK, 1, "gpt2_jax", 1.0),
        row(STRONG, 1, "gpt2_jax", 1.6, micro_batches=2),
        row(WEAK, 2, "gpt2_jax", 1.25, "zero1"),
        row(WEAK, 2, "pytorch_ddp", 2.5),
        Row(WEAK, dataclasses.replace(WORK, devices=2), Measured(System("pytorch_fsdp", "", "float32"), None, "too old")),
        row(STRONG, 2, "gpt2_jax", 1.0, "zero1"),
    ]
    found = scale.record(rows, WORK, {}, {})["rows"]
    assert [each.get("tokens_per_second") for each in found] == [32, 40, 51.2, 25.6, None, 64]
    assert [each.get("times_one_device") for each in found] == [1, 1, 1.6, 0.8, None, 1.6]
    assert [each.get("times_ddp") for each in found] == [None, None, 2, 1, None, 2.5]
    assert found[4]["refused"] == "too old"
    lines = scale.table(rows).splitlines()
    assert len(lines) == 7
    assert "too old" in lines[5]


def test_what_is_measured(monkeypatch, capsys):
    """Weak scaling on every number, strong scaling by micro-batches; on all devices both are one measurement."""
    asked = []

    def measure(systems, work, steps, limits, say):
        asked.append((work.devices, work.micro_batches, [f"{system.name} {system.stage}".strip() for system in systems]))
        return [row(WEAK, work.devices, system.name, 1.0, system.stage).measured for system in systems]

    monkeypatch.setattr(scale, "measure_in_turn", measure)
    assert scale.bench_scale(WORK, (4, 1, 2), (1, 3), "float32", steps=3)
    peers = list(ON_SEVERAL)
    assert asked == [
        (1, 1, ["gpt2_jax", "pytorch"]),
        (1, 4, ["gpt2_jax"]),
        (2, 1, ["gpt2_jax zero1", "gpt2_jax zero3", *peers]),
        (2, 2, ["gpt2_jax zero1"]),
        (4, 1, ["gpt2_jax zero1", "gpt2_jax zero3", *peers]),
    ]
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(each["scaling"], each["devices"], each["system"]) for each in rows][-1] == (STRONG, 4, "gpt2_jax")


def test_numbers_that_do_not_divide_the_largest_are_refused():
    with pytest.raises(Gpt2JaxError, match="--devices: expected numbers that divide the largest of them, found 2, 3"):
        scale.bench_scale(WORK, (2, 3), (1,), "float32", steps=1)
