"""Nothing here reads or writes pickles: opening a file never runs what is in it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SOURCES = [path for folder in ("gpt2_jax", "scripts") for path in sorted((REPOSITORY / folder).rglob("*.py"))]
PICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
# They unpickle unless told otherwise.
LOADERS = {("np", "load"), ("numpy", "load"), ("torch", "load"), ("pd", "read_pickle")}


def offences(source: str) -> list[str]:
    """The imports and calls in a program that read pickles."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.partition(".")[0] in PICKLERS]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PICKLERS:
            found.append(node.module)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and (node.value.id, node.attr) in LOADERS:
            found.append(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append("allow_pickle")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_module_can_unpickle(path: Path):
    assert offences(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import numpy as np\nnp.load('x')",
        "f(allow_pickle=True)",
        "torch.load('x')",
    ],
)
def test_what_unpickles_would_be_found(source):
    assert offences(source)
