"""The GitHub workflows cannot run here; what they name must at least exist."""

from __future__ import annotations

import re
import tomllib

import pytest
import yaml

from gpt2_jax.ops.matmul import IMPLEMENTATIONS
from tests.conftest import REPOSITORY

WORKFLOWS = sorted((REPOSITORY / ".github/workflows").glob("*.yml"))
workflows = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def jobs(path):
    return yaml.safe_load(path.read_text())["jobs"].values()


def commands(path):
    return [step["run"] for job in jobs(path) for step in job["steps"] if "run" in step]


def test_there_are_workflows():
    assert {path.stem for path in WORKFLOWS} == {"ci", "wheels"}


@workflows
def test_every_script_and_make_target_exists(path):
    makefile = (REPOSITORY / "Makefile").read_text()
    scripts = [name for run in commands(path) for name in re.findall(r"(?:scripts|\.ci)/\w+\.py", run)]
    targets = [name for run in commands(path) for name in re.findall(r"\bmake ([\w-]+)", run)]
    assert scripts
    assert [name for name in scripts if not (REPOSITORY / name).is_file()] == []
    assert [name for name in targets if not re.search(rf"^{name}:", makefile, re.MULTILINE)] == []


@workflows
def test_actions_are_pinned_by_major_version_and_jobs_end(path):
    for job in jobs(path):
        assert job["timeout-minutes"] <= 90
        for step in job["steps"]:
            assert re.fullmatch(r"actions/[\w-]+@v\d+", step.get("uses", "actions/none@v1"))


def test_extras_pythons_and_implementations_exist():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    ci = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text())
    mac = ci["jobs"]["macos"]["strategy"]["matrix"]["include"]
    assert {row["extra"] for row in mac} == {"metal", "mps"}
    assert {row["extra"] for row in mac} <= set(project["optional-dependencies"])
    # A version that YAML reads as a number loses its last zero.
    assert all(isinstance(row["python"], str) for row in mac)
    named = re.findall(r"--matmul (\w+)", (REPOSITORY / ".github/workflows/ci.yml").read_text())
    assert named
    assert set(named) <= set(IMPLEMENTATIONS)
