"""Runs on several devices of one process: what they save, and going on with another number of them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from gpt2_jax import jax_compat
from gpt2_jax.compute.parallel import make_whole_buffer
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.training import checkpoint
from gpt2_jax.training.loop import train_loop
from gpt2_jax.training.run import train
from tests.conftest import CPU, TINY, change

pytestmark = pytest.mark.skipif(not jax_compat.serves_several_devices(), reason="this jax does not serve several devices")


@pytest.fixture
def on_devices(config):
    """A function that gives the settings of a run of 8 x 16 tokens a step on so many devices."""

    def make(devices: int, **run):
        return change(
            config,
            data={"batch_size": 2, "total_batch_size": 128, "shuffle": False},
            compute={"devices": devices, "matmul": "xla"},
            evaluation={"sample_every": 0, "validate_every": 2, "validation_batches": 1},
            run={"steps": 2, **run},
        )

    return make


@pytest.fixture
def at_the_start(monkeypatch):
    """Whole parameters and moments of every run from now on, before its first step."""
    found = []

    def watched(run, request):
        state = run.state
        whole = [np.asarray(make_whole_buffer(run.plan)(part)) for part in (state.params, *state.optimizer[1:])]
        found.append((int(state.optimizer.step), *whole))
        train_loop(run, request)

    monkeypatch.setattr("gpt2_jax.training.run.train_loop", watched)
    return found


def test_parameters_and_moments_are_exact_at_the_seam(on_devices, at_the_start):
    """From 1, 2 and 4 devices to each other: what a run begins with has the bits of what the run before it saved."""
    for index, devices in enumerate((1, 2, 4, 1)):
        config = on_devices(devices, steps=index + 1, resume=index > 0)
        folder = train(change(config, compute={"dtype": "bfloat16"}, evaluation={"validate_every": 0}), "tiny", CPU)
        if index:
            saved = checkpoint.load_checkpoint(folder, index)
            step, params, m, v = at_the_start[index]
            assert step == index
            assert np.abs(m).max() > 0
            for found, expected in ((params, saved.params), (m, saved.m), (v, saved.v)):
                np.testing.assert_array_equal(found, expected)


def test_any_number_of_devices_goes_on_from_any_other(on_devices, tmp_path):
    """On as one device would, by float32's roundings."""
    straight = checkpoint.load_checkpoint(train(on_devices(1, steps=8, out_dir=str(tmp_path / "one")), "tiny", CPU), 8)
    folder = tmp_path / "run"
    for step, devices in ((2, 2), (4, 1), (6, 4), (8, 2)):
        train(on_devices(devices, steps=step, resume=step > 2), "tiny", CPU)
        paths = sorted(folder.glob(f"state_{step:08d}_*.bin"))
        assert len(paths) == devices
        part = 4 * TINY.layout.num_parameters // devices
        assert all(2 * part < path.stat().st_size < 2 * part + 4096 for path in paths)
    resumed = checkpoint.load_checkpoint(folder, 8)
    np.testing.assert_allclose(resumed.params, straight.params, rtol=0, atol=1e-4)
    np.testing.assert_allclose(resumed.m, straight.m, rtol=1e-3, atol=1e-5)


def test_a_resumed_run_has_the_bits_of_a_straight_one(on_devices, tmp_path):
    straight = train(on_devices(2, steps=4, out_dir=str(tmp_path / "straight")), "tiny", CPU)
    folder = train(on_devices(2), "tiny", CPU)
    train(on_devices(2, steps=4, resume=True), "tiny", CPU)
    for path in sorted(straight.glob("*_00000004*.bin")):
        assert (Path(folder) / path.name).read_bytes() == path.read_bytes(), path.name


def test_devices_that_cannot_share_a_resumed_runs_step_are_refused(on_devices):
    train(on_devices(1), "tiny", CPU)
    with pytest.raises(Gpt2JaxError, match=r"share the run's 128 tokens of a step, found 3 x 2 x 16") as caught:
        train(on_devices(3, steps=4, resume=True), "tiny", CPU)
    assert caught.value.hint == "--devices 2"
    with pytest.raises(Gpt2JaxError) as caught:
        train(change(on_devices(4, steps=4, resume=True), data={"batch_size": 4}), "tiny", CPU)
    assert caught.value.hint == "--devices 2   or --devices 4 --batch-size 2"


def test_all_devices_are_taken_and_said(on_devices, monkeypatch, capsys):
    """--devices 0 where jax shows accelerators: by default each has its batch, and the table says what that makes."""
    monkeypatch.setattr("gpt2_jax.training.run.num_devices", lambda backend, requested: requested or 4)
    config = on_devices(0, steps=1, verbose=True)
    train(change(config, data={"total_batch_size": 0}, evaluation={"validate_every": 0}), "tiny", CPU)
    shown = " ".join(capsys.readouterr().out.split())
    assert "1 x 2 x 16 on 4 devices = 128 tokens a step" in shown
    assert "devices 4 on the one axis 'data', ZeRO stage 1: parameters and moments are divided; 0.2 MB travel" in shown
    assert re.search(r"between devices: 0\.2 MB from each in a step, at the measured [\d.]+ GB/s .* of it", shown)


def test_more_devices_than_there_are_are_refused(on_devices):
    with pytest.raises(Gpt2JaxError, match=r"at most the 4 that jax sees here, found 64"):
        train(change(on_devices(64), data={"total_batch_size": 0}), "tiny", CPU)
