"""The extras for the Apple GPU resolve for macOS on arm64, to the pairs that work together. Asks the package index."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import REPOSITORY

pytest.importorskip("uv")

# Extras, Python -> the pins that must come of them; of each extra the oldest and the newest Python that it serves.
PAIRS = {
    ("metal", "3.11"): ["jax-metal==0.1.1", "jax==0.5.0", "jaxlib==0.5.0"],
    ("metal", "3.13"): ["jax-metal==0.1.1", "jax==0.5.0", "jaxlib==0.5.0"],
    ("mps", "3.12"): ["jax-mps==0.11.", "jax==0.11.", "jaxlib==0.11."],
    ("mps", "3.14"): ["jax-mps==0.11.", "jax==0.11.", "jaxlib==0.11."],
}
# Extras, Python -> the words that the refusal must have.
REFUSALS = {
    ("mps", "3.11"): "Python>=3.12",
    ("metal", "3.14"): "cp314",
    ("metal,mps", "3.12"): "jax-mps>=0.11.0 depends on jax",
}


def resolve(requirements, python):
    """uv's answer for a Mac with Apple silicon and macOS 14; only what has a wheel for it counts."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--color=never"]
    command += ["--only-binary=:all:", "--python-platform=aarch64-apple-darwin", f"--python-version={python}", *requirements]
    # uv resolves for macOS 13 otherwise, which jax-mps has no wheel for.
    environment = {**os.environ, "MACOSX_DEPLOYMENT_TARGET": "14.0"}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """uv's answer to every case; skips where no package index can be asked, which a broken pin is not."""
    probe = tmp_path_factory.mktemp("probe") / "requirements.in"
    probe.write_text("jax-metal==0.1.1\n", encoding="utf-8")
    ended = resolve([str(probe)], "3.12")
    if ended.returncode:
        pytest.skip(f"no package index can be asked: {ended.stderr.strip().splitlines()[-1]}")
    cases = [*PAIRS, *REFUSALS]
    requirements = [["pyproject.toml", *(f"--extra={extra}" for extra in extras.split(","))] for extras, _ in cases]
    # All at once: nearly all of the time is the index's.
    with ThreadPoolExecutor(len(cases)) as pool:
        return dict(zip(cases, pool.map(resolve, requirements, [python for _, python in cases]), strict=True))


@pytest.mark.parametrize(("case", "pins"), PAIRS.items(), ids=map(" on ".join, PAIRS))
def test_an_extra_resolves_to_the_pair_that_works(answers, case, pins):
    assert answers[case].returncode == 0, answers[case].stderr
    lines = answers[case].stdout.splitlines()
    for pin in pins:
        assert any(line.startswith(pin) for line in lines), (pin, answers[case].stdout)


@pytest.mark.parametrize(("case", "words"), REFUSALS.items(), ids=map(" on ".join, REFUSALS))
def test_what_cannot_be_installed_is_refused_with_the_reason(answers, case, words):
    assert answers[case].returncode != 0
    assert words in answers[case].stderr
