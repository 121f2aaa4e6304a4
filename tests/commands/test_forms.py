"""The three ways to start a command: each says commands in its own form, and --help keeps the lines of examples."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import subprocess
import sys

import pytest

from gpt2_jax import errors
from gpt2_jax.commands import main as program
from gpt2_jax.commands.command_line import _RunArguments, help_text
from gpt2_jax.errors import as_typed, program_name
from tests.conftest import REPOSITORY

FORMS = {
    "/usr/bin/gpt2-jax": ("gpt2-jax train", "gpt2-jax prepare"),
    "/x/gpt2_jax/__main__.py": ("python -m gpt2_jax train", "python -m gpt2_jax prepare"),
    "scripts/train.py": ("scripts/train.py", "python scripts/prepare_data.py"),
    "../repo/scripts/train.py": ("../repo/scripts/train.py", "python ../repo/scripts/prepare_data.py"),
    "/a b/scripts/train.py": ("/a b/scripts/train.py", "python '/a b/scripts/prepare_data.py'"),
}


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
    assert len(program.COMMANDS) == len(scripts) == 11
    assert {command.replace("-", "_") for command in program.COMMANDS} == modules - {"__init__", "command_line", "main"}
    for command in program.COMMANDS:
        script = errors._SCRIPTS.get(command, command.replace("-", "_")) + ".py"
        lines = (REPOSITORY / "scripts" / script).read_text().splitlines()
        assert lines[-1] == f'run("{command}")'
        assert len(lines) == 3


@pytest.mark.parametrize("command", program.COMMANDS)
def test_help_keeps_the_lines_of_its_examples(started, command, capsys):
    started("/usr/bin/gpt2-jax", command)
    module = importlib.import_module(f"gpt2_jax.commands.{command.replace('-', '_')}")
    examples = [line for line in help_text(module.__doc__).splitlines() if line.startswith("  gpt2-jax ")]
    assert examples
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: gpt2-jax {command} " in shown
    # Wherever the terminal is wide enough an example stands on a line of its own.
    assert [example for example in examples if len(example) < 75 and f"\n{example.rstrip()}\n" not in shown] == []


def test_an_unknown_command_names_the_nearest_one(started, capsys):
    started("/usr/bin/gpt2-jax", "", ["trian"])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: gpt2-jax: expected one of train, generate")
    assert error.endswith("found 'trian'\n---> HINT: gpt2-jax train\n")


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
    assert ended.stderr.endswith("---> HINT: python -m gpt2_jax prepare\n")


def test_which_extra_is_told_without_anything_installed():
    """make asks it before there is an environment: the standard library must do."""
    run = "runpy.run_module('gpt2_jax.compute.backend', run_name='__main__')"
    code = f"import sys, runpy; sys.path.insert(0, {str(REPOSITORY)!r}); {run}"
    ended = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() in ("", "cuda", "metal", "mps")


def test_importing_a_command_imports_no_jax():
    modules = [f"gpt2_jax.commands.{command.replace('-', '_')}" for command in program.COMMANDS]
    code = f"import sys, importlib; [importlib.import_module(m) for m in {modules!r}]; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, cwd=REPOSITORY).returncode == 0


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


def test_flags_and_their_defaults_are_frozen():
    """Scripts and notes of users name them: a change belongs into flags.json, and into the release notes."""
    found = {"train": flags_of(_RunArguments)}
    for command in program.COMMANDS:
        module = importlib.import_module(f"gpt2_jax.commands.{command.replace('-', '_')}")
        if hasattr(module, "Arguments"):
            found[command] = flags_of(module.Arguments)
    frozen = json.loads((REPOSITORY / "tests" / "commands" / "flags.json").read_text())
    assert found == frozen


def test_scripts_are_parsed_by_nobody():
    """Fronts only: no definition in them."""
    for path in (REPOSITORY / "scripts").glob("*.py"):
        assert [type(node).__name__ for node in ast.parse(path.read_text()).body] == ["ImportFrom", "Expr"], path
