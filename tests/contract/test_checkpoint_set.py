"""A run folder's checkpoint sets: what was saved is loaded, and a save that fails never spoils the set before it."""

from __future__ import annotations

import dataclasses
import errno
import os
import resource
import struct
import tempfile
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.llmc.loader import LoaderState, TokenLoader
from gpt2_jax.llmc.model_file import read_model_file, write_model_file
from gpt2_jax.llmc.rounding import RoundingStream, rounded_to_nearest, stochastically_rounded
from gpt2_jax.llmc.state_file import ProcessState, TrainingState, write_state_files
from gpt2_jax.training.checkpoint import (
    Checkpoint,
    complete_steps,
    delete_old_checkpoints,
    load_checkpoint,
    newest_step,
    reshard_checkpoint,
    save_checkpoint,
)
from gpt2_jax.training.run_record import Averages, RunRecord
from tests.conftest import TINY

MODEL_BYTES = 1024 + 4 * TINY.layout.num_parameters


def open_loader(path: str, *, shuffle: bool = True) -> TokenLoader:
    return TokenLoader(path, 2, 16, vocab_size=TINY.vocab_size, shuffle=shuffle)


def checkpoint_of(step: int, loader: LoaderState | None = None) -> Checkpoint:
    """Other arrays for every step."""
    layout = TINY.layout
    params, m, v = np.random.default_rng(step).normal(size=(3, layout.num_parameters)).astype(np.float32)
    params[slice(*layout["wte"].padding_span)] = 0
    windows = {name: np.full(128, np.nan, np.float32) for name in ("loss", "gradient_norm")}
    windows["loss"][-3:] = params[:3]
    record = RunRecord(2, 16, "float32", "a test", windows, Averages(step, 0.25 * step, 100.0), {"run": {"steps": 40}})
    return Checkpoint(TINY, params, m, v, step, loader or LoaderState(0, 3), record=record)


def assert_newest_is(folder: Path, saved: Checkpoint) -> None:
    assert newest_step(folder) == saved.step
    loaded = load_checkpoint(folder, saved.step)
    assert (loaded.model, loaded.step) == (saved.model, saved.step)
    for name in ("params", "m", "v"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(saved, name), err_msg=name)
    assert loaded.loader == saved.loader
    assert loaded.rounding == saved.rounding
    for name, window in saved.record.windows.items():
        np.testing.assert_array_equal(loaded.record.windows[name], window, err_msg=name)
    assert loaded.record.averages == saved.record.averages


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def set_of(step: int) -> set[str]:
    return {f"model_{step:08d}.bin", f"state_{step:08d}_00000.bin", f"run_{step:08d}.json", f"DONE_{step:08d}"}


def test_set_has_llmcs_three_names_and_our_record_and_is_loaded_as_it_was_saved(tmp_path):
    saved = checkpoint_of(5)
    assert save_checkpoint(tmp_path, saved) == tmp_path / "model_00000005.bin"
    assert names(tmp_path) == set_of(5)
    assert (tmp_path / "DONE_00000005").read_bytes() == b""
    assert_newest_is(tmp_path, saved)


@pytest.mark.parametrize("shuffle", [False, True])
def test_data_continue_where_the_saved_run_stood(tmp_path, tiny_shards, shuffle):
    loader = open_loader(tiny_shards[0], shuffle=shuffle)
    for _ in range(loader.num_batches + 7):
        loader.next_batch()
    save_checkpoint(tmp_path, checkpoint_of(9, loader.state()))
    resumed = open_loader(tiny_shards[0], shuffle=shuffle)
    resumed.restore(load_checkpoint(tmp_path, 9).loader)
    for _ in range(2 * loader.num_batches):
        np.testing.assert_array_equal(resumed.next_batch(), loader.next_batch())


def test_newest_of_several_sets_is_found_by_its_number(tmp_path):
    for step in (9, 100, 20):
        save_checkpoint(tmp_path, checkpoint_of(step))
    assert newest_step(tmp_path) == 100


