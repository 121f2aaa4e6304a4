"""The three ways to start a command: each says commands in its own form, and --help keeps the lines of examples."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2_jax import errors
from gpt2_jax.commands import main as program
from gpt2_jax.commands.command_line import _RunArguments
from gpt2_jax.errors import as_typed, program_name
from tests.conftest import REPOSITORY

FORMS = {
    "/usr/bin/gpt2-jax": ("gpt2-jax train", "gpt2-jax prepare"),
    "/x/gpt2_jax/__main__.py": ("python -m gpt2_jax train", "python -m gpt2_jax prepare"),
    "scripts/train.py": ("python scripts/train.py", "python scripts/prepare_data.py"),
    "../repo/scripts/train.py": ("python ../repo/scripts/train.py", "python ../repo/scripts/prepare_data.py"),
    "/a b/scripts/train.py": ("python '/a b/scripts/train.py'", "python '/a b/scripts/prepare_data.py'"),
}


def script_of(command):
    return errors._SCRIPTS.get(command, command.replace("-", "_")) + ".py"


def module_of(command):
    return importlib.import_module(f"gpt2_jax.commands.{command.replace('-', '_')}")


@pytest.fixture
def started(monkeypatch):
    """A function that pretends that this process was started as a command."""

    def pretend(argv0, command="train", words=()):
        monkeypatch.setattr(sys, "argv", [argv0, *words])
        monkeypatch.setattr(errors, "_command", command)

    return pretend


@pytest.mark.parametrize("argv0", FORMS)
def test_hints_are_said_in_the_form_that_was_typed(started, argv0):
    started(argv0)
    name, prepare = FORMS[argv0]
    assert program_name() == name
    assert as_typed("---> HINT: python scripts/prepare_data.py --source x") == f"---> HINT: {prepare} --source x"
    assert as_typed("pip install -e .") == "pip install -e ."


def test_a_library_says_the_form_in_the_code(started):
    started("/usr/bin/ipython", command="")
    assert as_typed("python scripts/train.py --resume") == "python scripts/train.py --resume"


def test_every_command_has_a_script_a_module_and_a_line():
    scripts = {path.name for path in (REPOSITORY / "scripts").glob("*.py")}
    modules = {path.stem for path in (REPOSITORY / "gpt2_jax" / "commands").glob("*.py")}
    assert len(program.COMMANDS) == len(scripts)
    assert {command.replace("-", "_") for command in program.COMMANDS} == modules - {"__init__", "command_line", "main"}
    assert {script_of(command) for command in program.COMMANDS} == scripts


@pytest.mark.parametrize("command", program.COMMANDS)
def test_a_script_is_a_front_of_its_command_and_does_nothing_when_it_is_imported(started, command, capsys):
    path = str(REPOSITORY / "scripts" / script_of(command))
    statements = ast.parse(Path(path).read_text(encoding="utf-8")).body
    assert [type(statement) for statement in statements] == [ast.ImportFrom, ast.If]
    started(path, words=["--help"])
    runpy.run_path(path, run_name="imported")
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(path, run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python {path} ")


@pytest.mark.parametrize("argv0", ["/usr/bin/gpt2-jax", "/x/gpt2_jax/__main__.py", "scripts/NAME"])
@pytest.mark.parametrize("command", program.COMMANDS)
def test_help_keeps_the_lines_of_its_examples(started, command, argv0, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")
    started(argv0.replace("NAME", script_of(command)), command)
    module = module_of(command)
    written = [line.strip() for line in module.__doc__.splitlines() if line.strip().startswith("python scripts/")]
    assert written
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: {program_name()} ")
    assert [example for example in written if f"\n  {as_typed(example)}\n" not in shown] == []
    assert ("scripts/" in shown) == argv0.startswith("scripts/")


@pytest.mark.parametrize(
    ("typed", "command"),
    [
        ("trian", "train"),
        ("Train", "train"),
        ("prepare_data", "prepare"),
        ("reshard_checkpoint", "reshard"),
        ("write_starter_pack", "starter-pack"),
        ("zzz", "--help"),
    ],
)
def test_an_unknown_command_names_the_nearest_one(started, capsys, typed, command):
    started("/usr/bin/gpt2-jax", "", [typed])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: gpt2-jax: expected one of train, generate")
    assert error.endswith(f"found {typed!r}\n---> HINT: gpt2-jax {command}\n")


@pytest.mark.parametrize(("words", "status"), [([], 2), (["--help"], 0)])
def test_the_program_lists_its_commands(started, words, status, capsys):
    started("/x/gpt2_jax/__main__.py", "", words)
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == status
    shown = capsys.readouterr().out
    assert shown.startswith("usage: python -m gpt2_jax COMMAND")
    assert all(f"  {name} " in shown for name in program.COMMANDS)


def test_the_module_runs_a_command():
    command = [sys.executable, "-m", "gpt2_jax", "train", "--steps", "1", "--train", "none.bin"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPOSITORY)
    assert ended.returncode == 2
    assert "---> HINT: python -m gpt2_jax prepare --source TEXT_FILE " in ended.stderr


def test_which_extra_is_told_without_anything_installed():
    """make asks it before there is an environment: the standard library must do."""
    run = "runpy.run_module('gpt2_jax.compute.backend', run_name='__main__')"
    code = f"import sys, runpy; sys.path.insert(0, {str(REPOSITORY)!r}); {run}"
    ended = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() in ("", "cuda", "metal", "mps")


def test_ctrl_c_while_a_command_is_imported_ends_with_130(started, monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    started("/usr/bin/gpt2-jax", "", ["train"])
    monkeypatch.setattr(program.importlib, "import_module", interrupted)
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert (ended.value.code, capsys.readouterr().err) == (130, "interrupted\n")


def test_nothing_is_imported_before_its_time():
    """Only the command that is asked for; no jax before the backend is chosen; no numpy before a bench sets its threads."""
    code = """
