"""Imports point one way, held by reading the sources: from the leaves up to the scripts, and no JAX below the JAX rooms."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "gpt2_jax"
# From the bottom up. A module belongs to the longest name that it begins with, and may import those of its own layer and of
# the layers below. A new room is added here.
LAYERS: list[tuple[str, ...]] = [
    (
        *("gpt2_jax.errors", "gpt2_jax.files", "gpt2_jax.machine", "gpt2_jax.names", "gpt2_jax.output", "gpt2_jax.sharing"),
        *("gpt2_jax.jax_compat", "gpt2_jax.config", "gpt2_jax.cpu_quota", "gpt2_jax.__init__"),
    ),
    ("gpt2_jax.buffer.layout",),
    ("gpt2_jax.families",),
    ("gpt2_jax.llmc", "gpt2_jax.interop"),
    (
        *("gpt2_jax.compute.backend", "gpt2_jax.compute.metal_plugins", "gpt2_jax.compute.metal_tables"),
        *("gpt2_jax.compute.flops", "gpt2_jax.processes"),
    ),
    ("gpt2_jax.ops",),
    ("gpt2_jax.buffer", "gpt2_jax.models"),
    ("gpt2_jax.compute",),
    (
        "gpt2_jax.serving",
        *("gpt2_jax.evaluate", "gpt2_jax.generate", "gpt2_jax.gradient_check", "gpt2_jax.selfcheck", "gpt2_jax.starter_pack"),
        "gpt2_jax.selfcheck_report",
        *("gpt2_jax.convert", "gpt2_jax.logits_check", "gpt2_jax.curve_check", "gpt2_jax.api"),
        *("gpt2_jax.doctor", "gpt2_jax.data", "gpt2_jax.report", "gpt2_jax.training", "gpt2_jax.benchmark"),
    ),
    ("gpt2_jax.commands", "gpt2_jax.__main__"),
    ("scripts",),
]
# The only importers of the settings; everything else is told what it needs.
READS_SETTINGS = (
    *("gpt2_jax.compute.plan", "gpt2_jax.compute.step", "gpt2_jax.compute.metal_check", "gpt2_jax.models.weights"),
    *(
        "gpt2_jax.training",
        "gpt2_jax.commands",
        "gpt2_jax.gradient_check",
        "gpt2_jax.curve_check",
        "gpt2_jax.selfcheck",
        "gpt2_jax.doctor",
        "gpt2_jax.logits_check",
        "gpt2_jax.api",
    ),
    *("gpt2_jax.benchmark", "scripts"),
)
WITHOUT_JAX = (
    *("gpt2_jax.errors", "gpt2_jax.files", "gpt2_jax.names", "gpt2_jax.buffer.layout", "gpt2_jax.families", "gpt2_jax.llmc"),
    "gpt2_jax.interop",
)
NEEDS_JAX = {"jax", "jaxlib", "flax", "optax"}


def in_room(module: str, rooms: tuple[str, ...]) -> bool:
    return any(module == room or module.startswith(room + ".") for room in rooms)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def walk(tree: ast.AST, *, into_functions: bool = True) -> Iterator[ast.AST]:
    """Every node that runs: not what only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node):
            yield from (inner for orelse in node.orelse for inner in ast.walk(orelse))
        elif into_functions or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield node
            yield from walk(node, into_functions=into_functions)


@cache
def sources() -> dict[str, ast.Module]:
    """The syntax tree of every module and script by its name."""
    paths = {path: ".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    paths |= {path: f"scripts.{path.stem}" for path in (REPOSITORY / "scripts").glob("*.py")}
    return {name: ast.parse(path.read_text(encoding="utf-8")) for path, name in paths.items()}


def imports_of(tree: ast.AST, modules: set[str], *, into_functions: bool = True) -> set[str]:
    """What is imported: modules of the project by their full name, others by their first word."""
    found = set()
    for node in walk(tree, into_functions=into_functions):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, ast.unparse(node)
            # `from gpt2_jax.compute import memory` imports the module memory.
            names = [full if (full := f"{node.module}.{alias.name}") in modules else str(node.module) for alias in node.names]
        else:
            continue
        for name in names:
            mine = name.startswith(("gpt2_jax.", "scripts."))
            found.add(name if mine else "gpt2_jax.__init__" if name == "gpt2_jax" else name.partition(".")[0])
    return found


@cache
def imports(*, into_functions: bool = True) -> dict[str, set[str]]:
    trees = sources()
    return {name: imports_of(tree, set(trees), into_functions=into_functions) for name, tree in trees.items()}


def layer_of(module: str) -> int:
    """The layer of the longest name that the module begins with."""
    places = [(len(room), number) for number, rooms in enumerate(LAYERS) for room in rooms if in_room(module, (room,))]
    assert places, f"{module} is in no layer"
    return max(places)[1]


def is_empty(module: str) -> bool:
    return not any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.walk(sources()[module]))


