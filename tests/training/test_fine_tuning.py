"""Runs that fine-tune: dropout and frozen tensors over a resumption, a fresh optimizer, the end when patience is lost."""

from __future__ import annotations

import dataclasses

import numpy as np

from gpt2_jax.llmc.checkpoint_set import complete_steps
from gpt2_jax.training import checkpoint
from gpt2_jax.training.interrupts import StopRequest
from gpt2_jax.training.loop import train_loop
from gpt2_jax.training.run import train
from gpt2_jax.training.run_record import Best
from tests.conftest import CPU, TINY, change
from tests.training.test_loop import fake_run  # noqa: F401 (a fixture)
from tests.training.test_saving import VALIDATES, with_losses


def test_a_run_with_dropout_and_frozen_tensors_resumed_equals_a_straight_one_to_the_bit(config, tmp_path, capsys):
    config = change(
        config,
        data={"total_batch_size": 64},
        optimizer={"dropout": 0.2, "freeze": "wpe,ln*"},
        compute={"recompute": "block"},
        run={"steps": 6, "checkpoint_every": 3},
        evaluation={"sample_every": 0},
    )
    straight = train(change(config, run={"out_dir": str(tmp_path / "straight")}), "tiny", CPU)
    text = " ".join(capsys.readouterr().out.split())
    # 16 x 32 of wpe, two layers of four vectors of 32, and two of the last norm.
    assert "frozen wpe, ln1w, ln1b, ln2w, ln2b, lnfw, lnfb: 832 of " in text
    assert "dropout 0.2 of the embedding" in text
    folder = train(config, "tiny", CPU)
    for path in folder.glob("*00000006*"):
        path.unlink()
    train(change(config, run={"resume": True}), "tiny", CPU)
    for name in ("model_00000006.bin", "state_00000006_00000.bin"):
        assert (folder / name).read_bytes() == (straight / name).read_bytes()
    states = [checkpoint.load_checkpoint(folder, step) for step in (3, 6)]
    before, after = (TINY.layout.views(state.params) for state in states)
    assert {name for name in before if np.array_equal(before[name], after[name])} == {
        *("wpe", "ln1w", "ln1b", "ln2w", "ln2b", "lnfw", "lnfb")
    }
    dry = train(change(config, optimizer={"dropout": 0.0}, run={"out_dir": str(tmp_path / "dry")}), "tiny", CPU)
    assert (dry / "model_00000006.bin").read_bytes() != (straight / "model_00000006.bin").read_bytes()


def test_a_run_that_begins_with_another_runs_weights_has_moments_of_its_own(config, tmp_path):
    first = train(config, "tiny", CPU)
    of_first = checkpoint.load_checkpoint(first, 8)
    from_first = {**dict.fromkeys(dataclasses.asdict(TINY)), "init": str(first)}
    settings = {"learning_rate": 0.0, "gradient_clip": 0.0}
    run = {"steps": 1, "out_dir": str(tmp_path / "second")}
    second = train(change(config, model=from_first, optimizer=settings, run=run), "tiny", CPU)
    saved = checkpoint.load_checkpoint(second, 1)
    np.testing.assert_array_equal(saved.params, of_first.params)
    # After one update from zero m is (1 - beta1) g, and v (1 - beta2) g^2.
    np.testing.assert_allclose(saved.v, (1 - 0.95) * np.square(saved.m / (1 - 0.9)), rtol=1e-5, atol=1e-30)
    assert np.abs(of_first.m - saved.m).max() > 0


LOSSES = [9.0, 5.0, 4.0, 4.5, 4.25, 3.0]  # before the first step, then after each


def test_a_run_ends_when_its_patience_is_lost(fake_run):  # noqa: F811
    run = with_losses(fake_run(evaluation=VALIDATES | {"patience": 2, "sample_every": 3}), LOSSES)
    train_loop(run, StopRequest())
    assert run.step == 4
    assert complete_steps(run.folder) == [2, 4]
    assert run.best == Best(2, 4.0)
    said = run.display.text
    ended = "ended early after step 4 of 8: 2 validations in a row have not brought the loss below 4.000000, that of step 2"
    assert ended in said
    assert "lowest validation loss: 4.0000 at step 2, whose checkpoint is kept" in said
    assert f"generate.py {run.folder} --step 2\n" in said
    assert f"--resume --out-dir {run.folder} --patience 4\n" in said
    assert "sample at step 4" in said  # as after a last step


def test_patience_is_counted_on_by_a_resumed_run(fake_run):  # noqa: F811
    run = with_losses(fake_run(at=3, evaluation=VALIDATES | {"patience": 2}), [4.5, 4.25, 3.0])
    run.best = Best(2, 4.0)
    train_loop(run, StopRequest())
    assert run.step == 4


def test_a_run_whose_loss_falls_keeps_its_patience(fake_run):  # noqa: F811
    run = with_losses(fake_run(evaluation=VALIDATES | {"patience": 2}), [9.0, 5.0, 5.5, 4.5, 4.75, 4.0, 4.25, 3.0, 3.5])
    train_loop(run, StopRequest())
    assert run.step == 8
    assert "ended early" not in run.display.text
