"""The lock of a run folder: one process at a time, and none is kept out by a process that is gone."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.training import run_lock
from gpt2_jax.training.run_lock import locked
from tests.conftest import REPOSITORY

HOST = socket.gethostname()


@contextmanager
def process_that_holds(folder: Path) -> Iterator[subprocess.Popen]:
    program = (
        "import sys\nfrom gpt2_jax.training.run_lock import locked\n"
        "with locked(sys.argv[1]):\n    print('ready', flush=True)\n    sys.stdin.readline()\n"
    )
    command = [sys.executable, "-c", program, str(folder)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(params=["flock", "no module fcntl", "a file system without locks"])
def kind(request, monkeypatch) -> str:
    """With the kernel's locks and without: as on Windows, and as on some shared file systems."""
    if request.param == "no module fcntl":
        monkeypatch.setattr(run_lock, "fcntl", None)
    if request.param == "a file system without locks":

        def refuse(descriptor: int, operation: int) -> None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

        monkeypatch.setattr(run_lock.fcntl, "flock", refuse)
    return request.param


def take(folder: Path) -> list[str]:
    """What is said when the lock is taken; it is given back at once."""
    said: list[str] = []
    with locked(folder, said.append):
        assert (folder / ".lock").read_text() == f"{HOST} {os.getpid()}\n"
    assert list(folder.iterdir()) == []
    return said


def test_the_lock_is_taken_and_given_back_also_after_an_error(tmp_path, kind):
    assert take(tmp_path) == []
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    assert take(tmp_path) == []


def test_a_folder_in_which_a_process_trains_is_refused_by_host_and_process(tmp_path, kind):
    with process_that_holds(tmp_path) as process:
        with pytest.raises(Gpt2JaxError) as raised:
            take(tmp_path)
        assert str(raised.value) == (
            f"{tmp_path}: expected a run folder that no other process trains in, found process {process.pid} on {HOST} in it\n"
            f"---> HINT: kill {process.pid}   (on {HOST}: it stops after its step), or another --out-dir"
        )
        assert (tmp_path / ".lock").read_text() == f"{HOST} {process.pid}\n"
        process.stdin.write("\n")
        process.stdin.flush()
        process.wait()
    assert take(tmp_path) == []


def test_the_lock_of_a_process_that_was_killed_is_taken_over_with_a_line(tmp_path, kind):
    with process_that_holds(tmp_path) as process:
        process.kill()
        process.wait()
        assert take(tmp_path) == [
            f"{tmp_path / '.lock'} was left by process {process.pid} on {HOST}, which is gone: taken over"
        ]
    assert take(tmp_path) == []


def test_half_written_files_of_the_process_that_is_gone_are_removed_and_no_others(tmp_path):
    program = (
        "import os, signal, sys\nfrom gpt2_jax.files import write_together\nfrom gpt2_jax.training.run_lock import locked\n"
        "with locked(sys.argv[1]), write_together() as write:\n"
        "    for name in ('model.bin', 'state.bin'):\n"
        "        with write(os.path.join(sys.argv[1], name)) as file:\n            file.write(b'x' * 1000)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=REPOSITORY, check=False)
    assert len([path for path in tmp_path.iterdir() if path.stat().st_size == 1000]) == 2
    others = {".model.bin.another-host.77.tmp", ".model.bin.tmp", "model.bin"}
    for name in others:
        (tmp_path / name).write_bytes(b"")
    with locked(tmp_path):
        pass
    assert {path.name for path in tmp_path.iterdir()} == others


def test_of_another_hosts_process_only_the_kernel_knows_whether_it_is_gone(tmp_path, kind):
    path = tmp_path / ".lock"
    path.write_text("another-host 77\n")
    if kind == "flock":
        assert take(tmp_path) == [f"{path} was left by process 77 on another-host, which is gone: taken over"]
    else:
        with pytest.raises(Gpt2JaxError, match=rf"found process 77 on another-host in it\n---> HINT: rm {path}   \(if that"):
            take(tmp_path)
        assert path.read_text() == "another-host 77\n"


def test_a_lock_of_this_very_name_and_process_may_be_of_a_container_before_this_one(tmp_path, kind):
    path = tmp_path / ".lock"
    path.write_text(f"{HOST} {os.getpid()}\n")
    if kind == "flock":
        assert len(take(tmp_path)) == 1
    else:
        with pytest.raises(Gpt2JaxError, match=rf"found process {os.getpid()} on .*\n---> HINT: rm {path}   \(if that"):
            take(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no lock\n", b"\xff 12\n\n", b"host 99999999999\n"])
def test_what_is_no_lock_stands_in_the_way_only_where_the_kernel_has_none(tmp_path, kind, content):
    (tmp_path / ".lock").write_bytes(content)
    if kind == "flock":
        assert take(tmp_path) == []
    else:
        with pytest.raises(Gpt2JaxError, match="found another process in it\n---> HINT: rm "):
            take(tmp_path)


def test_one_process_cannot_take_it_twice(tmp_path, kind):
    with locked(tmp_path):
        with pytest.raises(Gpt2JaxError, match=f"found process {os.getpid()} on {HOST} in it"):
            take(tmp_path)
        assert (tmp_path / ".lock").exists()


def test_a_file_that_is_removed_while_it_is_waited_for_is_made_anew(tmp_path, monkeypatch):
    """Another process gives the lock back between our opening of the file and our lock on it."""
    path = tmp_path / ".lock"
    path.write_text("")
    flock, calls = run_lock.fcntl.flock, []

    def removing(descriptor: int, operation: int) -> None:
        if not calls:
            path.unlink()
        calls.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(run_lock.fcntl, "flock", removing)
    assert take(tmp_path) == []
    assert len(calls) == 2


@pytest.mark.parametrize("folder", ["missing", "file"])
def test_a_folder_that_is_none_is_an_error_of_ours(tmp_path, folder):
    (tmp_path / "file").touch()
    with pytest.raises(Gpt2JaxError, match=r"\.lock: expected to lock the run folder, found: "):
        take(tmp_path / folder)
