"""Every hint in the code leads somewhere: commands exist and parse, flags are flags, programs are known ones."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex

import pytest

from gpt2_jax import errors
from gpt2_jax.commands.command_line import parse, parse_command_line
from tests.conftest import REPOSITORY

FROZEN = json.loads((REPOSITORY / "tests" / "commands" / "flags.json").read_text(encoding="utf-8"))
TRAIN_FLAGS = {"--" + name.replace("_", "-") for name in FROZEN["train"]} | {"--no-shuffle", "--no-master-weights"}
ALL_FLAGS = TRAIN_FLAGS | {"--help"} | {"--" + name.replace("_", "-") for flags in FROZEN.values() for name in flags}
PROGRAMS = {
    "pip",
    "python",
    "make",
    "mkdir",
    "curl",
    "rm",
    "unset",
    "xcode-select",
    "softwareupdate",
    "git",
    "kill",
    "iconv",
    "split",
}


def texts(node: ast.expr, names: dict[str, ast.expr]) -> list[str]:
    """The texts that an expression may give, '{}' standing for what is filled in."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        parts = [""]
        for value in node.values:
            filled = texts(value, names) if isinstance(value, ast.Constant) else ["{}"]
            if isinstance(value, ast.FormattedValue):
                filled = texts(value.value, names) or ["{}"]
            parts = [before + after for before in parts for after in filled]
        return parts
    if isinstance(node, ast.IfExp):
        return texts(node.body, names) + texts(node.orelse, names)
    if isinstance(node, ast.BinOp):
        return [left + right for left in texts(node.left, names) or ["{}"] for right in texts(node.right, names) or ["{}"]]
    if isinstance(node, ast.Name) and node.id in names:
        return texts(names[node.id], {name: value for name, value in names.items() if name != node.id})
    return []


def hints() -> dict[str, str]:
    """hint -> file and line: the second arguments of Gpt2JaxError, and every text that holds a command of ours."""
    found = {}
    for path in sorted((REPOSITORY / "gpt2_jax").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {
            target.id: node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        parts = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            where = f"{path.relative_to(REPOSITORY)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Gpt2JaxError" and len(node.args) > 1:
                found |= dict.fromkeys(texts(node.args[1], names), where)
            elif isinstance(node, (ast.JoinedStr, ast.Constant)) and node not in parts and path.name != "errors.py":
                found |= {text: where for text in texts(node, names) if "python scripts/" in text}
    return found


HINTS = hints()


def commands(hint: str) -> list[str]:
    """Our commands in a text, each up to a remark behind spaces or in brackets, the sentence's end or the line's."""
    found = re.findall(r"python scripts/\w+\.py(?:(?!  | \(| or | and |; )[^\n`])*", hint)
    return [re.sub(r"[.,:]$| \.\.\.$", "", command) for command in found if command != "python scripts/train.py {}"]


def test_there_are_hints_to_walk():
    assert len(HINTS) > 60
    assert sum(len(commands(hint)) for hint in HINTS) > 25
    assert len(set(HINTS.values())) > 60


@pytest.mark.parametrize("hint", [hint for hint in HINTS if commands(hint)])
def test_a_command_in_a_hint_parses(hint, monkeypatch):
    monkeypatch.setattr(errors, "_command", "")
    for command in commands(hint):
        words = shlex.split(command.replace("--config {}", "--config demo").replace("{}", "7"))
        script, words = words[1].removeprefix("scripts/").removesuffix(".py"), words[2:]
        assert (REPOSITORY / "scripts" / f"{script}.py").exists(), (HINTS[hint], command)
        name = errors.command_of_script(script)
        if not words:
            continue
        try:
            if name == "train":
                parse_command_line(words, "")
            elif name != "doctor":
                parse(importlib.import_module(f"gpt2_jax.commands.{name.replace('-', '_')}").Arguments, "", words)
        except SystemExit as ended:
            pytest.fail(f"{HINTS[hint]}: {command!r} does not parse ({ended.code})")


@pytest.mark.parametrize("hint", [hint for hint in HINTS if re.search(r"(?<![\w-])--[a-z]", hint) and not commands(hint)])
def test_flags_in_a_hint_are_flags(hint):
    if hint.split()[0] in PROGRAMS:  # another program's
        return
    unknown = [flag for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", hint) if flag not in ALL_FLAGS]
    assert unknown == [], HINTS[hint]


@pytest.mark.parametrize("hint", [hint for hint in HINTS if hint.startswith("--") and not commands(hint)])
def test_a_hint_of_flags_parses(hint):
    line = re.split(r"   \(|, or | or |, with| turns | to | takes ", hint)[0]
    words = shlex.split(line.replace("--total-batch-size {}", "--total-batch-size 4096").replace("{}", "7"))
    if {word for word in words if word.startswith("--")} <= TRAIN_FLAGS:
        try:
            parse_command_line(words, "")
        except SystemExit as ended:
            pytest.fail(f"{HINTS[hint]}: {line!r} does not parse ({ended.code})")


@pytest.mark.parametrize("hint", [hint for hint in HINTS if re.match(r"[a-z]+ (-[a-zA-Z]|install|clone)", hint)])
def test_another_programs_command_is_of_a_known_program(hint):
    assert hint.split()[0] in {*PROGRAMS, "leave"}, HINTS[hint]
