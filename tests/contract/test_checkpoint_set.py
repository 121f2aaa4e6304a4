"""A run folder's checkpoint sets: what was saved is loaded, and a save that fails never spoils the set before it."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import numpy as np
import pytest

from gpt2_jax.checkpoint import Checkpoint, load_checkpoint, newest_step, save_checkpoint
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.layout import ModelConfig, ParameterLayout
from gpt2_jax.llmc.loader import LoaderState, TokenLoader
from gpt2_jax.llmc.model_file import write_model_file
from tests.conftest import TINY

MODEL_BYTES = 1024 + 4 * ParameterLayout(TINY).num_parameters


def open_loader(path: str, *, shuffle: bool = True) -> TokenLoader:
    return TokenLoader(path, 2, 16, vocab_size=TINY.vocab_size, shuffle=shuffle)


def checkpoint_of(step: int, loader: LoaderState | None = None) -> Checkpoint:
    """Other arrays for every step."""
    layout = ParameterLayout(TINY)
    params, m, v = np.random.default_rng(step).normal(size=(3, layout.num_parameters)).astype(np.float32)
    params[slice(*layout.padding_span)] = 0
    return Checkpoint(TINY, params, m, v, step, loader or LoaderState(0, 3))


def assert_newest_is(folder: Path, saved: Checkpoint) -> None:
    assert newest_step(folder) == saved.step
    loaded = load_checkpoint(folder, saved.step)
    assert (loaded.model, loaded.step) == (saved.model, saved.step)
    for name in ("params", "m", "v"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(saved, name), err_msg=name)
    assert loaded.loader == saved.loader


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def set_of(step: int) -> set[str]:
    return {f"model_{step:08d}.bin", f"state_{step:08d}_00000.bin", f"DONE_{step:08d}"}


def test_set_has_llmcs_three_names_and_is_loaded_as_it_was_saved(tmp_path):
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


@pytest.mark.parametrize("missing", sorted(set_of(10)))
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


# fsync is called for the model, its folder, the state, its folder, DONE, its folder; replace for each of the three.
@pytest.mark.parametrize(
    ("function", "number"),
    [
        ("fsync", 1),
        ("fsync", 2),
        ("fsync", 3),
        ("fsync", 4),
        ("fsync", 5),
        ("replace", 1),
        ("replace", 2),
        ("replace", 3),
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
    assert "DONE_00000010" not in names(tmp_path)
    assert names(tmp_path) <= set_of(5) | set_of(10)
    assert_newest_is(tmp_path, old)

    save_checkpoint(tmp_path, new)
    assert_newest_is(tmp_path, new)


def test_set_whose_very_last_sync_fails_is_complete_all_the_same(tmp_path, monkeypatch):
    new = checkpoint_of(10)
    fail_at_call(monkeypatch, "fsync", 6)
    with pytest.raises(Gpt2JaxError, match="No space left on device"):
        save_checkpoint(tmp_path, new)
    assert_newest_is(tmp_path, new)


@pytest.mark.parametrize(("allowed_bytes", "new_files"), [(MODEL_BYTES - 1, set()), (MODEL_BYTES, {"model_00000010.bin"})])
def test_save_on_a_disk_that_takes_no_more_leaves_the_set_before_it(tmp_path, allowed_bytes, new_files):
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
    assert names(tmp_path) == set_of(5) | new_files
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
    assert [any(name.startswith("DONE") for name in files) for files in seen] == [False, False, True]
    assert seen[-1] == set_of(5)


def test_state_with_another_step_than_its_name_is_refused(tmp_path):
    save_checkpoint(tmp_path, checkpoint_of(5))
    for name in set_of(5):
        (tmp_path / name).rename(tmp_path / name.replace("00000005", "00000007"))
    with pytest.raises(Gpt2JaxError) as raised:
        load_checkpoint(tmp_path, 7)
    expected = f"{tmp_path / 'state_00000007_00000.bin'}: expected the state of step 7, found step 5 in its header"
    assert expected in str(raised.value)


def test_state_of_another_model_is_refused(tmp_path):
    save_checkpoint(tmp_path, checkpoint_of(5))
    other = ModelConfig(max_sequence_length=8, vocab_size=203, num_layers=2, num_heads=4, channels=32)
    params = np.zeros(ParameterLayout(other).num_parameters, np.float32)
    write_model_file(tmp_path / "model_00000005.bin", other, params)
    with pytest.raises(Gpt2JaxError, match=r"state_00000005_00000\.bin: expected a training state file of .* \(grown\)"):
        load_checkpoint(tmp_path, 5)


@pytest.mark.parametrize("name", ["model_00000005.bin", "state_00000005_00000.bin"])
def test_truncated_file_of_a_complete_set_is_refused_by_name(tmp_path, name):
    save_checkpoint(tmp_path, checkpoint_of(5))
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Gpt2JaxError, match=rf"{name}: expected .* \(truncated\)"):
        load_checkpoint(tmp_path, 5)