import importlib, sys
from gpt2_jax.commands.main import COMMANDS
modules = [f"gpt2_jax.commands.{command.replace('-', '_')}" for command in COMMANDS]
assert not set(modules) & set(sys.modules)
for bench in ("gpt2_jax.commands.bench_matmul", "gpt2_jax.commands.bench_train"):
    importlib.import_module(bench)
    assert "numpy" not in sys.modules, bench
for module in modules:
    importlib.import_module(module)
    assert "jax" not in sys.modules, module
"""
    ended = subprocess.run([sys.executable, "-c", code], timeout=120, cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def flags_of(arguments, prefix=""):
    """Names and defaults of a command's flags."""
    found = {}
    for field in dataclasses.fields(arguments):
        default = field.default if field.default is not dataclasses.MISSING else None
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if dataclasses.is_dataclass(default):
            found |= flags_of(type(default))
        else:
            found[field.name] = default if default is None or isinstance(default, (int, float, str, bool)) else str(default)
    return found


def frozen_flags():
    return json.loads((REPOSITORY / "tests" / "commands" / "flags.json").read_text(encoding="utf-8"))


def test_flags_and_their_defaults_are_frozen():
    """Scripts and notes of users name them: a change belongs into flags.json, and into the release notes."""
    found = {"train": flags_of(_RunArguments), "doctor": {}}
    for command in program.COMMANDS:
        if command not in found:
            found[command] = flags_of(module_of(command).Arguments)
    assert found == frozen_flags()


# Of the others that are on or off only the change of the default is a flag.
OFF_AS_WELL = {"train": {"--no-shuffle", "--no-master-weights"}, "reshard": {"--no-zero"}, "convert": {"--no-check"}}
ALIASES = {"--lr": "--learning-rate", "--max-iters": "--steps", "--device": "--backend"}
WITHOUT_FLAG = {
    "generate": {"--checkpoint"},
    "reshard": {"--folder"},
    "convert": {"--source", "--target"},
    "report": {"--runs"},
    "check-curve": {"--run"},
}  # by their place


@pytest.mark.parametrize("command", program.COMMANDS)
def test_help_has_the_frozen_flags_and_no_others(started, command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")
    started("/usr/bin/gpt2-jax", command)
    with pytest.raises(SystemExit):
        module_of(command).main(["--help"])
    # At the border of a box, which is a space where the terminal cannot show lines.
    shown = re.findall(r"[│\s] (--[a-z][a-z0-9-]*)(?: [A-Z]+| \{[^}]*\})?(?:, (--[a-z0-9-]+))?", capsys.readouterr().out)
    flags = {"--" + name.replace("_", "-") for name in frozen_flags()[command]}
    flags |= {
        alias
        for alias, flag in ALIASES.items()
        if flag in flags and command not in ("bench-train", "bench-scale", "check-curve")
    }
    expected = (flags | OFF_AS_WELL.get(command, set())) - WITHOUT_FLAG.get(command, set())
    assert {flag for pair in shown for flag in pair if flag} == expected
