"""The picture of a run's loss."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.report.log import RunLog
from gpt2_jax.report.plots import plot_loss


def train(log, step, loss):
    log.write("train", step, loss=loss, lr=1e-3, norm=1.0)


def test_the_plot_is_a_png_also_of_a_run_with_a_loss_that_is_not_finite(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    for step in range(1, 5):
        train(log, step, float("nan") if step == 3 else 10.0 / step)
    log.write("validation", 4, loss=3.0)
    path = tmp_path / "loss.png"
    plot_loss(log, path, baseline=6.0)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_a_picture_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    """The disk is full halfway: the picture of the run so far stays."""
    log, path = RunLog(tmp_path / "log.jsonl"), tmp_path / "loss.png"
    train(log, 1, 1.0)
    path.write_bytes(b"old")

    def fill(self, file, **options):
        Path(file.name).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Figure, "savefig", fill)
    with pytest.raises(Gpt2JaxError, match="No space left"):
        plot_loss(log, path)
    assert path.read_bytes() == b"old"
    assert {entry.name for entry in tmp_path.iterdir()} == {"log.jsonl", "main.log", "loss.png"}


def test_a_plot_that_cannot_be_written_is_an_error(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    train(log, 1, 1.0)
    with pytest.raises(Gpt2JaxError, match=r"loss\.png: expected to write it, found: No such file"):
        plot_loss(log, tmp_path / "none" / "loss.png")
