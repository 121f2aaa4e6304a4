"""Nothing that is printed ends the work: what cannot be shown is escaped, a stream that is gone is done without."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

import numpy as np
import pytest

from gpt2_jax.llmc.checkpoint_set import complete_steps
from gpt2_jax.llmc.token_shard import write_token_shard
from tests.conftest import REPOSITORY

TRAIN = [
    *(sys.executable, str(REPOSITORY / "scripts" / "train.py"), "--init", "d6", "--num-layers", "1", "--num-heads", "1"),
    *("--channels", "8", "--max-sequence-length", "16", "--batch-size", "2", "--sequence-length", "16"),
    *("--steps", "3", "--validate-every", "0", "--sample-every", "3", "--sample-tokens", "20", "--backend", "cpu"),
]
PROMPT = os.fsencode("Ä 日本 \N{GRINNING FACE} [/red] ") + b"\xff"  # the last byte becomes half a pair of UTF-16


def environment(**variables):
    return {**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "200", **variables}


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "x_train.bin"
    write_token_shard(path, np.arange(600) % 200)
    return path


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8:strict", "utf-8", "cp1252:strict"])
def test_a_run_whose_sample_cannot_be_shown_is_saved_and_logged(shard, tmp_path, encoding):
    ended = subprocess.run(
        [*TRAIN, "--train", str(shard), "--out-dir", str(tmp_path / "run"), "--prompt", PROMPT],
        env=environment(PYTHONIOENCODING=encoding),
        capture_output=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr.decode(errors="replace")
    assert b"Traceback" not in ended.stderr
    assert complete_steps(tmp_path / "run") == [3]
    shown = "Ä 日本 \N{GRINNING FACE} [/red] \udcff".encode(encoding.partition(":")[0], "backslashreplace")
    assert b"sample at step 3:\n---\n" + shown in ended.stdout.replace(b"\r", b"")
    lines = (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert any(json.loads(line).get("text", "").startswith("Ä 日本 \N{GRINNING FACE} [/red] \udcff") for line in lines)
    resumed = subprocess.run(
        [*TRAIN[:2], "--resume", "--out-dir", str(tmp_path / "run"), "--print-config"],
        env=environment(PYTHONIOENCODING=encoding),
        capture_output=True,
        timeout=300,
    )
    assert resumed.returncode == 0, resumed.stderr


def test_an_error_about_a_name_that_cannot_be_shown_is_an_error(tmp_path):
    ended = subprocess.run(
        [*TRAIN, "--train", b"\xff\xe4.bin"], env=environment(PYTHONIOENCODING="ascii"), capture_output=True, timeout=300
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith(rb"error: \udcff\udce4.bin: expected at least one token shard")


def test_a_run_outlasts_its_terminal(shard, tmp_path):
    """The other side of the terminal is closed, without a signal: every write fails from then on."""
    ours, its = pty.openpty()
    run = subprocess.Popen(
        [*TRAIN, "--train", str(shard), "--out-dir", str(tmp_path / "run"), "--steps", "400", "--sample-every", "0"],
        env=environment(),
        stdout=its,
        stderr=its,
        stdin=subprocess.DEVNULL,
    )
    os.close(its)
    seen = b""
    while b"compiled in" not in seen:
        seen += os.read(ours, 1000)
    os.close(ours)
    assert run.wait(timeout=300) == 0
    assert complete_steps(tmp_path / "run") == [400]


@pytest.mark.parametrize(
    ("redirection", "said"),
    [
        ("> /dev/full", "can no longer be written (No space left on device); the work goes on without it"),
        ("| true", "can no longer be written (Broken pipe); the work goes on without it"),
        (">&-", "standard output can no longer be written (Bad file descriptor); the work goes on without it"),
        (">&- 2>&-", ""),
        ("2>&-", ""),
        ("2> /dev/full", ""),
    ],
)
def test_a_run_goes_on_without_an_output_that_is_gone(shard, tmp_path, redirection, said):
    if "/dev/full" in redirection and not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    folder = tmp_path / "run"
    words = [*TRAIN, "--train", str(shard), "--out-dir", str(folder), "--steps", "30", "--sample-every", "0"]
    ended = subprocess.run(
        ["bash", "-c", f'set -o pipefail; "$@" {redirection}', "bash", *words],
        env=environment(),
        capture_output=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    assert complete_steps(folder) == [30]
    assert ended.stderr.decode().count(said) == 1 or not said
    assert b"Traceback" not in ended.stderr
    # What was printed is in no file of the run.
    assert all(b"compiling the training step" not in path.read_bytes() for path in folder.iterdir() if path.is_file())


@pytest.mark.parametrize("redirection", [">&-", "> /dev/full"])
def test_a_result_that_nobody_can_get_is_an_error(redirection):
    if "/dev/full" in redirection and not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    command = f"{sys.executable} {REPOSITORY}/scripts/doctor.py --help {redirection}"
    ended = subprocess.run(["bash", "-c", command], env=environment(), capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: standard output: expected to write it, found: ")


def test_a_short_command_in_a_pipe_ends_as_before():
    command = f"set -o pipefail; {sys.executable} {REPOSITORY}/scripts/doctor.py | true"
    ended = subprocess.run(["bash", "-c", command], env=environment(), capture_output=True, text=True, timeout=300)
    assert ended.returncode in (0, 1, 141)  # 141, unless all was written before the reader ended
    assert "Traceback" not in ended.stderr
