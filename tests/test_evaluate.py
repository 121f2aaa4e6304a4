"""Validation loss over batches, and the unigram cross-entropy that it is held against."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.evaluate import make_loss_function, unigram_cross_entropy, validation_loss
from gpt2_jax.llmc.loader import TokenLoader
from gpt2_jax.llmc.token_shard import open_token_shard, write_token_shard
from tests.conftest import TINY

FLOAT32 = jnp.dtype("float32")


@pytest.mark.parametrize("num_batches", [3, 9])
def test_validation_is_the_mean_over_the_first_batches(tiny_layout, tiny_params, tiny_shards, num_batches):
    loader = TokenLoader(tiny_shards[1], 2, 16, vocab_size=TINY.vocab_size)
    loader.next_batch()  # validation starts over
    params = jnp.asarray(tiny_params)
    loss_function = make_loss_function(tiny_layout, dtype=FLOAT32, matmul="xla")
    loss = validation_loss(loss_function, params, loader, num_batches)
    tokens = np.asarray(open_token_shard(tiny_shards[1])).astype(np.int32)[: num_batches * 32 + 1]
    x, y = tokens[:-1].reshape(-1, 16), tokens[1:].reshape(-1, 16)
    assert abs(loss - float(loss_function(params, x, y))) < 1e-5


def test_unigram_cross_entropy_by_hand(tmp_path):
    train, validation = str(tmp_path / "train.bin"), str(tmp_path / "val.bin")
    write_token_shard(train, np.array([0, 0, 0, 1]))
    write_token_shard(validation, np.array([0, 2]))
    # Add-one counts of a vocabulary of 3: 4, 2, 1 of 7.
    assert unigram_cross_entropy([train], [validation], 3) == pytest.approx(-(math.log(4 / 7) + math.log(1 / 7)) / 2)


def test_unigram_counts_all_shards(tmp_path):
    paths = [str(tmp_path / f"{i}.bin") for i in range(2)]
    write_token_shard(paths[0], np.array([0, 0]))
    write_token_shard(paths[1], np.array([1]))
    expected = -(2 * math.log(3 / 5) + math.log(2 / 5)) / 3
    assert unigram_cross_entropy(paths, paths, 2) == pytest.approx(expected)
