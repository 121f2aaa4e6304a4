"""Checkpoint sets of several processes: merged when they are loaded, and written for another number of processes."""

from __future__ import annotations

import numpy as np
import pytest

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc.checkpoint_set import newest_step
from gpt2_jax.llmc.rounding import RoundingStream
from gpt2_jax.training.checkpoint import load_checkpoint, save_checkpoint
from tests.contract.checkpoint_sets import (
    assert_newest_is,
    checkpoint_of,
    reshard_for_two,
    save_of_two_ranks,
)


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


def test_resharding_into_the_same_folder_is_refused_and_changes_nothing(tmp_path):
    save_checkpoint(tmp_path, checkpoint_of(5))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(Gpt2JaxError, match=r"expected no set of step 5 in it, found one\n---> HINT: another --output-dir"):
        reshard_for_two(tmp_path, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "file/inside"])
def test_resharding_into_a_folder_that_cannot_be_is_refused(tmp_path, name):
    save_checkpoint(tmp_path, checkpoint_of(5))
    (tmp_path / "file").touch()
    with pytest.raises(Gpt2JaxError, match="expected to make the folder"):
        reshard_for_two(tmp_path, tmp_path / name)
