"""Checkpoint sets of several processes: merged when they are loaded, and written for another number of processes."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.llmc.checkpoint_set import newest_step
from gpt2_jax.llmc.loader import LoaderState
from gpt2_jax.llmc.rounding import RoundingStream
from gpt2_jax.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
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


@pytest.mark.parametrize("zero", [False, True])
def test_some_ranks_parts_of_a_set_are_those_of_the_whole(tmp_path, zero):
    saved = save_of_two_ranks(tmp_path, 10, zero=zero)
    loaded = load_checkpoint(tmp_path, 10, ranks=range(1, 3), num_ranks=4)
    for name in ("params", "m", "v"):
        expected = saved.model.layout.rows(getattr(saved, name), 4)[1:3]
        np.testing.assert_array_equal(getattr(loaded, name), expected, err_msg=name)
    assert (loaded.rounding, len(loaded.processes)) == (RoundingStream(100, 200), 2)


def test_a_process_holds_no_more_than_its_part_while_it_loads(tmp_path):
    """At most 1.2 times its parameters and moments."""
    model = GPT2Config(max_sequence_length=16, vocab_size=5000, num_layers=2, num_heads=4, channels=128)
    zeros = np.zeros(model.layout.num_parameters, np.float32)
    save_checkpoint(tmp_path, Checkpoint(model, zeros, zeros, zeros, 3, LoaderState(0, 0)))
    tracemalloc.start()
    load_checkpoint(tmp_path, 3, ranks=range(1, 2), num_ranks=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * 3 * zeros.nbytes / 2


@pytest.mark.parametrize("ranks", [range(1), range(3, 4)])
def test_padding_that_is_not_zero_is_refused_by_whoever_has_it(tmp_path, ranks):
    """wte's padding rows lie at its end, so that the last rank's part has them."""
    saved = save_of_two_ranks(tmp_path, 10, zero=False)
    path = tmp_path / "state_00000010_00000.bin"
    content = bytearray(path.read_bytes())
    N, place = saved.model.layout.num_parameters, saved.model.layout["wte"].padding_span[1] - 1
    start = 1024 + 4 * (2 * N + place)
    content[start : start + 4] = np.float32(1).tobytes()
    path.write_bytes(content)
    if ranks.start == 0:
        load_checkpoint(tmp_path, 10, ranks=ranks, num_ranks=4)
    else:
        with pytest.raises(Gpt2JaxError, match="expected zeros in the padding rows of wte's master weights"):
            load_checkpoint(tmp_path, 10, ranks=ranks, num_ranks=4)
