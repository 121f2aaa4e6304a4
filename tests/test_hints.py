"""Every hint in the code leads somewhere: commands exist and parse, flags are flags, programs are known ones."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
from collections.abc import Iterator

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
    "mpirun",
    "srun",
}


Scope = dict[str, list[tuple[ast.expr, "Scope"]]]  # what a name may stand for, and what the names in that stand for


def texts(node: ast.expr, scope: Scope, seen: frozenset[str] = frozenset()) -> list[str]:
    """The texts that an expression may give, '{}' standing for what is filled in."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        parts = [""]
        for value in node.values:
            filled = texts(value, scope, seen) if isinstance(value, ast.Constant) else ["{}"]
            if isinstance(value, ast.FormattedValue):
                filled = texts(value.value, scope, seen) or ["{}"]
            parts = [before + after for before in parts for after in filled]
        return parts
    if isinstance(node, ast.IfExp):
        return texts(node.body, scope, seen) + texts(node.orelse, scope, seen)
    if isinstance(node, ast.BoolOp):
        return [text for value in node.values for text in texts(value, scope, seen)]
    if isinstance(node, ast.BinOp):
        lefts, rights = (texts(side, scope, seen) or ["{}"] for side in (node.left, node.right))
        return [left + right for left in lefts for right in rights]
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    name = f"{node.func.id}()" if called else node.id if isinstance(node, ast.Name) else ""
    if name in scope and name not in seen:
        return [text for value, inner in scope[name] for text in texts(value, inner, seen | {name})]
    return []


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node of a module or function, but those of the functions in it."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if not isinstance(node, ast.FunctionDef):
            yield from statements(node)


def scopes(tree: ast.AST, around: Scope) -> Iterator[tuple[ast.AST, Scope]]:
    """A module or function and all functions in it, each with its names: what is assigned to them, and what they return."""
    scope, functions = dict(around), []
    own: Scope = {}
    for node in statements(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    own.setdefault(target.id, []).append((node.value, scope))
        elif isinstance(node, ast.FunctionDef):
            functions.append(node)
    scope |= own
    yield tree, scope
    for function in functions:
        inner = list(scopes(function, scope))
        values = [node.value for node in statements(function) if isinstance(node, ast.Return) and node.value is not None]
        scope[f"{function.name}()"] = [(value, inner[0][1]) for value in values]
        yield from inner


SOURCES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted((REPOSITORY / "gpt2_jax").rglob("*.py"))}
ROOMS = {path: list(scopes(tree, {})) for path, tree in SOURCES.items()}
for path, tree in SOURCES.items():
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (module := REPOSITORY / f"{(node.module or '').replace('.', '/')}.py") in ROOMS:
            for alias in node.names:  # a function or a constant of another module
                for name in (alias.name, f"{alias.name}()"):
                    for _, scope in ROOMS[path]:
                        scope.setdefault(name, ROOMS[module][0][1].get(name, []))


def hints() -> dict[str, str]:
    """hint -> file and line: second arguments of Gpt2JaxError, what is passed as a hint, and every text that holds a command
    of ours or begins with a flag and its value."""
    found: dict[str, str] = {}
    for path, tree in SOURCES.items():
        parts = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for room, scope in ROOMS[path]:
            for node in statements(room):
                where = f"{path.relative_to(REPOSITORY)}:{getattr(node, 'lineno', 0)}"
                if isinstance(node, ast.Call):
                    is_error = getattr(node.func, "id", "") == "Gpt2JaxError" and len(node.args) > 1
                    passed = [word.value for word in node.keywords if word.arg == "hint"]
                    for value in [*node.args[1:2], *passed] if is_error else passed:
                        found |= dict.fromkeys(texts(value, scope), where)
                elif isinstance(node, (ast.JoinedStr, ast.Constant)) and node not in parts and path.name != "errors.py":
                    is_one = re.compile(r"python scripts/|^--[a-z][a-z-]* [^ :]+(?!\S*:)")
                    found |= {text: where for text in texts(node, scope) if is_one.search(text) and ": expected" not in text}
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


COMMAND_OF = {f"gpt2_jax/commands/{name.replace('-', '_')}.py": name for name in FROZEN}
COMMAND_OF |= {"gpt2_jax/benchmark/matmul_timing.py": "bench-matmul", "gpt2_jax/benchmark/train.py": "bench-train"}
COMMAND_OF["gpt2_jax/benchmark/scale.py"] = "bench-scale"


def command_of(hint: str) -> str | None:
    """The command in whose own module a hint stands."""
    return COMMAND_OF.get(HINTS[hint].partition(":")[0])


@pytest.mark.parametrize("hint", [hint for hint in HINTS if hint.startswith("--") and command_of(hint)])
def test_a_hint_of_a_command_has_this_commands_flags(hint):
    flags = {"--help"} | {"--" + name.replace("_", "-") for name in FROZEN[command_of(hint)]}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", hint)) <= flags, HINTS[hint]


@pytest.mark.parametrize("hint", [hint for hint in HINTS if hint.startswith("--") and not commands(hint)])
def test_a_hint_of_flags_parses(hint):
    line = re.split(r"   \(|, or | or |, with| turns | to | takes |;| at ", hint)[0]
    for flag, value in (("--total-batch-size", "28672"), ("--config", "demo")):  # which not every number fits
        line = line.replace(f"{flag} {{}}", f"{flag} {value}")
    words = shlex.split(line.replace("{}", "7"))
    if {word for word in words if word.startswith("--")} <= TRAIN_FLAGS:
        try:
            parse_command_line(words, "")
        except SystemExit as ended:
            pytest.fail(f"{HINTS[hint]}: {line!r} does not parse ({ended.code})")


@pytest.mark.parametrize("hint", [hint for hint in HINTS if re.match(r"[a-z]+ (-[a-zA-Z]|install|clone)", hint)])
def test_another_programs_command_is_of_a_known_program(hint):
    assert hint.split()[0] in {*PROGRAMS, "leave"}, HINTS[hint]