def test_imports_point_one_way():
    wrong = [
        f"{module} imports {imported}"
        for module, all_imported in sorted(imports().items())
        if not (module.endswith("__init__") and is_empty(module))
        for imported in sorted(all_imported)
        if imported.startswith(("gpt2_jax.", "scripts.")) and layer_of(imported) > layer_of(module)
    ]
    assert wrong == []


def test_the_settings_are_imported_by_few():
    readers = {module for module, imported in imports().items() if "gpt2_jax.config" in imported}
    assert sorted(module for module in readers if not in_room(module, READS_SETTINGS)) == []


def closure(module: str, *, into_functions: bool) -> set[str]:
    """Everything that importing a module imports, directly or through others of the project."""
    graph, seen, waiting = imports(into_functions=into_functions), set(), [module]
    while waiting:
        for imported in graph.get(waiting.pop(), set()) - seen:
            seen.add(imported)
            waiting.append(imported)
    return seen


@pytest.mark.parametrize("room", WITHOUT_JAX)
def test_formats_declarations_and_places_need_no_jax(room):
    """Also not through others. jax_compat imports jax inside of functions, for whoever has it."""
    modules = [module for module in sources() if in_room(module, (room,))]
    assert modules
    for module in modules:
        assert imports()[module] & NEEDS_JAX == set(), module
        assert closure(module, into_functions=False) & NEEDS_JAX == set(), module


def test_before_the_backend_is_chosen_jax_is_not_imported():
    """JAX_PLATFORMS is read once, when jax is."""
    for module in ("gpt2_jax.compute.backend", "gpt2_jax.config", "gpt2_jax.doctor", "gpt2_jax.__init__"):
        assert closure(module, into_functions=False) & NEEDS_JAX == set(), module


COLLECTIVES = {"psum", "pmean", "pmax", "pmin", "all_gather", "psum_scatter", "all_to_all", "ppermute", "pshuffle"}


def users_of(names: set[str]) -> set[str]:
    """The modules in which one of these names stands."""
    found = set()
    for module, tree in sources().items():
        for node in ast.walk(tree):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None
            imported = {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
            if name in names or imported & names:
                found.add(module)
    return found


def test_one_file_speaks_to_other_devices():
    assert users_of(COLLECTIVES) == {"gpt2_jax.ops.collectives"}
    # jax_compat knows in which versions shard_map is where.
    assert users_of({"shard_map"}) == {"gpt2_jax.compute.parallel", "gpt2_jax.jax_compat"}


def test_the_reader_of_imports_sees_what_runs_and_only_that():
    """Otherwise all of the above would hold of anything."""
    tree = ast.parse(
        "from typing import TYPE_CHECKING\n"
        "import jax.numpy as jnp\n"
        "if TYPE_CHECKING:\n    from gpt2_jax.compute.plan import Plan\nelse:\n    import numpy\n"
        "def f():\n    from gpt2_jax.compute import memory, run\n    if x:\n        import optax\n"
    )
    found = imports_of(tree, {"gpt2_jax.compute.memory"})
    assert found == {"typing", "jax", "numpy", "gpt2_jax.compute.memory", "gpt2_jax.compute", "optax"}
    assert imports_of(tree, set(), into_functions=False) == {"typing", "jax", "numpy"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(Path(path).relative_to(PACKAGE)))
def test_every_module_has_a_layer(path):
    layer_of(".".join(path.relative_to(REPOSITORY).with_suffix("").parts))
