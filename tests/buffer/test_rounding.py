"""The device's stochastic rounding is the host's, bit for bit."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest

from gpt2_jax.buffer.rounding import stochastically_rounded
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.llmc import rounding
from tests.conftest import TINY

# 3 * 48 * 48 elements in a layer of qkvw: 13 whole blocks of 512 and a part of one.
ODD = GPT2Config(max_sequence_length=7, vocab_size=131, num_layers=3, num_heads=1, channels=48)


@pytest.mark.parametrize("config", [TINY, ODD], ids=["tiny", "odd"])
def test_bits_are_the_hosts(config):
    layout = config.layout
    random = np.random.default_rng(4)
    params = (random.normal(size=layout.num_parameters) * 10.0 ** random.integers(-30, 30, layout.num_parameters)).astype(
        np.float32
    )
    params[slice(*layout["wte"].padding_span)] = 0
    seeds = random.integers(0, 2**32, 16, dtype=np.uint32)
    found = np.asarray(jax.jit(partial(stochastically_rounded, layout=layout))(params, tensor_seeds=seeds))
    np.testing.assert_array_equal(found, rounding.stochastically_rounded(params, layout, seeds))
    np.testing.assert_array_equal(found, rounding.rounded_to_nearest(found))
    assert (found[slice(*layout["wte"].padding_span)] == 0).all()