def test_set_without_its_record_is_complete(tmp_path):
    save_checkpoint(tmp_path, checkpoint_of(5))
    (tmp_path / "run_00000005.json").unlink()
    assert newest_step(tmp_path) == 5
    assert load_checkpoint(tmp_path, 5).record is None


@pytest.mark.parametrize("missing", sorted(set_of(10) - {"run_00000010.json"}))
def test_set_that_lacks_one_of_its_files_is_passed_over(tmp_path, missing):
    old = checkpoint_of(5)
    save_checkpoint(tmp_path, old)
    save_checkpoint(tmp_path, checkpoint_of(10))
    (tmp_path / missing).unlink()
    assert_newest_is(tmp_path, old)


@pytest.mark.parametrize("name", ["DONE_00000010.tmp", ".DONE_00000010.77.tmp", "DONE_10", "DONE_000000010", "DONE_0000001x"])
def test_other_names_are_no_markers(tmp_path, name):
    old = checkpoint_of(5)
    save_checkpoint(tmp_path, old)
    save_checkpoint(tmp_path, checkpoint_of(10))
    (tmp_path / "DONE_00000010").rename(tmp_path / name)
    assert_newest_is(tmp_path, old)


@pytest.mark.parametrize("folder", ["empty", "missing", "plain_file", "only_incomplete"])
def test_folder_without_a_complete_set_is_refused(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "plain_file").write_bytes(b"")
    save_incomplete(tmp_path / "only_incomplete")
    with pytest.raises(Gpt2JaxError) as raised:
        newest_step(tmp_path / folder)
    assert str(raised.value).startswith(f"{tmp_path / folder}: expected a run folder with a complete checkpoint")
    assert "found none\n---> HINT: start the run anew, without --resume" in str(raised.value)


def test_folder_whose_name_is_too_long_is_refused(tmp_path):
    with pytest.raises(Gpt2JaxError, match="expected a run folder with a complete checkpoint"):
        newest_step(tmp_path / ("x" * 300))


def save_incomplete(folder: Path) -> None:
    folder.mkdir()
    save_checkpoint(folder, checkpoint_of(3))
    (folder / "DONE_00000003").unlink()


