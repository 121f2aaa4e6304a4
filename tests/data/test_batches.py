"""What a run reads: micro-batches of a step, and what is opened or refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from gpt2_jax.config import DataSettings, EvaluationSettings, RunConfig, RunSettings
from gpt2_jax.data.batches import RunData, open_data
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc.eval_file import MultipleChoice, write_eval_file
from gpt2_jax.llmc.loader import TokenLoader
from gpt2_jax.llmc.token_shard import open_token_shard, write_token_shard
from tests.conftest import TINY

PART = np.array([3, 4], np.uint16)


def opened(shards, *, hellaswag: str = "", validates: bool = True, vocab_size: int = 203, seed: int = 42, **changes) -> RunData:
    values = {"batch_size": 2, "sequence_length": 16, "shuffle": False, "total_batch_size": 96, **changes}
    config = RunConfig(
        data=DataSettings(train=shards[0], validation=shards[1], **values),
        evaluation=EvaluationSettings(hellaswag=hellaswag, validate_every=int(validates)),
        run=RunSettings(seed=seed),
    )
    return open_data(config, dataclasses.replace(TINY, vocab_size=vocab_size))


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


BESIDE = [
    ("mine_train.bin", "mine_val.bin"),
    ("train.bin", "val.bin"),
    ("fineweb_train_*.bin", "fineweb_val_*.bin"),
    ("Stories-train-*.bin", "Stories-valid-*.bin"),
    ("train/part_*.bin", "validation/part_*.bin"),
    ("mine.bin", "mine_val.bin"),
    ("restrained.bin", "restrained_val.bin"),
]


@pytest.mark.parametrize(("train", "validation"), BESIDE)
def test_validation_data_are_the_shards_beside_the_training_shards(tmp_path, train, validation):
    for number, pattern in enumerate((train, validation, "kjv_val.bin")):
        path = tmp_path / pattern.replace("*", "000001")
        path.parent.mkdir(exist_ok=True)
        write_token_shard(path, np.full(100, number))
    data = opened((str(tmp_path / train), ""))
    assert data.validation.pattern == str(tmp_path / validation)
    assert {int(token) for token in data.validation.next_batch()[0].ravel()} == {1}
    assert data.trained_validation_paths == []


@pytest.mark.parametrize("train", [train for train, _ in BESIDE])
def test_another_text_is_never_validated_on(tmp_path, train):
    for pattern in (train, "kjv_val.bin", "other_train.bin", "kjv_train.bin"):
        path = tmp_path / pattern.replace("*", "000001")
        path.parent.mkdir(exist_ok=True)
        write_token_shard(path, np.zeros(100))
    with pytest.raises(Gpt2JaxError, match="expected validation shards beside --train") as refused:
        opened((str(tmp_path / train), ""))
    assert refused.value.hint.startswith("--validation FILE, or --validate-every 0")
    assert opened((str(tmp_path / train), ""), validates=False).validation is None


def test_validation_data_that_are_trained_on_are_named(tmp_path):
    for name, token in (("a_train.bin", 1), ("b_train.bin", 2), ("b_val.bin", 2), ("c_val.bin", 3)):
        write_token_shard(tmp_path / name, np.full(100, token))
    (tmp_path / "linked_val.bin").hardlink_to(tmp_path / "a_train.bin")
    everything, held_out = str(tmp_path / "*_train.bin"), str(tmp_path / "c_val.bin")
    shared = opened((everything, str(tmp_path / "*_val.bin"))).trained_validation_paths
    assert shared == [str(tmp_path / "b_val.bin"), str(tmp_path / "linked_val.bin")]
    assert opened((everything, held_out)).trained_validation_paths == []
    assert opened((held_out, held_out)).trained_validation_paths == [held_out]
    assert opened((held_out, held_out), overfit_one_batch=True).trained_validation_paths == []


def test_the_seed_changes_the_order_and_the_default_is_llmcs(tmp_path):
    write_token_shard(tmp_path / "x_train.bin", np.arange(3000) % 200)
    shards = (str(tmp_path / "x_train.bin"),) * 2
    places = {seed: opened(shards, shuffle=True, seed=seed).next_batch().places for seed in (42, 43)}
    assert places[42] != places[43]
    assert places[42] == places_of_llmcs_order(shards[0])


def places_of_llmcs_order(path):
    loader = TokenLoader(path, 2, 16, vocab_size=203, shuffle=True)
    places = []
    for _ in range(3):
        loader.next_batch()
        places.append(loader.last_place)
    return places
