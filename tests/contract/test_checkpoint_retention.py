"""Which old checkpoint sets are kept: as many as llm.c keeps."""

from __future__ import annotations

import pytest

from gpt2_jax.llmc.checkpoint_set import complete_steps
from gpt2_jax.training.checkpoint import delete_old_checkpoints, save_checkpoint
from tests.contract.checkpoint_sets import (
    checkpoint_of,
    names,
    save_of_two_ranks,
    set_of,
)


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


def test_all_ranks_states_of_an_old_set_are_deleted(tmp_path):
    save_of_two_ranks(tmp_path, 10, zero=True)
    save_checkpoint(tmp_path, checkpoint_of(20))
    assert delete_old_checkpoints(tmp_path, 20, every=10, keep=1, major_every=0) == [10]
    assert names(tmp_path) == set_of(20)