def fail_at_call(monkeypatch: pytest.MonkeyPatch, function: str, number: int) -> None:
    """The given call of os.fsync or os.replace finds the disk full; the calls before and after it work."""
    original = getattr(os, function)
    calls = 0

    def counting(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(*args)

    monkeypatch.setattr(os, function, counting)


# fsync is called for the model, its folder, the state, its folder, the record, its folder, DONE, its folder; replace for
# each of the four.
@pytest.mark.parametrize(
    ("function", "number"),
    [
        ("fsync", 1),
        ("fsync", 2),
        ("fsync", 3),
        ("fsync", 4),
        ("fsync", 5),
        ("fsync", 6),
        ("fsync", 7),
        ("replace", 1),
        ("replace", 2),
        ("replace", 3),
        ("replace", 4),
    ],
)
def test_save_that_fails_at_any_write_leaves_the_set_before_it(tmp_path, monkeypatch, function, number):
    old, new = checkpoint_of(5), checkpoint_of(10)
    save_checkpoint(tmp_path, old)
    with monkeypatch.context() as patch:
        fail_at_call(patch, function, number)
        with pytest.raises(Gpt2JaxError, match="No space left on device") as raised:
            save_checkpoint(tmp_path, new)
    assert str(tmp_path) in str(raised.value)
    assert names(tmp_path) == set_of(5)
    assert_newest_is(tmp_path, old)

    save_checkpoint(tmp_path, new)
    assert_newest_is(tmp_path, new)


def test_set_whose_very_last_sync_fails_is_complete_all_the_same(tmp_path, monkeypatch):
    new = checkpoint_of(10)
    fail_at_call(monkeypatch, "fsync", 8)
    with pytest.raises(Gpt2JaxError, match="No space left on device"):
        save_checkpoint(tmp_path, new)
    assert_newest_is(tmp_path, new)


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


def test_marker_is_written_after_model_and_state(tmp_path, monkeypatch):
    seen = []
    replace = os.replace

    def recording(source: str, target: str) -> None:
        replace(source, target)
        seen.append(names(tmp_path))

    monkeypatch.setattr(os, "replace", recording)
    save_checkpoint(tmp_path, checkpoint_of(5))
    assert [any(name.startswith("DONE") for name in files) for files in seen] == [False, False, False, True]
    assert seen[-1] == set_of(5)


def test_state_with_another_step_than_its_name_is_refused(tmp_path):
    save_checkpoint(tmp_path, checkpoint_of(5))
    (tmp_path / "run_00000005.json").unlink()
    for name in set_of(5) - {"run_00000005.json"}:
        (tmp_path / name).rename(tmp_path / name.replace("00000005", "00000007"))
    with pytest.raises(Gpt2JaxError) as raised:
        load_checkpoint(tmp_path, 7)
    expected = f"{tmp_path / 'state_00000007_00000.bin'}: expected the state of step 7, found step 5 in its header"
    assert expected in str(raised.value)


def test_state_of_another_model_is_refused(tmp_path):
    save_checkpoint(tmp_path, checkpoint_of(5))
    other = GPT2Config(max_sequence_length=8, vocab_size=203, num_layers=2, num_heads=4, channels=32)
    params = np.zeros(other.layout.num_parameters, np.float32)
    write_model_file(tmp_path / "model_00000005.bin", other, params)
    with pytest.raises(Gpt2JaxError, match=r"state_00000005_00000\.bin: expected a training state file of .* \(grown\)"):
        load_checkpoint(tmp_path, 5)


@pytest.mark.parametrize("name", ["model_00000005.bin", "state_00000005_00000.bin", "run_00000005.json"])
def test_truncated_file_of_a_complete_set_is_refused_by_name(tmp_path, name):
    save_checkpoint(tmp_path, checkpoint_of(5))
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Gpt2JaxError, match=rf"{name}: expected .*, found"):
        load_checkpoint(tmp_path, 5)


class Killed(BaseException):
    """The process has ended: nothing that it would still do happens."""


