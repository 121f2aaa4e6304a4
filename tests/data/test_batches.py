"""What a run reads: micro-batches of a step, and what is opened or refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from gpt2_jax.config import DataSettings
from gpt2_jax.data.batches import RunData, open_data
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc.eval_file import MultipleChoice, write_eval_file
from gpt2_jax.llmc.token_shard import open_token_shard
from tests.conftest import TINY

PART = np.array([3, 4], np.uint16)


def opened(shards, *, hellaswag: str = "", validates: bool = True, vocab_size: int = 203, **changes) -> RunData:
    values = {"batch_size": 2, "sequence_length": 16, "shuffle": False, "overfit_one_batch": False, **changes}
    settings = DataSettings(train=shards[0], validation=shards[1], **values)
    model = dataclasses.replace(TINY, vocab_size=vocab_size)
    return open_data(settings, model, hellaswag=hellaswag, num_micro_batches=3, validates=validates)


def test_a_step_reads_the_next_micro_batches_in_the_files_order(tiny_shards):
    data = opened(tiny_shards)
    tokens = np.asarray(open_token_shard(tiny_shards[0])).astype(np.int32)
    for step in range(2):
        batch = data.next_batch()
        start = step * 96
        np.testing.assert_array_equal(batch.x_ABT, tokens[start : start + 96].reshape(3, 2, 16))
        np.testing.assert_array_equal(batch.y_ABT, tokens[start + 1 : start + 97].reshape(3, 2, 16))
        assert batch.x_ABT.dtype == batch.y_ABT.dtype == np.int32
        assert [(place.path, place.token) for place in batch.places] == [(tiny_shards[0], start + 32 * a) for a in range(3)]


def test_one_batch_that_is_overfitted_is_the_first_of_the_validation_data(tiny_shards):
    data = opened(tiny_shards, overfit_one_batch=True, shuffle=True)
    tokens = np.asarray(open_token_shard(tiny_shards[1])).astype(np.int32)
    for _ in range(2):
        batch = data.next_batch()
        np.testing.assert_array_equal(batch.x_ABT, tokens[:96].reshape(3, 2, 16))
        assert {place.path for place in batch.places} == {tiny_shards[1]}


def test_validation_data_are_opened_only_where_they_are_used(tiny_shards):
    assert opened(tiny_shards).validation is not None
    assert opened((tiny_shards[0], "nowhere.bin"), validates=False).validation is None
    with pytest.raises(Gpt2JaxError, match=r"nowhere\.bin"):
        opened((tiny_shards[0], "nowhere.bin"))


def test_what_does_not_fit_the_model_is_refused(tiny_shards, tmp_path):
    with pytest.raises(Gpt2JaxError, match="--sequence-length: expected at most the model's 16, found 17"):
        opened(tiny_shards, sequence_length=17)
    path = str(tmp_path / "hellaswag.bin")
    write_eval_file(path, [MultipleChoice(0, PART, (PART,) * 4)])
    assert len(opened(tiny_shards, hellaswag=path).questions) == 1
    with pytest.raises(Gpt2JaxError, match=r"hellaswag.bin: expected questions below 4 tokens"):
        opened(tiny_shards, hellaswag=path, sequence_length=4)
    with pytest.raises(Gpt2JaxError, match="token ids below 4, found one of 4 tokens and id 4"):
        opened(tiny_shards, hellaswag=path, vocab_size=4)
