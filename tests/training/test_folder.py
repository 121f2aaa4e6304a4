"""The run folder: what is refused, and the link to the newest run."""

from __future__ import annotations

import os
import shlex

import pytest

from gpt2_jax.commands.command_line import parse_command_line
from gpt2_jax.config import saved_config_path
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc.checkpoint_set import newest_step
from gpt2_jax.training.folder import folder_of, open_folder, refuse_used_folder
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


def test_a_run_that_ended_before_its_first_checkpoint_gives_its_folder_to_the_next(config, tmp_path):
    folder = tmp_path / "a run"
    start(config, folder)
    (folder / "log.jsonl").write_text("{}")
    with pytest.raises(Gpt2JaxError) as refused:
        newest_step(folder)
    # The hint's command is one that begins anew there, with the dead run's settings.
    words = shlex.split(refused.value.hint.partition("   (")[0])[2:]
    settings = parse_command_line(words, "").settings
    assert (settings.run.out_dir, settings.data) == (str(folder), config.data)
    refuse_used_folder(folder)
    said = []
    start(config, folder, said)
    assert said == [
        f"{folder}: a run ended here before its first checkpoint; this one takes its place",
        f"{folder}/log.jsonl, which was there before, is now log.jsonl.1",
    ]
    assert (folder / "log.jsonl.1").read_text() == "{}"
    assert not (folder / "log.jsonl").exists()


def test_files_that_a_run_would_write_over_get_other_names(config, tmp_path):
    for content in ("first", "second"):
        for name in ("log.jsonl", "main.log", "loss.png", "notes.txt"):
            (tmp_path / name).write_text(content)
        said = []
        start(config, tmp_path, said)
        assert len([line for line in said if "which was there before" in line]) == 3
    assert (tmp_path / "notes.txt").read_text() == "second"
    for name in ("log.jsonl", "main.log", "loss.png"):
        assert [(tmp_path / f"{name}.{number}").read_text() for number in (1, 2)] == ["first", "second"]
    # A run that goes on keeps its own.
    (tmp_path / "log.jsonl").write_text("third")
    with open_folder(tmp_path, change(config, run={"out_dir": str(tmp_path), "resume": True}), print):
        assert (tmp_path / "log.jsonl").read_text() == "third"


def test_a_folder_that_another_run_used_in_the_meantime_is_refused(config, tmp_path):
    """While this one compiled."""
    folder = tmp_path / "a"
    refuse_used_folder(folder)
    start(config, folder)
    (folder / "DONE_00000003").touch()
    (folder / "log.jsonl").write_text("the other's")
    with pytest.raises(Gpt2JaxError, match="holds DONE_00000003"):
        start(config, folder)
    assert (folder / "log.jsonl").read_text() == "the other's"


@pytest.mark.parametrize("name", ["DONE_00000003", "model_00000003.bin", "state_00000003_00000.bin"])
def test_parts_of_a_checkpoint_are_something(config, tmp_path, name):
    start(config, tmp_path / "a")
    (tmp_path / "a" / name).touch()
    with pytest.raises(Gpt2JaxError, match=f"holds {name}, of a checkpoint that is not complete") as refused:
        refuse_used_folder(tmp_path / "a")
    assert refused.value.hint == f"--out-dir {tmp_path}/a-2"
    with pytest.raises(Gpt2JaxError, match=f"found {name}") as refused:
        newest_step(tmp_path / "a")
    assert "--resume --out-dir" not in refused.value.hint
    assert f"--out-dir {tmp_path}/a " not in refused.value.hint


def test_a_file_and_another_programs_settings_are_something(config, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    saved_config_path(tmp_path / "other").write_text("[server]\nport = 1\n")
    for name, found in (("file", "is a file"), ("other", "holds another config.toml")):
        with pytest.raises(Gpt2JaxError, match=found) as refused:
            refuse_used_folder(tmp_path / name)
        assert refused.value.hint == f"--out-dir {tmp_path / name}-2"
    (tmp_path / "strangers").mkdir()
    (tmp_path / "strangers" / "notes.txt").touch()
    refuse_used_folder(tmp_path / "strangers")
    refuse_used_folder(tmp_path / "new")
