"""The leaves of the house import the standard library, NumPy and each other, so that every room can use them.

The settings also name tyro, which makes the command line of them, and the package, beside which its configs lie.
"""

from __future__ import annotations

import ast
import sys

import pytest

from tests.conftest import REPOSITORY

LEAVES = ("names", "output", "errors", "files", "machine", "config")


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_imports_no_room(leaf):
    tree = ast.parse((REPOSITORY / "gpt2_jax" / f"{leaf}.py").read_text(encoding="utf-8"))
    imported = [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
    imported += [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    allowed = {f"gpt2_jax.{name}" for name in LEAVES}
    foreign = [name for name in imported if name.split(".")[0] not in {"numpy", *sys.stdlib_module_names}]
    foreign = [name for name in foreign if (leaf, name) not in {("config", "tyro"), ("config", "gpt2_jax")}]
    assert [name for name in foreign if name not in allowed] == []
