"""The run folder: what is refused, and the link to the newest run."""

from __future__ import annotations

import os

import pytest

from gpt2_jax.training.folder import folder_of, open_folder
from tests.conftest import change


def start(config, folder, said=None):
    with open_folder(folder, change(config, run={"out_dir": str(folder)}), ([] if said is None else said).append):
        pass


def test_latest_is_the_run_that_started_last(config, tmp_path):
    runs = tmp_path / "runs"
    for name in ("a", "b", "a"):
        start(config, runs / name)
        assert os.readlink(runs / "latest") == name
    assert sorted(os.listdir(runs)) == ["a", "b", "latest"]
    # Going on through the link leaves it a link to the run.
    goes_on = folder_of(change(config, run={"out_dir": str(runs / "latest")}), "x")
    assert goes_on == runs / "a"
    start(config, goes_on)
    assert os.readlink(runs / "latest") == "a"


def test_other_folders_get_no_link_and_nobodys_file_is_replaced(config, tmp_path):
    start(config, tmp_path / "mine" / "a")
    assert os.listdir(tmp_path / "mine") == ["a"]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "latest").write_text("a note")
    start(config, tmp_path / "runs" / "a")
    assert (tmp_path / "runs" / "latest").read_text() == "a note"


def test_a_link_that_cannot_be_made_costs_a_line(config, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    said = []
    (tmp_path / "runs").mkdir()
    start(config, tmp_path / "runs" / "a", said)
    assert len(said) == 1
    assert said[0].endswith("/latest: expected to name this run, found: Operation not permitted; the run goes on without it")


@pytest.mark.parametrize("name", ["runs/x", ""])
def test_a_fresh_folder_is_the_settings_or_a_new_one(config, name):
    folder = folder_of(change(config, run={"out_dir": name}), "tiny")
    assert str(folder) == name or str(folder).startswith("runs/tiny-2")
