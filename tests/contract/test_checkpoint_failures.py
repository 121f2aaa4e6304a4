"""A save that fails, or whose process is killed, at any of its calls never spoils the sets that are there."""

from __future__ import annotations

import dataclasses
import errno
import os
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.files import remove_temporaries
from gpt2_jax.llmc.checkpoint_set import complete_steps, newest_step
from gpt2_jax.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from tests.contract.checkpoint_sets import (
    MODEL_BYTES,
    assert_newest_is,
    checkpoint_of,
    names,
    reshard_for_two,
    set_of,
)


class Killed(BaseException):
    """The process has ended: nothing that it would still do happens."""


class Machine:
    """What a process does to the disk, counted in `calls`, and stopped for good at one of its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, dies_at: int | None):
        self.calls, self.dies_at = 0, dies_at
        for function in ("fsync", "replace", "unlink", "utime"):
            monkeypatch.setattr(os, function, self.counted(getattr(os, function)))
        monkeypatch.setattr("builtins.open", self.opened(open))

    def counted(self, function: Callable) -> Callable:
        def call(*arguments: object, **options: object) -> object:
            self.step()
            return function(*arguments, **options)

        return call

    def opened(self, function: Callable) -> Callable:
        def open_file(path: object, mode: str = "r", **options: object) -> object:
            file = function(path, mode, **options)
            return file if "w" not in mode else FaultyFile(file, self)

        return open_file

    def step(self) -> None:
        self.calls += 1
        if self.dies_at is not None and self.calls >= self.dies_at:
            raise Killed


class FaultyFile:
    """A file whose every write is a call of the machine's; the write at which it dies gets half of its bytes out."""

    def __init__(self, file: BinaryIO, machine: Machine):
        self.file, self.machine = file, machine

    def __enter__(self) -> FaultyFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> int:
        try:
            self.machine.step()
        except Killed:
            self.file.write(memoryview(data)[: len(data) // 2])
            raise
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def fileno(self) -> int:
        return self.file.fileno()


Save = Callable[[Path], object]


def save_step_10(folder: Path) -> None:
    save_checkpoint(folder, checkpoint_of(10))


def other_checkpoint_of_10() -> Checkpoint:
    return dataclasses.replace(checkpoint_of(77), step=10)


def save_other_step_10(folder: Path) -> None:
    save_checkpoint(folder, other_checkpoint_of_10())


def with_step_5(folder: Path) -> Path:
    """A folder that holds the set of step 5."""
    folder.mkdir()
    save_checkpoint(folder, checkpoint_of(5))
    return folder


def with_steps_5_and_10(folder: Path) -> Path:
    """A folder that holds the sets of steps 5 and 10."""
    save_step_10(with_step_5(folder))
    return folder


def calls_of(save: Save, folder: Path) -> int:
    """What a save that succeeds does to the disk: writes, flushes to it, renames and removals."""
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(patch, None)
        save(folder)
        return machine.calls


@contextmanager
def disk_full_at(function: str, number: int | None) -> Iterator[list[str]]:
    """The given call of os.fsync or os.replace finds the disk full, those before and after it work; a list of all calls."""
    original = getattr(os, function)
    calls: list[str] = []

    def counting(*args: object) -> None:
        calls.append(function)
        if len(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, function, counting)
        yield calls


def number_of(function: str, save: Save, folder: Path) -> int:
    with disk_full_at(function, None) as calls:
        save(folder)
    return len(calls)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_first_save_that_fails_leaves_the_set_before_it_and_nothing_else(tmp_path, function):
    number = number_of(function, save_step_10, with_step_5(tmp_path / "counted"))
    assert number >= len(set_of(10))
    # The last of all is the sync of the folder after DONE got its name: see below.
    for call in range(1, number + (function == "replace")):
        folder = with_step_5(tmp_path / str(call))
        with disk_full_at(function, call), pytest.raises(Gpt2JaxError, match="No space left on device") as raised:
            save_step_10(folder)
        assert str(folder) in str(raised.value)
        assert names(folder) == set_of(5)
        assert_newest_is(folder, checkpoint_of(5))
        save_step_10(folder)
        assert_newest_is(folder, checkpoint_of(10))


def test_a_set_whose_very_last_sync_fails_is_complete_all_the_same(tmp_path):
    number = number_of("fsync", save_step_10, with_step_5(tmp_path / "counted"))
    folder = with_step_5(tmp_path / "run")
    with disk_full_at("fsync", number), pytest.raises(Gpt2JaxError, match="complete but may not outlive a crash"):
        save_step_10(folder)
    assert names(folder) == set_of(5) | set_of(10)
    assert_newest_is(folder, checkpoint_of(10))


def test_a_second_save_of_a_step_that_fails_before_the_swap_leaves_the_first_whole(tmp_path):
    """Before the swap: while its files are flushed, one after the other, and while the removal of DONE is."""
    for call in range(1, len(set_of(10)) + 2):
        folder = with_steps_5_and_10(tmp_path / str(call))
        with disk_full_at("fsync", call), pytest.raises(Gpt2JaxError, match="nothing was changed"):
            save_other_step_10(folder)
        assert names(folder) == set_of(5) | set_of(10)
        assert_newest_is(folder, checkpoint_of(10))


def test_a_second_save_of_a_step_that_fails_at_the_swap_leaves_the_first_whole(tmp_path):
    number = number_of("replace", save_other_step_10, with_steps_5_and_10(tmp_path / "counted"))
    assert number == 2 * len(set_of(10))  # each old file gives its name up first
    for call in range(1, number + 1):
        folder = with_steps_5_and_10(tmp_path / str(call))
        with disk_full_at("replace", call), pytest.raises(Gpt2JaxError, match="nothing was changed"):
            save_other_step_10(folder)
        assert names(folder) == set_of(5) | set_of(10)
        assert_newest_is(folder, checkpoint_of(10))


@pytest.mark.parametrize("allowed_bytes", [MODEL_BYTES - 1, MODEL_BYTES])
def test_save_on_a_disk_that_takes_no_more_leaves_the_set_before_it_and_nothing_else(tmp_path, allowed_bytes):
    """The model does not fit; the model fits, but not the state with its two buffers."""
    old = checkpoint_of(5)
    save_checkpoint(tmp_path, old)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (allowed_bytes, hard))
    try:
        with pytest.raises(Gpt2JaxError, match=os.strerror(errno.EFBIG)):
            save_checkpoint(tmp_path, checkpoint_of(10))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == set_of(5)
    assert_newest_is(tmp_path, old)


def test_missing_run_folder_is_an_error_of_ours(tmp_path):
    with pytest.raises(Gpt2JaxError, match=r"model_00000005\.bin: expected to write it, found: No such file"):
        save_checkpoint(tmp_path / "missing", checkpoint_of(5))


def test_all_files_are_complete_before_any_has_its_name_and_the_marker_gets_its_own_last(tmp_path, monkeypatch):
    seen = []
    replace = os.replace

    def recording(source: Path, target: Path) -> None:
        replace(source, target)
        seen.append(names(tmp_path))

    monkeypatch.setattr(os, "replace", recording)
    save_checkpoint(tmp_path, checkpoint_of(5))
    assert all(len(files) == len(set_of(5)) for files in seen)
    assert ["DONE_00000005" in files for files in seen] == [False] * (len(seen) - 1) + [True]
    assert seen[-1] == set_of(5)


def test_a_writer_killed_at_any_call_leaves_a_complete_checkpoint(tmp_path):
    """At every write, flush to disk, rename and removal. Only after the last rename is the new set there."""
    number = calls_of(save_step_10, with_step_5(tmp_path / "counted"))
    assert number > 3 * len(set_of(10))
    for call in range(1, number + 1):
        folder = with_step_5(tmp_path / str(call))
        with pytest.MonkeyPatch.context() as patch:
            Machine(patch, call)
            with pytest.raises(Killed):
                save_step_10(folder)
        # The last call syncs the folder, after DONE got its name.
        assert_newest_is(folder, checkpoint_of(10 if call == number else 5))
        save_step_10(folder)
        assert_newest_is(folder, checkpoint_of(10))


def test_a_writer_of_a_second_set_of_a_step_killed_at_any_call_leaves_a_whole_one(tmp_path):
    """The first set until DONE is set aside, then that of the step before, then the second set. Where it was that of the
    step before, the next process to lock the folder gives the first set its names back."""
    number = calls_of(save_other_step_10, with_steps_5_and_10(tmp_path / "counted"))
    found = []
    for call in range(1, number + 1):
        folder = with_steps_5_and_10(tmp_path / str(call))
        with pytest.MonkeyPatch.context() as patch:
            Machine(patch, call)
            with pytest.raises(Killed):
                save_other_step_10(folder)
        # llm.c takes a set for complete when its DONE is there.
        assert "DONE_00000010" not in names(folder) or set_of(10) <= names(folder)
        newest = load_checkpoint(folder, newest_step(folder))
        [which] = [
            name
            for name, saved in {
                "before": checkpoint_of(5),
                "first": checkpoint_of(10),
                "second": other_checkpoint_of_10(),
            }.items()
            if newest.step == saved.step and np.array_equal(newest.params, saved.params)
        ]
        assert_newest_is(folder, {"before": checkpoint_of(5), "first": checkpoint_of(10)}.get(which, other_checkpoint_of_10()))
        found.append(which)
        remove_temporaries(folder, socket.gethostname(), os.getpid())
        assert names(folder) == set_of(5) | set_of(10)
        assert_newest_is(folder, other_checkpoint_of_10() if which == "second" else checkpoint_of(10))
        assert not list(folder.glob(".*.old"))
    swap, kept = found.count("before"), len(set_of(10)) - 1
    # The second set is there from its marker on: the sync of the folder and the removal of the first one's files follow.
    assert found == ["first"] * (number - swap - kept - 2) + ["before"] * swap + ["second"] * (kept + 2)
    assert swap == 2 * kept + 1 + 2  # two renames a file, the marker's, and a sync of the folder before the first and the last


def test_a_disk_that_fails_for_good_at_the_swap_leaves_the_first_set_to_the_next_process(tmp_path, monkeypatch):
    """As a disk that becomes read-only: not even the old files' names can be given back."""
    number = number_of("replace", save_other_step_10, with_steps_5_and_10(tmp_path / "counted"))
    for call in range(1, number + 1):
        folder, replace, calls = with_steps_5_and_10(tmp_path / str(call)), os.replace, []

        def failing(*paths: Path, call=call, calls=calls, replace=replace) -> None:
            calls.append(paths)
            if len(calls) >= call:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            replace(*paths)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", failing)
            with pytest.raises(Gpt2JaxError, match="Read-only file system") as raised:
                save_other_step_10(folder)
        left = sorted(path.name for path in folder.glob(".*.old"))
        assert ("nothing was changed" in str(raised.value)) == (not left)
        assert all(name in str(raised.value) for name in left)
        assert len(left) == (0 if call == 1 else min(call - 1, len(set_of(10))))
        remove_temporaries(folder, socket.gethostname(), os.getpid())
        assert names(folder) == set_of(5) | set_of(10)
        assert_newest_is(folder, checkpoint_of(10))


def test_a_second_save_whose_very_last_sync_fails_leaves_no_old_files(tmp_path):
    number = number_of("fsync", save_other_step_10, with_steps_5_and_10(tmp_path / "counted"))
    folder = with_steps_5_and_10(tmp_path / "run")
    with disk_full_at("fsync", number), pytest.raises(Gpt2JaxError, match="complete but may not outlive a crash"):
        save_other_step_10(folder)
    assert_newest_is(folder, other_checkpoint_of_10())
    assert not list(folder.glob(".*.old"))


def test_resharding_killed_at_any_call_leaves_the_source_and_no_set(tmp_path):
    source = with_step_5(tmp_path / "source")
    number = calls_of(lambda folder: reshard_for_two(source, folder), tmp_path / "counted")
    assert number > 15
    for call in range(1, number + 1):
        target = tmp_path / str(call)
        with pytest.MonkeyPatch.context() as patch:
            Machine(patch, call)
            with pytest.raises(Killed):
                reshard_for_two(source, target)
        assert_newest_is(source, checkpoint_of(5))
        if call == number:  # the last call syncs the folder, after DONE got its name
            with pytest.raises(Gpt2JaxError, match="expected no set of step 5 in it, found one"):
                reshard_for_two(source, target)
        else:
            assert complete_steps(target) == []
            reshard_for_two(source, target)
        assert complete_steps(target) == [5]
        np.testing.assert_array_equal(load_checkpoint(target, 5).m, checkpoint_of(5).m)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_resharding_that_cannot_write_leaves_nothing(tmp_path, function):
    source = with_step_5(tmp_path / "source")
    number = number_of(function, lambda folder: reshard_for_two(source, folder), tmp_path / "counted")
    for call in range(1, number + (function == "replace")):
        with disk_full_at(function, call), pytest.raises(Gpt2JaxError, match="No space left on device"):
            reshard_for_two(source, tmp_path / str(call))
        assert names(tmp_path / str(call)) == set()
