"""Runs of two and four real processes, which exchange numbers by gloo: their bits, files, stops and failures."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gpt2_jax import jax_compat
from gpt2_jax.config import load_saved_config
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.llmc.checkpoint_set import complete_steps
from gpt2_jax.llmc.token_shard import write_token_shard
from gpt2_jax.training.checkpoint import load_checkpoint
from gpt2_jax.training.run import train
from tests.conftest import CPU, REPOSITORY, change
from tests.processes.test_group import free_port

pytestmark = [
    pytest.mark.skipif(not jax_compat.serves_several_devices(), reason="this jax does not serve several devices"),
    pytest.mark.skipif(sys.platform != "linux", reason="gloo is known to work on Linux alone (jax issue 28160)"),
]

SMALL = GPT2Config(max_sequence_length=16, vocab_size=203, num_layers=1, num_heads=2, channels=16)
FLAGS = [
    *("--init", "d6", "--num-layers", "1", "--num-heads", "2", "--channels", "16", "--max-sequence-length", "16"),
    *("--vocab-size", "203", "--batch-size", "2", "--sequence-length", "16", "--total-batch-size", "128"),
    *("--learning-rate", "1e-2", "--weight-decay", "0.1", "--validate-every", "2", "--validation-batches", "1"),
    *("--sample-every", "0", "--matmul", "xla", "--backend", "cpu"),
]
# train.py, or where the environment says so a process that is killed in the middle of something.
PROGRAM = """
import os, signal, sys
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
dies = os.environ.get("TEST_DIES_AT")
if dies:
    from gpt2_jax.training import checkpoint, evaluation, loop
    real, calls = loop.arguments, []
    def at_fourth(*args, **kwargs):
        calls.append(1)
        return die() if len(calls) == 4 else real(*args, **kwargs)
    if dies == "step":
        loop.arguments = at_fourth
    if dies == "save":
        checkpoint.write_state_file = die
    if dies == "validation":
        evaluation.validation_loss = die
if "TEST_STUCK_SECONDS" in os.environ:
    from gpt2_jax.training import run as whole
    whole._STUCK_SECONDS, whole._STUCK_STEPS = float(os.environ["TEST_STUCK_SECONDS"]), 0
if "TEST_SHARED_SECONDS" in os.environ:
    from gpt2_jax.training import folder
    folder._SHARED_SECONDS = float(os.environ["TEST_SHARED_SECONDS"])
