"""Trackers get what the log gets; each in a process of its own and offline, as they keep threads and settings."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.report import trackers
from gpt2_jax.report.log import RunLog
from gpt2_jax.report.trackers import Tracker, check_tracker
from gpt2_jax.training.run import train
from tests.conftest import CPU, REPOSITORY, change

WRITE = """
import socket, sys
from pathlib import Path
real = socket.socket.connect
def connect(self, address):
    if self.family != socket.AF_UNIX and not str(address[0]).startswith("127."):
        raise OSError(f"offline: {address}")
    return real(self, address)
socket.socket.connect = connect
from gpt2_jax.report.log import RunLog
from gpt2_jax.report.trackers import open_tracker
folder = Path(sys.argv[2])
log = RunLog(folder / "log.jsonl")
log.tracker = open_tracker(sys.argv[1], folder, {"data.batch_size": 4}, resumes=False)
log.write("validation", 0, loss=3.5)
log.write("train", 1, loss=2.5, lr=0.001, norm=1.0, applied=True, loss_z=float("nan"))
log.write("sample", 1, text="In the beginning")
log.tracker.close()
"""


def track(name, folder):
    pytest.importorskip(name)
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "WANDB_MODE": "offline", "TRACKIO_DIR": str(folder / "trackio")}
    environment |= {"HF_HUB_OFFLINE": "1", "HOME": str(folder), "WANDB_SILENT": "true"}
    command = [sys.executable, "-c", WRITE, name, str(folder)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert len((folder / "log.jsonl").read_text().splitlines()) == 3


def test_tensorboard(tmp_path):
    track("tensorboard", tmp_path / "run")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    found = {
        tag: [(event.step, float(make_ndarray(event.tensor_proto))) for event in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }
    assert found["validation/loss"] == [(0, 3.5)]
    assert found["train/loss"] == [(1, 2.5)]
    assert "train/loss_z" not in found  # no number


def test_wandb_offline(tmp_path):
    track("wandb", tmp_path / "run")
    (record,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    content = record.read_bytes()
    assert b"validation/loss" in content
    assert b"In the beginning" in content


def test_trackio(tmp_path):
    track("trackio", tmp_path / "run")
    import sqlite3

    (database,) = (tmp_path / "run" / "trackio").glob("gpt2_jax*.db")
    rows = [json.loads(row[0]) for row in sqlite3.connect(database).execute("select metrics from metrics order by step")]
    assert any(row.get("train/loss") == 2.5 for row in rows)


def test_a_tracker_that_is_not_installed_is_refused_before_the_run(config, monkeypatch):
    monkeypatch.setattr(trackers, "version_text", {}.get)
    with pytest.raises(Gpt2JaxError, match=r"--track: expected wandb .*\n---> HINT: pip install 'gpt2_jax\[wandb\]'"):
        train(change(config, run={"track": "wandb"}), "tiny", CPU)
    assert not Path(config.run.out_dir).exists()
    check_tracker("none")


def test_a_tracker_that_fails_is_told_and_the_log_is_whole(config, monkeypatch, capsys):
    def fail(step, numbers, texts):
        raise ConnectionError("no way to the tracker")

    monkeypatch.setattr("gpt2_jax.training.run.open_tracker", lambda *a, **k: Tracker("nowhere", fail, lambda: None))
    monkeypatch.setattr("gpt2_jax.training.run.check_tracker", lambda name: None)
    folder = train(change(config, run={"track": "tensorboard", "steps": 2}), "tiny", CPU)
    assert capsys.readouterr().out.count("ConnectionError: no way to the tracker\nthe run goes on without it") == 1
    assert len(RunLog(folder / "log.jsonl").records("train")) == 2
    assert (folder / "main.log").read_text().count("trl:") == 2


def test_every_tracker_has_an_extra():
    text = (REPOSITORY / "pyproject.toml").read_text()
    assert all(f"\n{name} = [" in text for name in trackers.TRACKERS[1:])
    assert importlib.util.find_spec("tensorboard") is not None  # of the test extra
