"""The documentation tells the truth: its commands and flags exist, its Python runs, its pages are in the site."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import gpt2_jax
from gpt2_jax.commands.main import COMMANDS
from tests.conftest import REPOSITORY
from tests.test_config import FLAGS
from tests.test_readme import FROZEN

DOCS = REPOSITORY / "docs"
PAGES = sorted([DOCS / "index.md", *DOCS.glob("tutorials/*.md"), *DOCS.glob("reference/*.md")])
NOTEBOOK = DOCS / "first_steps.ipynb"


def flags_of(command: str) -> set[str]:
    return FLAGS | {"--as-if"} if command == "train" else {"--" + name.replace("_", "-") for name in FROZEN[command]}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_command_and_flag_of_a_page_exists(path):
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = "\n".join(re.findall(r"```\n(.*?)```", text, re.DOTALL))
    commands = re.findall(r"gpt2-jax ([a-z][\w-]*)([^`\n]*)", blocks)
    for command, arguments in commands:
        assert command in COMMANDS
        bare = re.sub(r'"[^"]*"', "", arguments)  # llm.c's own flags are in quotes
        assert [flag for flag in re.findall(r"(?<=\s)--[a-z-]+", bare) if flag not in flags_of(command)] == [], command
    known = set().union(*(flags_of(command) for command in COMMANDS))
    assert [flag for flag in re.findall(r"`(--[a-z-]+)", text) if flag not in known] == []


def test_the_tutorials_have_commands():
    for path in DOCS.glob("tutorials/*.md"):
        assert re.search(r"gpt2-jax train|```python", path.read_text(encoding="utf-8")), path


def test_every_page_is_in_the_site():
    named = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    found = set(re.findall(r"[\w/-]+\.md", str(named)))
    assert found == {
        str(path.relative_to(DOCS)) for path in [*PAGES, DOCS / "apple.md", DOCS / "performance.md", DOCS / "scale.md"]
    } | {"records/README.md"}


def test_the_python_of_the_tutorial_runs(tmp_path: Path):
    (program,) = re.findall(r"```python\n(.*?)```", (DOCS / "tutorials/python.md").read_text(encoding="utf-8"), re.DOTALL)
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert "'lnfb': (64,)" in ended.stdout


def test_the_notebook_runs(tmp_path: Path):
    nbclient = pytest.importorskip("nbclient", reason="the package nbclient is not installed")
    nbformat = pytest.importorskip("nbformat", reason="the package nbformat is not installed")
    pytest.importorskip("ipykernel", reason="the package ipykernel is not installed")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "a notebook is kept without its outputs"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    said = "\n".join(output.text for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output)
    before, after = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", said).groups())
    assert before > 6
    assert after < 4.7
    assert "And God said" in said
    images = [output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    assert len(images) == 1


def test_make_help_has_every_target():
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^\.PHONY: (.*)", makefile, re.MULTILINE)[1].split()
    said = subprocess.run(["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60).stdout
    assert set(re.findall(r"^make ([\w-]+) ", said, re.MULTILINE)) == set(targets) - {"clean"}


def test_the_citation_and_the_changelog_are_of_this_version():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == gpt2_jax.__version__
    assert citation["title"] == "gpt2_jax"
    newest = re.search(r"^## (\S+?),? ", (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert newest == gpt2_jax.__version__


def test_the_hooks_before_a_commit_are_those_of_make_lint():
    (repo,) = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for hook in repo["hooks"]:
        command = " ".join(word for word in hook["entry"].split()[1:] if word != "--force-exclude")
        assert f"ruff {command} ." in makefile