from gpt2_jax.commands.main import run
run("train")
"""


class Processes:
    """Several processes that train together; they do not outlive the test."""

    def __init__(self, number: int, *flags: object, of_one: dict[int, dict] | None = None):
        """`of_one`: what one of them has of its own: more flags, its folder, variables, and a limit of its files' sizes."""
        address, self.processes = f"localhost:{free_port()}", []
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "COLUMNS": "200", "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = str(REPOSITORY)
        for index in range(number):
            own = (of_one or {}).get(index, {})
            launch = ["--coordinator", address, "--processes", str(number), "--process-id", str(index)]
            words = [*launch, *FLAGS, *map(str, flags), *own.get("flags", [])]
            if (limit := own.get("file_bytes")) is not None:
                command = ["sh", "-c", f'ulimit -f {limit // 512}; exec "$@"', "sh", sys.executable, "-c", PROGRAM, *words]
            else:
                command = [sys.executable, "-c", PROGRAM, *words]
            self.processes.append(
                subprocess.Popen(
                    command,
                    cwd=own.get("cwd", REPOSITORY),
                    env=environment | own.get("environment", {}),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.communicate()

    def ended(self) -> list[tuple[int, str, str]]:
        """Status, output and errors of each."""
        texts = [process.communicate(timeout=300) for process in self.processes]
        return [(process.returncode, *text) for process, text in zip(self.processes, texts, strict=True)]


def run_together(number: int, *flags: object, **settings: object) -> list[tuple[int, str, str]]:
    with Processes(number, *flags, **settings) as processes:
        return processes.ended()


def succeed(number: int, *flags: object) -> str:
    """The output of process 0 of processes that all end well; the others say nothing."""
    first, *others = run_together(number, *flags)
    for status, output, errors in others:
        assert (status, output) == (0, ""), errors
        assert "Traceback" not in errors
    assert first[0] == 0, first[2]
    return first[1]


@pytest.fixture
def small(config):
    """A function that gives the settings of the same run in this process, on so many devices."""

    def make(devices: int, *, optimizer=None, evaluation=None, compute=None, **run):
        return change(
            config,
            model={name: getattr(SMALL, name) for name in GPT2Config.__dataclass_fields__},
            data={"batch_size": 2, "total_batch_size": 128},
            optimizer=optimizer or {},
            evaluation={"sample_every": 0, "validate_every": 2, "validation_batches": 1, **(evaluation or {})},
            compute={"devices": devices, "matmul": "xla", **(compute or {})},
            run=run,
        )

    return make


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same_bytes(folder: Path, other: Path, step: int) -> None:
    sets = [{path.name: path.read_bytes() for path in where.glob(f"*_{step:08d}*.bin")} for where in (folder, other)]
    assert len(sets[0]) > 1
    assert sets[0] == sets[1]


@pytest.mark.parametrize(
    ("flags", "compute", "masters"),
    [
        (["--zero", "0"], {"zero": 0}, True),
        (["--zero", "3"], {"zero": 3}, True),
        (["--dtype", "bfloat16"], {"dtype": "bfloat16"}, True),
        (["--dtype", "bfloat16", "--no-master-weights", "--matmul", "auto"], {"dtype": "bfloat16", "matmul": "auto"}, False),
    ],
    ids=["stage 0", "stage 3", "bfloat16", "rounded"],
)
def test_two_processes_have_the_bits_of_two_devices(small, tiny_shards, hellaswag, tmp_path, flags, compute, masters):
    """Files, log and scores; and process 0 alone says and writes what is written once."""
    settings = {"evaluation": {"hellaswag": hellaswag}, "optimizer": {"master_weights": masters}, "compute": compute}
    expected = train(small(2, steps=4, checkpoint_every=2, out_dir=str(tmp_path / "one"), **settings), "tiny", CPU)
    folder = tmp_path / "two"
    output = succeed(
        *(2, *flags, "--train", tiny_shards[0], "--validation", tiny_shards[1], "--hellaswag", hellaswag),
        *("--steps", 4, "--checkpoint-every", 2, "--out-dir", folder),
    )
    for step in (2, 4):
        same_bytes(folder, expected, step)
    assert names(folder) == names(expected)
    assert (folder / "main.log").read_text() == (expected / "main.log").read_text()
    assert "2 of 2 processes on the one axis 'data', ZeRO stage" in output
    # What says how it was started is no setting of the run.
    assert load_saved_config(folder).compute.coordinator == ""
    assert load_saved_config(folder).compute.processes == 0


def test_any_number_of_processes_goes_on_from_any_other(small, tiny_shards, tmp_path):
    """Of as many ranks in this process the bits are those of two processes, and of four those of float32's roundings."""
    folder = tmp_path / "run"
    shards = ["--train", tiny_shards[0], "--validation", tiny_shards[1]]
    train(small(1, steps=2), "tiny", CPU)
    for step, processes, devices in ((4, 2, 2), (6, 4, 4), (8, 2, 4)):
        other = tmp_path / f"at {step}"
        shutil.copytree(folder, other)
        each = devices // processes
        succeed(processes, *shards, "--resume", "--out-dir", folder, "--steps", step, "--devices", each)
        train(small(devices, steps=step, resume=True, out_dir=str(other)), "tiny", CPU)
        assert len(list(folder.glob(f"state_{step:08d}_*.bin"))) == devices
        if devices == 2:
            same_bytes(folder, other, step)
        found, expected = load_checkpoint(folder, step), load_checkpoint(other, step)
        for name in ("params", "m", "v"):
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-6)
    train(small(1, steps=10, resume=True), "tiny", CPU)
    assert complete_steps(folder) == [2, 4, 6, 8, 10]


def test_a_signal_to_one_process_stops_all_after_the_same_step(tiny_shards, tmp_path):
    """And process 0's clock says when to save."""
    folder = tmp_path / "run"
    flags = ["--train", tiny_shards[0], "--validation", tiny_shards[1], "--validate-every", 0, "--out-dir", folder]
    with Processes(2, *flags, "--steps", 1000000, "--checkpoint-minutes", 0.01) as processes:
        first = ""
        while "(time has passed)" not in first:
            line = processes.processes[0].stdout.readline()
            assert line, processes.processes[0].stderr.read()
            first += line
        processes.processes[1].send_signal(signal.SIGTERM)
        (status, output, errors), (other_status, *_) = processes.ended()
    assert (status, other_status) == (143, 143), errors
    step = complete_steps(folder)[-1]
    assert f"stopped by SIGTERM after step {step} of 1000000; the newest checkpoint is of step {step}" in output
    assert len(list(folder.glob(f"state_{step:08d}_*.bin"))) == 2
    assert not (folder / ".lock").exists()


def test_a_process_that_stands_still_ends_all(tiny_shards, tmp_path):
    folder = tmp_path / "run"
    flags = ["--train", tiny_shards[0], "--validation", tiny_shards[1], "--validate-every", 0, "--out-dir", folder]
    patient = {"environment": {"TEST_STUCK_SECONDS": "10"}}
    with Processes(2, *flags, "--steps", 1000000, of_one={0: patient, 1: patient}) as processes:
        while not (line := processes.processes[0].stdout.readline()).startswith("step "):
            assert line, processes.processes[0].stderr.read()
        processes.processes[1].send_signal(signal.SIGSTOP)
        _, errors = processes.processes[0].communicate(timeout=100)
        assert processes.processes[0].returncode == 1
    expected = r"error: processes: expected something done within 10 s, found that process 1 of 2 \(.+\) stands still"
    assert re.search(expected, errors)
    assert "Traceback" not in errors


@pytest.fixture
def begun(small, tmp_path):
    """The folder of a run of two steps, with a checkpoint, and a copy of its files."""
    folder = train(small(1, steps=2), "tiny", CPU)
    return folder, {path.name: path.read_bytes() for path in folder.glob("*_00000002*")}


def is_as_it_was(begun) -> None:
    folder, before = begun
    assert {path.name: path.read_bytes() for path in folder.glob("*_00000002*")} == before
    assert complete_steps(folder) == [2]
    left = [name for name in names(folder) if re.search(r"_0000000[^2]|\.tmp", name)]
    assert left == []


@pytest.mark.parametrize(("killed", "dies_at"), [(1, "step"), (0, "validation"), (1, "save")])
def test_a_process_that_is_killed_ends_all_and_leaves_the_last_checkpoint(begun, tiny_shards, killed, dies_at):
    folder = begun[0]
    flags = ["--train", tiny_shards[0], "--validation", tiny_shards[1], "--resume", "--out-dir", folder]
    if dies_at == "save":
        flags += ["--checkpoint-every", 1]
    if dies_at == "validation":
        flags += ["--validate-every", 1]
    started = time.monotonic()
    ends = run_together(2, *flags, "--steps", 1000, of_one={killed: {"environment": {"TEST_DIES_AT": dies_at}}})
    assert time.monotonic() - started < 100  # jax's own heartbeat
    status, _, errors = ends[1 - killed]
    assert ends[killed][0] == -signal.SIGKILL
    assert status == 1 if killed else status != 0, errors
    assert len(re.findall(rf"found that process {killed} of 2 \(.+\) has ended\n---> HINT: ", errors)) == 1, errors
    assert f"--resume --out-dir {folder}   (goes on from step 2)" in errors
    assert "Traceback" not in errors
    for path in folder.glob(".*.tmp"):  # of the one that was killed, whom the next run cleans up after
        assert f".{ends_id(path)}." in path.name
        path.unlink()
    is_as_it_was(begun)


def ends_id(path: Path) -> str:
    return path.name.split(".")[-2]


def test_a_full_disk_of_one_process_fails_the_checkpoint_of_all(begun, tiny_shards):
    """The set before it stays. What is full is a limit on the size of files, of which the state is the only large one."""
    folder = begun[0]
    state = 4 * 2 * SMALL.layout.num_parameters // 2
    flags = ["--train", tiny_shards[0], "--validation", tiny_shards[1], "--resume", "--out-dir", folder, "--steps", 5]
    own = {1: {"file_bytes": state // 2}}
    first, second = run_together(2, *flags, "--checkpoint-every", 3, of_one=own)
    assert (first[0], second[0]) == (2, 2), first[2]
    assert re.search(r"NO checkpoint of step 3: process 1 of 2 \(.+\): .*state_00000003_00001.bin.*File too large", first[1])
    assert re.search(r"error: process 1 of 2 \(.+\): .*state_00000005_00001.bin: expected to write it", first[2])
    assert second[2] == ""
    is_as_it_was(begun)


@pytest.fixture
def hosts(tmp_path, tiny_shards) -> list[dict]:
    """Two folders that stand for the file systems of two hosts, with the same shards in each."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        for path in tiny_shards:
            shutil.copy(path, folder)
    return [{"cwd": folder} for folder in folders]


def test_a_folder_that_the_hosts_do_not_share_is_noticed_at_the_start(hosts, monkeypatch, tmp_path):
    flags = ["--train", "tiny_train.bin", "--out-dir", "run", "--steps", 4]
    shared = {"environment": {"TEST_SHARED_SECONDS": "1"}}
    first, second = run_together(2, *flags, of_one={index: host | shared for index, host in enumerate(hosts)})
    assert (first[0], second[0]) == (2, 2), first[2] + second[2]
    assert "process 1 of 2" in first[2]
    assert "--out-dir: expected a folder that all hosts share, found that run is another one here" in first[2]
    assert "step " not in first[1].replace("training step", "").replace("a step", "").split("making the weights")[1]


def test_data_that_differ_are_named_before_training(hosts, tmp_path):
    write_token_shard(tmp_path / "b" / "tiny_train.bin", np.arange(2000) % 203)
    first, second = run_together(
        2, "--train", "tiny_train.bin", "--out-dir", "run", "--steps", 4, of_one=dict(enumerate(hosts))
    )
    assert (first[0], second[0]) == (2, 2), first[2]
    assert re.search(r"error: --train: expected the same on all processes, found tiny_train.bin 2000:\w+ on", first[2])
    assert not (tmp_path / "a" / "run").exists()


def test_settings_that_differ_are_named_before_training(tiny_shards, tmp_path):
    flags = ["--train", tiny_shards[0], "--out-dir", tmp_path / "run", "--steps", 4]
    first, second = run_together(2, *flags, of_one={1: {"flags": ["--batch-size", "4"]}})
    assert (first[0], second[0]) == (2, 2), first[2]
    assert "error: --batch-size: expected the same on all processes, found 2 on process 0" in first[2]
    assert not (tmp_path / "run").exists()