class Machine:
    """What a process does to the disk, counted, and stopped for good at one of its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, dies_at: int | None):
        self.calls, self.dies_at = 0, dies_at
        for function in ("fsync", "replace", "unlink"):
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


def calls_of_a_save() -> int:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        machine = Machine(patch, None)
        save_checkpoint(folder, checkpoint_of(10))
        return machine.calls


CALLS = calls_of_a_save()


@pytest.mark.parametrize("call", range(1, CALLS + 1))
def test_writer_killed_at_any_call_leaves_a_complete_checkpoint(tmp_path, call):
    """At every write, flush to disk, rename and removal. Only after the last rename is the new set there."""
    old, new = checkpoint_of(5), checkpoint_of(10)
    save_checkpoint(tmp_path, old)
    with pytest.MonkeyPatch.context() as patch:
        Machine(patch, call)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, new)
    # The last call syncs the folder, after DONE got its name.
    assert_newest_is(tmp_path, new if call == CALLS else old)
    save_checkpoint(tmp_path, new)
    assert_newest_is(tmp_path, new)


def test_the_killed_writer_was_killed_at_writes():
    """Headers, buffers, loader, record; three calls more a file, and the removal of an old DONE."""
    assert CALLS == 1 + (2 + 3 + 1) + 4 * 3


def test_old_marker_that_cannot_be_removed_is_an_error_of_ours(tmp_path, monkeypatch):
    old = checkpoint_of(5)
    save_checkpoint(tmp_path, old)

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(Gpt2JaxError, match="DONE_00000005: expected to delete it, found: Permission denied"):
            save_checkpoint(tmp_path, checkpoint_of(5))
    assert_newest_is(tmp_path, old)


@pytest.mark.parametrize(
    ("keep", "major_every", "left"),
    [(0, 0, [10, 20, 30, 40, 45]), (1, 0, [40, 45]), (2, 0, [30, 40, 45]), (1, 20, [20, 40, 45]), (9, 0, [10, 20, 30, 40, 45])],
)
def test_as_many_checkpoints_are_kept_as_llmc_keeps(tmp_path, keep, major_every, left):
    """llm.c deletes, after writing step s, that of s - keep * every: 45, the last step, is no multiple and deletes none."""
    for step in (10, 20, 30, 40, 45):
        save_checkpoint(tmp_path, checkpoint_of(step))
        delete_old_checkpoints(tmp_path, step, every=10, keep=keep, major_every=major_every)
    assert complete_steps(tmp_path) == left
    assert names(tmp_path) == set().union(*map(set_of, left))


def test_a_checkpoint_between_two_regular_ones_is_deleted_too(tmp_path):
    for step in (10, 17, 20, 30):
        save_checkpoint(tmp_path, checkpoint_of(step))
        delete_old_checkpoints(tmp_path, step, every=10, keep=1, major_every=0)
    assert complete_steps(tmp_path) == [30]


def test_without_regular_checkpoints_none_is_deleted(tmp_path):
    save_checkpoint(tmp_path, checkpoint_of(5))
    assert delete_old_checkpoints(tmp_path, 5, every=0, keep=1, major_every=0) == []
    assert complete_steps(tmp_path) == [5]


def rounding_after(steps: int) -> RoundingStream:
    stream = RoundingStream()
    for step in range(steps):
        stream.step_done(2, applied=step % 3 != 1)
    return stream


def test_bfloat16_set_has_llmcs_rounding_of_the_parameters_and_the_parameters_as_masters(tmp_path):
    saved = dataclasses.replace(checkpoint_of(5), dtype="bfloat16", rounding=rounding_after(5))
    save_checkpoint(tmp_path, saved)
    _, model_params = read_model_file(tmp_path / "model_00000005.bin")
    expected = stochastically_rounded(saved.params, TINY.layout, saved.rounding.last_seeds())
    np.testing.assert_array_equal(model_params, expected)
    assert (model_params != rounded_to_nearest(saved.params)).any()
    assert_newest_is(tmp_path, saved)
    assert load_checkpoint(tmp_path, 5).master_weights
    # A run without master weights takes the bits that llm.c's would: those of the model file.
    np.testing.assert_array_equal(load_checkpoint(tmp_path, 5, master_weights=False).params, expected)


def test_bfloat16_set_without_masters_has_the_parameters_bit_for_bit(tmp_path):
    params = rounded_to_nearest(checkpoint_of(5).params)
    saved = dataclasses.replace(checkpoint_of(5), params=params, dtype="bfloat16", master_weights=False)
    save_checkpoint(tmp_path, saved)
    assert (tmp_path / "model_00000005.bin").stat().st_size == 1024 + (MODEL_BYTES - 1024) // 2
    assert_newest_is(tmp_path, saved)
    assert not load_checkpoint(tmp_path, 5).master_weights


def save_of_two_ranks(folder: Path, step: int, *, zero: bool) -> Checkpoint:
    """As llm.c leaves it: a model, a state for each rank, DONE."""
    saved = checkpoint_of(step)
    states = [folder / f"state_{step:08d}_{rank:05d}.bin" for rank in range(2)]
    processes = tuple(ProcessState(LoaderState(0, rank), 100 + rank, 200 + rank) for rank in range(2))
    write_model_file(folder / f"model_{step:08d}.bin", TINY, rounded_to_nearest(saved.params), "bfloat16")
    state = TrainingState(step, saved.m, saved.v, processes, saved.params)
    write_state_files(states, state, TINY.layout, zero=zero)
    (folder / f"DONE_{step:08d}").touch()
    return saved


@pytest.mark.parametrize("zero", [False, True])
def test_set_of_two_ranks_is_merged(tmp_path, zero):
    saved = save_of_two_ranks(tmp_path, 10, zero=zero)
    assert newest_step(tmp_path) == 10
    loaded = load_checkpoint(tmp_path, 10)
    for name in ("params", "m", "v"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(saved, name), err_msg=name)
    assert loaded.loader is None
    assert loaded.rounding == RoundingStream(100, 200)


def test_set_that_lacks_the_state_of_a_rank_is_passed_over(tmp_path):
    old = checkpoint_of(5)
    save_checkpoint(tmp_path, old)
    save_of_two_ranks(tmp_path, 10, zero=True)
    (tmp_path / "state_00000010_00001.bin").unlink()
    assert_newest_is(tmp_path, old)


def test_all_ranks_states_of_an_old_set_are_deleted(tmp_path):
    save_of_two_ranks(tmp_path, 10, zero=True)
    save_checkpoint(tmp_path, checkpoint_of(20))
    assert delete_old_checkpoints(tmp_path, 20, every=10, keep=1, major_every=0) == [10]
    assert names(tmp_path) == set_of(20)


def test_master_weights_with_padding_that_is_not_zero_are_refused(tmp_path):
    saved = checkpoint_of(5)
    saved.params[TINY.layout["wte"].padding_span[0]] = 1
    save_checkpoint(tmp_path, dataclasses.replace(saved, dtype="bfloat16"))
    with pytest.raises(Gpt2JaxError, match="expected zeros in the padding rows of wte's master weights"):
        load_checkpoint(tmp_path, 5)


def reshard_for_two(source: Path, target: Path) -> None:
    reshard_checkpoint(source, 5, target, [LoaderState(0, rank) for rank in range(2)], num_micro_batches=1, zero=True)


def test_resharding_killed_at_any_call_leaves_the_source_and_no_set(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    saved = checkpoint_of(5)
    save_checkpoint(source, saved)
    for call in range(1, 100):
        target = tmp_path / str(call)
        with pytest.MonkeyPatch.context() as patch:
            machine = Machine(patch, call)
            with suppress(Killed):
                reshard_for_two(source, target)
        assert_newest_is(source, saved)
        if machine.calls < call:
            break
        if complete_steps(target):  # the last call syncs the folder, after DONE got its name
            with pytest.raises(Gpt2JaxError, match="expected no set of step 5 in it, found one"):
                reshard_for_two(source, target)
        else:
            reshard_for_two(source, target)
        assert complete_steps(target) == [5]
    assert call > 15
    np.testing.assert_array_equal(load_checkpoint(target, 5).m, saved.m)


def test_resharding_into_the_same_folder_is_refused_and_changes_nothing(tmp_path):
    save_checkpoint(tmp_path, checkpoint_of(5))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(Gpt2JaxError, match=r"expected no set of step 5 in it, found one\n---> HINT: another --output-dir"):
        reshard_for_two(tmp_path, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_resharding_that_cannot_write_leaves_nothing(tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    save_checkpoint(source, checkpoint_of(5))
    replace = os.replace

    def full(old, new):
        if "state" in Path(new).name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(old, new)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(Gpt2JaxError, match="No space left on device"):
        reshard_for_two(source, target)
    assert names(target) == set()


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "file/inside"])
def test_resharding_into_a_folder_that_cannot_be_is_refused(tmp_path, name):
    save_checkpoint(tmp_path, checkpoint_of(5))
    (tmp_path / "file").touch()
    with pytest.raises(Gpt2JaxError, match="expected to make the folder"):
        reshard_for_two(tmp_path, tmp_path / name)


def test_state_that_claims_billions_of_processes_is_passed_over_with_little_memory(tmp_path):
    old = checkpoint_of(5)
    save_checkpoint(tmp_path, old)
    save_checkpoint(tmp_path, checkpoint_of(10))
    path = tmp_path / "state_00000010_00000.bin"
    content = bytearray(path.read_bytes())
    content[8:12] = struct.pack("<i", 2**31 - 1)
    path.write_bytes(content)
    tracemalloc.start()
    try:
        assert complete_steps(tmp_path) == [5]
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
