"""The GitHub workflows cannot run here; what they name must at least exist."""

from __future__ import annotations

import re
import tomllib

import pytest
import yaml

from gpt2_jax.compute.metal_plugins import METAL_PLUGINS
from gpt2_jax.ops.matmul import IMPLEMENTATIONS
from tests.conftest import REPOSITORY

WORKFLOWS = sorted((REPOSITORY / ".github/workflows").glob("*.yml"))
workflows = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def jobs(path):
    return yaml.safe_load(path.read_text())["jobs"].values()


def commands(path):
    return [step["run"] for job in jobs(path) for step in job["steps"] if "run" in step]


def test_there_are_workflows():
    assert {path.stem for path in WORKFLOWS} == {"apple", "ci", "wheels"}


@workflows
def test_every_script_and_make_target_exists(path):
    makefile = (REPOSITORY / "Makefile").read_text()
    scripts = [name for run in commands(path) for name in re.findall(r"(?:scripts|\.ci)/\w+\.py", run)]
    targets = [name for run in commands(path) for name in re.findall(r"\bmake ([\w-]+)", run)]
    assert scripts or targets
    assert [name for name in scripts if not (REPOSITORY / name).is_file()] == []
    assert [name for name in targets if not re.search(rf"^{name}:", makefile, re.MULTILINE)] == []


@workflows
def test_actions_are_pinned_by_major_version_and_jobs_end(path):
    for job in jobs(path):
        assert job["timeout-minutes"] <= 90
        for step in job["steps"]:
            assert re.fullmatch(r"actions/[\w-]+@v\d+", step.get("uses", "actions/none@v1"))


def test_every_apple_plugin_has_a_job_on_a_mac_and_a_python_that_it_takes():
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = (REPOSITORY / ".github/workflows/apple.yml").read_text()
    rows = yaml.safe_load(text)["jobs"]["plugin"]["strategy"]["matrix"]["include"]
    assert [row["plugin"] for row in rows] == [plugin.name for plugin in METAL_PLUGINS]
    for row, plugin in zip(rows, METAL_PLUGINS, strict=True):
        assert int(row["runner"].removeprefix("macos-")) >= plugin.oldest_macos[0]
        # A version that YAML reads as a number loses its last zero.
        assert row["python"] in ("3.12", "3.13")
        asked = row["packages"].removeprefix("-e .[").partition("]")[0].split(",")
        assert set(asked) <= set(extras)
        assert plugin.name in row["packages"] or any(plugin.name in package for extra in asked for package in extras[extra])
    named = re.findall(r"--matmul (\w+)", text)
    assert named
    assert set(named) <= set(IMPLEMENTATIONS)


def test_make_lint_reads_the_workflows():
    """zizmor, offline: unpinned actions, credentials left behind, text of others in a shell."""
    lint = (REPOSITORY / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    assert re.search(r"zizmor .*--offline.* \.github/workflows", lint)
    assert "make lint" in (REPOSITORY / ".ci" / "run").read_text()
