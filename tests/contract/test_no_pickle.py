"""No file that is opened here runs what is in it: nothing reads pickles, but for one call that lets no program through."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SOURCES = [path for folder in ("gpt2_jax", "scripts") for path in sorted((REPOSITORY / folder).rglob("*.py"))]
PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
# Functions that unpickle, unless told otherwise, by the first word of their module.
LOADERS = {
    "numpy": {"load"},
    "torch": {"load", "_load", "_legacy_load"},
    "pandas": {"read_pickle"},
    "jax": {"load"},
}
SHORT_NAMES = {"np": "numpy", "jnp": "jax", "pd": "pandas"}
# The one call: in this file, in this form.
TORCH_FILE = REPOSITORY / "gpt2_jax" / "interop" / "torch_file.py"


def offences(source: str, *, reads_torch_files: bool = False) -> list[str]:
    """The imports and calls in a program that read pickles; `reads_torch_files`: but for torch.load(weights_only=True)."""
    tree = ast.parse(source)
    modules = SHORT_NAMES | {name: name for name in LOADERS} | dict(_aliases(tree))
    allowed = {node.func for node in ast.walk(tree) if reads_torch_files and _is_the_one_call(node)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.partition(".")[0] in PICKLERS]
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").partition(".")[0]
            loaders = [name.name for name in node.names if name.name in LOADERS.get(module, ())]
            found += [f"{node.module}.{name}" for name in loaders] or [node.module] * (module in PICKLERS)
        elif isinstance(node, ast.Attribute) and node not in allowed:
            module = modules.get(ast.unparse(node.value).partition(".")[0], "")
            if node.attr in LOADERS.get(module, ()):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            module, name = modules.get(ast.unparse(node.args[0]), ""), node.args[1]
            if module in LOADERS and (not isinstance(name, ast.Constant) or name.value in LOADERS[module]):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "pickle_module"):
            found.append(node.arg)
    return found


def _aliases(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """The names that imports give to the modules with loaders, or to parts of them."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for name in node.names:
                module = (name.name if isinstance(node, ast.Import) else node.module or "").partition(".")[0]
                if module in LOADERS:
                    yield (name.asname or name.name).partition(".")[0], module


def _is_the_one_call(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and ast.unparse(node.func) == "torch.load"
        and any(word.arg == "weights_only" and getattr(word.value, "value", None) is True for word in node.keywords)
        and not any(word.arg is None for word in node.keywords)  # **options could say otherwise
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_module_can_unpickle(path: Path):
    assert offences(path.read_text(encoding="utf-8"), reads_torch_files=path == TORCH_FILE) == []


def test_the_one_call_is_there():
    """Else its exception were one for nothing."""
    assert offences(TORCH_FILE.read_text(encoding="utf-8")) == ["torch.load"]


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import numpy as np\nnp.load('x')",
        "import numpy as n\nn.load('x')",
        "f(allow_pickle=True)",
        "torch.load('x')",
        "torch.load('x', weights_only=False)",
        "torch.load('x', weights_only=safe)",
        "torch.load('x', weights_only=True, **options)",
        "load = torch.load",
        "import torch as t\nt.load('x', weights_only=True)",
        "import torch.serialization as s\ns.load('x')",
        "from torch import load",
        "from torch import serialization\nserialization.load('x')",
        "torch.jit.load('x')",
        "torch.serialization._legacy_load(x)",
        "getattr(torch, 'load')('x')",
        "getattr(torch, name)('x')",
    ],
)
def test_what_unpickles_would_be_found(source):
    assert offences(source)
    assert offences(source, reads_torch_files=True)


def test_the_one_call_is_allowed_in_its_file_alone():
    source = "import torch\ntorch.load(path, map_location='cpu', weights_only=True)"
    assert offences(source)
    assert not offences(source, reads_torch_files=True)
