"""A run folder's checkpoint sets: what was saved is loaded, the newest complete set is found, what is damaged is refused."""

from __future__ import annotations

import dataclasses
import shlex
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.llmc.checkpoint_set import complete_steps, newest_step
from gpt2_jax.llmc.loader import TokenLoader
from gpt2_jax.llmc.model_file import read_model_file, write_model_file
from gpt2_jax.llmc.rounding import RoundingStream, rounded_to_nearest, stochastically_rounded
from gpt2_jax.training.checkpoint import load_checkpoint, save_checkpoint
from tests.conftest import TINY
from tests.contract.checkpoint_sets import (
    MODEL_BYTES,
    assert_newest_is,
    checkpoint_of,
    names,
    set_of,
)


def open_loader(path: str, *, shuffle: bool = True) -> TokenLoader:
    return TokenLoader(path, 2, 16, vocab_size=TINY.vocab_size, shuffle=shuffle)


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
    path = tmp_path / folder
    found, hint = {
        "plain_file": ("none", f"python scripts/train.py --out-dir {path}-2   "),
        "only_incomplete": ("model_00000003.bin, state_00000003_00000.bin", f"{path}/model_00000003.bin   "),
    }.get(folder, ("none", f"python scripts/train.py --out-dir {path}   "))
    assert f"of one step), found {found}" in raised.value.problem
    assert raised.value.hint.startswith(hint)


def test_the_command_for_a_damaged_state_leads_to_the_checkpoint_before_it(tmp_path):
    """The hint to resume from this folder would lead to the same error again."""
    folder, old = tmp_path / "my run", checkpoint_of(5)
    folder.mkdir()
    for saved in (old, checkpoint_of(10)):
        save_checkpoint(folder, saved)
    with open(folder / "state_00000010_00000.bin", "r+b") as file:
        file.truncate(2000)
    with pytest.raises(Gpt2JaxError) as raised:
        load_checkpoint(folder, newest_step(folder))
    program, path = shlex.split(raised.value.hint.partition("   (")[0])
    assert program == "rm"
    Path(path).unlink()
    assert_newest_is(folder, old)


def test_folder_whose_name_is_too_long_is_refused(tmp_path):
    with pytest.raises(Gpt2JaxError, match="expected a run folder with a complete checkpoint"):
        newest_step(tmp_path / ("x" * 300))


def save_incomplete(folder: Path) -> None:
    folder.mkdir()
    save_checkpoint(folder, checkpoint_of(3))
    (folder / "DONE_00000003").unlink()


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


def test_master_weights_with_padding_that_is_not_zero_are_refused(tmp_path):
    saved = checkpoint_of(5)
    saved.params[TINY.layout["wte"].padding_span[0]] = 1
    save_checkpoint(tmp_path, dataclasses.replace(saved, dtype="bfloat16"))
    with pytest.raises(Gpt2JaxError, match="expected zeros in the padding rows of wte's master weights"):
        load_checkpoint(tmp_path, 5)


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
