"""SIGTERM and Ctrl-C: a run that was asked to stop ends after its step with a checkpoint, and goes on as if never stopped."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpt2_jax.llmc.checkpoint_set import complete_steps
from gpt2_jax.report.log import RunLog
from gpt2_jax.training.interrupts import StopRequest, stop_requests
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


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGXCPU, 152)])
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
    flags += ["--num-layers", "12"]  # whose step takes seconds to compile
    with training(*flags, JAX_ENABLE_COMPILATION_CACHE="false") as process:
        read_until(process, "compiling the training step")
        process.send_signal(number)
        assert "finishing this step" in process.stderr.readline() + process.stderr.readline()
        time.sleep(0.6)  # of one request's time, in which a second signal would be taken for the same
        process.send_signal(number)
        output, _ = ended(process)
        assert process.returncode == status
    assert "compiled in" not in output
    assert "stopped by" not in output


STOPPABLE = """
import sys, time
from gpt2_jax.training.interrupts import StopRequest, stop_requests
with stop_requests() as request:
    print("ready", flush=True)
    end = time.monotonic() + float(sys.argv[1])
    while time.monotonic() < end:
        time.sleep(0.01)
    print(request.reason, flush=True)
    request.end_program(saved=True)
"""
HUP, TERM, INT, XCPU, USR1 = signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGXCPU, signal.SIGUSR1


@pytest.mark.parametrize(
    ("sent", "status", "reason"),
    [
        ([HUP, HUP], 129, "SIGHUP"),  # a terminal's kernel and its shell
        ([HUP, 0.7, HUP], 129, "SIGHUP"),
        ([TERM, TERM], 143, "SIGTERM"),  # `timeout`, to the process and its group
        ([TERM, HUP], 143, "SIGTERM"),  # systemd
        ([HUP, 0.7, TERM], 129, "SIGHUP"),
        ([XCPU, 0.7, XCPU], 152, "SIGXCPU"),  # the kernel, every second
        ([USR1, 0.7, TERM], 138, "SIGUSR1"),  # a batch system, first as a warning
        ([signal.SIGUSR2], 140, "SIGUSR2"),
        ([signal.SIGALRM], 142, "SIGALRM"),
        ([INT, 0.7, INT], 130, None),
        ([TERM, 0.7, TERM], 143, None),
        ([USR1, TERM, 0.7, TERM], 143, None),
    ],
)
def test_only_a_second_signal_that_a_person_sends_ends_at_once(sent, status, reason):
    seconds = 0.2 + sum(pause for pause in sent if isinstance(pause, float))
    with subprocess.Popen(
        [sys.executable, "-c", STOPPABLE, str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=REPOSITORY,
        text=True,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        for one in sent:
            if isinstance(one, float):
                time.sleep(one)
            else:
                process.send_signal(one)
                time.sleep(0.02)  # else two of the same are delivered as one
        output, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert output == ("" if reason is None else f"{reason}\n")
    first = sent[0].name
    repeated = "; once more ends at once" if first in ("SIGINT", "SIGTERM") else ""
    assert f"{first}: finishing this step and saving{repeated}\n" in errors


# A terminal whose shell runs a command; it is closed when this process's standard input ends. A process of its own, as
# one that runs JAX may not fork.
TERMINAL = """
import os, pty, sys
process, terminal = pty.fork()
if process == 0:
    os.execvp("sh", ["sh", "-c", sys.argv[1]])
sys.stdin.read()
os.close(terminal)
os.waitpid(process, 0)
"""


def test_a_terminal_that_is_closed_leaves_a_checkpoint(tiny_shards, tmp_path):
    """The run is a command of a script that a terminal's shell runs, and gets SIGHUP from the kernel."""
    folder, output = tmp_path / "run", tmp_path / "output"
    flags = [*FLAGS, "--steps", "1000000", "--train", tiny_shards[0], "--validation", tiny_shards[1], "--out-dir", folder]
    command = shlex.join(map(str, [sys.executable, REPOSITORY / "scripts" / "train.py", *flags]))
    script = f"{command} > {shlex.quote(str(output))} 2>&1; true"
    with subprocess.Popen(
        [sys.executable, "-c", TERMINAL, f"sh -c {shlex.quote(script)}; true"],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"},
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
    ):
        wait_until(lambda: output.exists() and re.search(r"^step +\d+/", output.read_text(), re.MULTILINE))
    wait_until(lambda: (folder / "loss.png").exists() and not (folder / ".lock").exists())
    (step,) = complete_steps(folder)
    assert f"stopped by SIGHUP after step {step} of 1000000; the newest checkpoint is of step {step}" in output.read_text()


def wait_until(happened: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_signal_during_a_validation_does_not_wait_for_its_end(tiny_shards, tmp_path):
    folder = tmp_path / "run"
    flags = [*FLAGS, "--train", tiny_shards[0], "--validation", tiny_shards[1], "--out-dir", folder, "--steps", "9"]
    with training(*flags, "--validate-every", "3", "--validation-batches", "100000000") as process:
        read_until(process, "validating on")
        process.send_signal(signal.SIGTERM)
        output, _ = ended(process)
        assert process.returncode == 143
    assert "given up, as the run is to stop: validate" in output
    assert "stopped by SIGTERM after step 0 of 9; there is no checkpoint yet" in output


def test_a_dry_run_has_nothing_to_save(tiny_shards, tmp_path):
    flags = [*FLAGS, "--train", tiny_shards[0], "--validation", tiny_shards[1], "--num-layers", "12", "--dry-run"]
    with training(*flags, JAX_ENABLE_COMPILATION_CACHE="false") as process:
        read_until(process, "compiling the training step")
        process.send_signal(signal.SIGTERM)
        output, errors = ended(process)
        assert process.returncode == -signal.SIGTERM
    assert "saving" not in errors
    assert "compiled in" not in output


def test_signal_before_the_first_step_ends_without_a_checkpoint(tiny_shards, tmp_path):
    flags = [*FLAGS, "--train", tiny_shards[0], "--validation", tiny_shards[1], "--out-dir", tmp_path / "run"]
    with training(*flags, JAX_ENABLE_COMPILATION_CACHE="false") as process:
        read_until(process, "compiling the training step")
        process.send_signal(signal.SIGTERM)
        output, _ = ended(process)
        assert process.returncode == 143
    assert f"stopped by SIGTERM after step 0 of {STEPS}; there is no checkpoint yet" in output
    assert "--resume" not in output
    assert f"{STEPS} steps at" not in output  # of a large model, timing a step takes minutes


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


def test_one_of_several_processes_stops_by_what_all_have_heard():
    request = StopRequest(waits=True)
    assert (request.wish, request.reason) == (0, None)
    request.signal = signal.SIGUSR1
    assert (request.wish, request.reason) == (signal.SIGUSR1, None)
    request.hear(signal.SIGTERM)
    request.hear(0)  # what was heard stays
    assert request.reason == "SIGTERM"
    with pytest.raises(SystemExit) as ended:
        request.end_program(saved=True)
    assert ended.value.code == 143
    timed = StopRequest(max_minutes=1e-9, waits=True)
    other = StopRequest(waits=True)
    other.hear(timed.wish)
    assert other.reason.startswith("--max-minutes")
    with pytest.raises(SystemExit) as ended:
        other.end_program(saved=True)
    assert ended.value.code == 0
