"""SIGTERM and Ctrl-C: a run that was asked to stop ends after its step with a checkpoint, and goes on as if never stopped."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpt2_jax.llmc.checkpoint_set import complete_steps
from gpt2_jax.report.log import RunLog
from gpt2_jax.training.interrupts import stop_requests
from gpt2_jax.training.run_record import read_run_record
from tests.conftest import REPOSITORY

STEPS = 600
FLAGS = [
    *("--init", "d6", "--num-layers", "1", "--num-heads", "2", "--channels", "16", "--max-sequence-length", "16"),
    *("--vocab-size", "203", "--batch-size", "2", "--sequence-length", "16", "--total-batch-size", "64"),
    *("--learning-rate", "1e-2", "--schedule", "cosine", "--final-learning-rate-fraction", "0.1", "--weight-decay", "0.1"),
    *("--skip-loss-z", "1.5", "--skip-gradient-z", "1.5", "--validate-every", "0", "--sample-every", "0"),
    *("--steps", str(STEPS)),
]


@contextmanager
def training(*arguments: object, **environment: str) -> Iterator[subprocess.Popen]:
    """A run of train.py in a process of its own, which does not outlive the test."""
    command = [sys.executable, str(REPOSITORY / "scripts" / "train.py"), *map(str, arguments)]
    with subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "200", "PYTHONUNBUFFERED": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: subprocess.Popen, pattern: str) -> str:
    """The output up to a line that the pattern matches."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.match(pattern, line):
            return "".join(lines)
    pytest.fail(f"no line {pattern!r} in {''.join(lines)}\n{process.stderr.read()}")


