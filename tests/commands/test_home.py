"""`~` is the home folder in every path that comes in: from flags in each of their forms, from TOML, from llm.c's words."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import get_type_hints

import pytest

from gpt2_jax.commands.command_line import _RunArguments, parse, parse_command_line
from gpt2_jax.commands.main import COMMANDS
from gpt2_jax.config import RunConfig, format_config, load_config
from gpt2_jax.files import _is_path, with_home

# Every text among the settings and arguments that is no path.
NO_PATHS = {
    *("prompt", "size", "model", "systems", "implementations", "llmc", "text_field", "shard_tokens", "profile", "as_if"),
    *("freeze", "host", "stop", "coordinator", "hosts"),
}
OTHER_COMMANDS = [command for command in COMMANDS if command not in ("train", "doctor")]
PATHS = ["~/x", "~/data/*_train_*.bin", "~"]


def fields_of(kind) -> dict[str, object]:
    """Types of all fields by name, those of dataclasses within included."""
    found = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        inner = getattr(hint, "__origin__", hint)
        found |= fields_of(inner) if dataclasses.is_dataclass(inner) else {name: hint}
    return found


def arguments_of(command: str):
    return importlib.import_module(f"gpt2_jax.commands.{command.replace('-', '_')}").Arguments


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def is_text(hint) -> bool:
    """Whether a field may hold any text, a pathlib.Path aside."""
    return hint is str or any(map(is_text, getattr(hint, "__args__", ())))


def test_every_text_is_a_path_or_known_to_be_none():
    """A new setting or argument has to be one or the other."""
    fields = fields_of(_RunArguments)
    for command in OTHER_COMMANDS:
        fields |= fields_of(arguments_of(command))
    assert {name for name, hint in fields.items() if is_text(hint) and not _is_path(hint)} == NO_PATHS


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["init", "train", "validation", "hellaswag", "out_dir", "prompt"])
def test_settings_of_a_run(home, tmp_path, name, path):
    flag = "--" + name.replace("_", "-")
    section = next(s.name for s in dataclasses.fields(RunConfig) if name in get_type_hints(type(getattr(RunConfig(), s.name))))
    toml = tmp_path / "mine.toml"
    toml.write_text(f'[{section}]\n{name} = "{path}"\n')
    expected = path if name == "prompt" else path.replace("~", str(home))
    assert getattr(getattr(load_config(toml), section), name) == expected
    for words in (
        [flag, path],
        [f"{flag}={path}"],
        ["--config", str(toml)],
        ["--config=~/mine.toml"],
        ["--config", "~/mine.toml"],
    ):
        settings = parse_command_line(words, "").settings
        assert getattr(getattr(settings, section), name) == expected, words
        # What a run keeps says where its files are, wherever it is resumed from.
        (tmp_path / "config.toml").write_text(format_config(settings))
        assert load_config(tmp_path / "config.toml") == settings


def test_a_run_is_resumed_from_a_folder_at_home(home):
    (home / "run").mkdir()
    (home / "run" / "config.toml").write_text("[run]\nsteps = 7\n")
    for words in (["--resume", "--out-dir=~/run"], ["--resume", "--out_dir", "~/run"]):
        run = parse_command_line(words, "").settings.run
        assert (run.steps, run.out_dir) == (7, str(home / "run"))


def test_llmcs_words(home, capsys):
    (home / "log").mkdir()
    (home / "log" / "DONE_00000003").touch()
    settings = parse_command_line(["--llmc", "-i ~/a_train.bin -j ~/a_val.bin -o ~/log -y 1 -e d12"], "").settings
    assert (settings.data.train, settings.data.validation) == (f"{home}/a_train.bin", f"{home}/a_val.bin")
    assert (settings.run.out_dir, settings.run.resume) == (f"{home}/log", True)


@pytest.mark.parametrize("command", OTHER_COMMANDS)
def test_arguments_of_other_commands(home, command):
    arguments = arguments_of(command)
    hints = get_type_hints(arguments, include_extras=True)
    paths = [name for name, hint in hints.items() if _is_path(hint) or "pathlib" in str(hint)]
    words = ["--processes=1"] if command == "reshard" else []
    for name in paths:
        positional = "Positional" in str(hints[name]) or "positional" in str(hints[name])
        words.append("~/x" if positional else f"--{name.replace('_', '-')}=~/x")
    found = parse(arguments, "", words)
    values = {name: getattr(found, name) for name in paths}
    assert {name: str(*value) if isinstance(value, tuple) else str(value) for name, value in values.items()} == dict.fromkeys(
        paths, str(home / "x")
    )
    assert found == with_home(found)


def test_a_tilde_elsewhere_is_a_character():
    for path in ("a~", "./~/x", "data/~x.bin", "~nobody-of-this-name/x"):
        assert parse_command_line(["--train", path], "").settings.data.train == path
