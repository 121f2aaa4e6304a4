"""--dry-run: what a run would cost, with nothing written and no weights made."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys

import pytest

from gpt2_jax.compute import memory, step
from gpt2_jax.compute.memory import MemoryEstimate
from gpt2_jax.training import dry_run
from gpt2_jax.training import run as trainer
from gpt2_jax.training.run import train
from tests.conftest import CPU, change, plan_of


class Counted:
    """What the compiler would count of a step: so many bytes a row of the batch."""

    def __init__(self, batch_size):
        self.batch_size = batch_size


@pytest.fixture
def linear_memory(monkeypatch):
    """A function that lets a step need `fixed` + `row` * B bytes on a device of `limit`; returns the batches compiled for."""

    def pretend(*, fixed: int, row: int, limit: int | None, bend: int = 0) -> list[int]:
        compiled_for: list[int] = []

        def compile_step(plan, settings, steps, shape, *, rounds=False):
            compiled_for.append(shape[1])
            return Counted(shape[1])

        def compiled_memory(plan, compiled):
            return MemoryEstimate(fixed, 0, 0, row * compiled.batch_size + bend * compiled.batch_size**2)

        monkeypatch.setattr(dry_run, "compile_step", compile_step)
        monkeypatch.setattr(memory, "compiled_memory", compiled_memory)
        monkeypatch.setattr(memory, "device_limit", lambda: limit)
        return compiled_for

    return pretend


class Quiet:
    def line(self, text: str) -> None:
        """Say nothing."""


def largest_batch(config, *, batch_size: int, limit: int | None) -> str:
    config = change(config, data={"batch_size": batch_size})
    needed = memory.compiled_memory(plan_of(), Counted(batch_size))
    return dry_run._largest_batch(config, plan_of(), 8, needed, limit, Quiet())


@pytest.mark.parametrize("batch_size", [1, 4, 60, 100, 3000])
def test_the_largest_batch_is_found_in_few_compiles(config, linear_memory, batch_size):
    compiled_for = linear_memory(fixed=1000, row=100, limit=7099)
    assert largest_batch(config, batch_size=batch_size, limit=7099) == "--batch-size 60 at --sequence-length 16"
    assert len(compiled_for) <= 5


@pytest.mark.parametrize("bend", [1, 3])
def test_at_most_five_compiles_and_only_what_fits_is_recommended(config, linear_memory, bend):
    compiled_for = linear_memory(fixed=1000, row=1, bend=bend, limit=10**6)
    found = largest_batch(config, batch_size=2, limit=10**6)
    assert len(compiled_for) <= 5
    fits = int(re.match(r"--batch-size (\d+) at", found)[1])
    assert 1000 + fits + bend * fits**2 <= 10**6
    if " does not" in found:
        too_large = int(re.search(r", (\d+) does not", found)[1])
        assert 1000 + too_large + bend * too_large**2 > 10**6


def test_a_batch_of_one_that_does_not_fit_is_said(config, linear_memory):
    linear_memory(fixed=1000, row=100, limit=1050)
    assert largest_batch(config, batch_size=3, limit=1050).startswith("none: a batch of 1 needs more than ")


def test_a_device_that_does_not_tell_its_memory_gives_no_answer(config, linear_memory):
    linear_memory(fixed=1000, row=100, limit=None)
    assert largest_batch(config, batch_size=3, limit=None).startswith("not known: ")


@pytest.mark.parametrize("limit", [2 * 10**6, 1000, None])
def test_a_dry_run_tells_the_cost_and_writes_nothing(config, tmp_path, monkeypatch, capsys, limit):
    """With a device that the run fits on, one that it does not, and one that tells nothing."""
    before = sorted(tmp_path.rglob("*"))
    compiled_for = []

    def counting(plan, settings, steps, shape, **options):
        compiled_for.append(shape)
        return step.compile_step(plan, settings, steps, shape, **options)

    monkeypatch.setattr(trainer, "compile_step", counting)
    monkeypatch.setattr(dry_run, "compile_step", counting)
    monkeypatch.setattr(memory, "device_limit", lambda: limit)
    monkeypatch.setattr(trainer, "load_weights", lambda *_: pytest.fail("made the weights"))
    assert train(change(config, run={"dry_run": True}), "tiny", CPU) is None
    output = capsys.readouterr().out
    for kind in ("parameters", "gradients", "moments", "activations", "total"):
        assert re.search(rf"memory, {kind} +\d+\.\d\d GB", output)
    assert re.search(r"operations +\d\.\d{3}e\+\d\d FLOP a step, \d\.\d{3}e\+\d\d in 8 steps", output)
    if limit == 1000:
        assert re.search(r"a step +not timed: it does not fit", output)
    else:
        assert re.search(r"a step +\d+\.\d ms, [\d,]+ tok/s, .* TFLOP/s", output)
        assert re.search(r"the run +\d+\.\d\d hours for 256 tokens \(0\.13 epochs\)", output)
    assert re.search(r"largest batch +(--batch-size|none|not known)", output)
    assert len(compiled_for) <= 1 + 5
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_the_timed_steps_memory_does_not_stay_beside_the_runs_own():
    """In a process of its own, which keeps freed memory as a run does: 0.5 GB of state, of which nothing stays resident."""
    program = """
import os
from gpt2_jax.machine import keep_freed_memory
keep_freed_memory()
import gpt2_jax
from gpt2_jax.compute.backend import select_backend
backend = select_backend("cpu")
from gpt2_jax.compute.plan import make_plan
from gpt2_jax.compute.step import compile_step
from gpt2_jax.config import RunConfig, DataSettings
from gpt2_jax.families.gpt2 import config_from_descriptor
from gpt2_jax.training.dry_run import time_step
config = RunConfig(data=DataSettings(batch_size=1, sequence_length=16))
plan = make_plan(config.compute, backend, config_from_descriptor("d6"))
compiled = compile_step(plan, config.optimizer, 10, config.batch_shape)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
before = resident()
assert time_step(config, plan, compiled) > 0
print(resident() - before)
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < 150_000_000