def ended(process: subprocess.Popen) -> tuple[str, str]:
    output, errors = process.communicate(timeout=300)
    assert "Traceback" not in errors, errors
    return output, errors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_interrupted_and_resumed_run_ends_with_the_files_of_a_straight_one(tiny_shards, tmp_path, dtype):
    """With shuffling, accumulation, a falling learning rate, the outlier skip and samples."""
    flags = [*FLAGS, "--dtype", dtype, "--train", tiny_shards[0], "--validation", tiny_shards[1]]
    flags += ["--sample-every", "200", "--sample-tokens", "8"]
    with training(*flags, "--out-dir", tmp_path / "straight") as process:
        ended(process)
        assert process.returncode == 0

    folder = tmp_path / "a run"
    with training(*flags, "--out-dir", folder) as process:
        read_until(process, r"step +17/")
        process.send_signal(signal.SIGTERM)
        output, errors = ended(process)
        assert process.returncode == 143
    assert "SIGTERM: finishing this step and saving; once more ends at once" in errors
    (step,) = complete_steps(folder)
    assert 17 <= step < STEPS
    assert f"stopped by SIGTERM after step {step} of {STEPS}; the newest checkpoint is of step {step}" in output
    command = shlex.split(output.splitlines()[-1])
    assert command[:2] == ["python", str(REPOSITORY / "scripts" / "train.py")]

    with training(*command[2:]) as process:
        ended(process)
        assert process.returncode == 0
    for name in (f"model_{STEPS:08d}.bin", f"state_{STEPS:08d}_00000.bin"):
        assert (folder / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    logs = [RunLog(path / "log.jsonl") for path in (folder, tmp_path / "straight")]
    assert logs[0].main_path.read_bytes() == logs[1].main_path.read_bytes()
    samples = [[(row["step"], row["text"]) for row in log.records("sample")] for log in logs]
    assert samples[0] == samples[1]
    assert [step for step, _ in samples[0]] == [0, 200, 400, 600]
    # The skip did refuse updates, so its windows mattered.
    assert '"applied": false' in (folder / "log.jsonl").read_text()
    records = [read_run_record(path / f"run_{STEPS:08d}.json") for path in (folder, tmp_path / "straight")]
    assert records[0].windows["loss"].tobytes() == records[1].windows["loss"].tobytes()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_the_first_signal_saves_and_ends_with_its_status(tiny_shards, tmp_path, number, status):
    folder = tmp_path / "run"
    with training(*FLAGS, "--train", tiny_shards[0], "--validation", tiny_shards[1], "--out-dir", folder) as process:
        read_until(process, r"step +1/")
        process.send_signal(number)
        output, _ = ended(process)
        assert process.returncode == status
    assert f"to go on:\npython {REPOSITORY / 'scripts' / 'train.py'} --resume --out-dir {folder}\n" in output
    assert len(complete_steps(folder)) == 1
    assert (folder / "loss.png").exists()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_was_ignored_at_the_start_stays_so(tiny_shards, tmp_path, number):
    """As nohup starts a program, and a shell what it runs in the background."""
    folder = tmp_path / "run"
    flags = [*FLAGS, "--train", tiny_shards[0], "--validation", tiny_shards[1], "--out-dir", folder]
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with training(*flags, "--steps", "40") as process:
            read_until(process, r"step +1/")
            process.send_signal(number)
            _, errors = ended(process)
            assert process.returncode == 0
    finally:
        signal.signal(number, before)
    assert complete_steps(folder) == [40]
    assert "finishing this step" not in errors


def test_the_time_that_a_run_was_given_stops_it_with_a_checkpoint_and_status_0(tiny_shards, tmp_path):
    folder = tmp_path / "run"
    flags = [*FLAGS, "--train", tiny_shards[0], "--validation", tiny_shards[1], "--out-dir", folder]
    with training(*flags, "--steps", "100000", "--max-minutes", "0.1") as process:
        output, _ = ended(process)
        assert process.returncode == 0
    (step,) = complete_steps(folder)
    assert 0 < step < 100000
    assert f"stopped by --max-minutes 0.1 after step {step} of 100000; the newest checkpoint is of step {step}" in output
    assert f"to go on:\npython {REPOSITORY / 'scripts' / 'train.py'} --resume --out-dir {folder}\n" in output


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_second_signal_ends_at_once_even_while_compiling(tiny_shards, tmp_path, number, status):
    """The main thread is inside the compiler, where no handler of Python's runs."""
    flags = [*FLAGS, "--train", tiny_shards[0], "--validation", tiny_shards[1], "--out-dir", tmp_path / "run"]
    with training(*flags, JAX_ENABLE_COMPILATION_CACHE="false") as process:
        read_until(process, "compiling the training step")
        process.send_signal(number)
        assert "finishing this step" in process.stderr.readline() + process.stderr.readline()
        process.send_signal(number)
        output, _ = ended(process)
        assert process.returncode == status
    assert "compiled in" not in output
    assert "stopped by" not in output


def test_signal_before_the_first_step_ends_without_a_checkpoint(tiny_shards, tmp_path):
    flags = [*FLAGS, "--train", tiny_shards[0], "--validation", tiny_shards[1], "--out-dir", tmp_path / "run"]
    with training(*flags, JAX_ENABLE_COMPILATION_CACHE="false") as process:
        read_until(process, "compiling the training step")
        process.send_signal(signal.SIGTERM)
        output, _ = ended(process)
        assert process.returncode == 143
    assert f"stopped by SIGTERM after step 0 of {STEPS}; there is no checkpoint yet" in output
    assert "--resume" not in output


def test_handlers_are_those_from_before_once_training_is_over():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with stop_requests() as request:
        assert request.signal is None
        assert {number: signal.getsignal(number) for number in before} != before
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_run_that_is_stopped_in_its_last_step_is_complete(tiny_shards, tmp_path):
    folder = Path(tmp_path / "run")
    flags = [*FLAGS, "--train", tiny_shards[0], "--validation", tiny_shards[1], "--out-dir", folder]
    with training(*flags) as process:
        read_until(process, rf"step +{STEPS}/")
        process.send_signal(signal.SIGTERM)
        ended(process)
    assert complete_steps(folder)[-1] == STEPS
