"""What a run is made by, from git's files without git."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from gpt2_jax.training.origin import commit, origin


@pytest.fixture
def checkout(tmp_path):
    """A checkout with one commit; the commit."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    (tmp_path / "one" / "gpt2_jax").mkdir(parents=True)
    (tmp_path / "one" / "pyproject.toml").touch()

    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", *identity, "-C", str(tmp_path / "one"), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q", "-b", "main")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    return tmp_path, git


def test_the_commit_of_branches_packed_ones_work_trees_and_none(checkout):
    folder, git = checkout
    head, roots = git("rev-parse", "HEAD"), [str(folder / "elsewhere" / "gpt2_jax"), str(folder / "one" / "gpt2_jax")]
    assert commit(roots) == head
    git("pack-refs", "--all")
    assert commit(roots) == head
    git("checkout", "-q", "--detach")
    assert commit(roots) == head
    git("worktree", "add", "-q", "-b", "other", str(folder / "two"))
    assert commit([str(folder / "two" / "gpt2_jax")]) == head
    git("pack-refs", "--all")
    assert commit([str(folder / "two" / "gpt2_jax")]) == head
    (folder / "one" / ".git" / "HEAD").write_text("../../etc/passwd")
    assert commit(roots) == ""
    assert commit([str(folder / "none" / "gpt2_jax")]) == ""


def test_versions_and_machine_are_told():
    found = origin("cpu")
    assert {"python", "jax", "jaxlib", "numpy", "gpt2_jax"} <= found["versions"].keys()
    assert found["machine"]["device"] == "cpu"
