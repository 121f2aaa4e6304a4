"""llm.c's random initialization: published values, PyTorch's own stream, and what must be exact."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from gpt2_jax.config import ModelSettings
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.models.initialize import initialize_parameters
from gpt2_jax.models.weights import load_weights
from tests.conftest import TINY


def test_first_values_are_llmcs():
    # The embedding is drawn first and row by row, so d12's first values need d12's width, not its size.
    config = GPT2Config(max_sequence_length=16, vocab_size=100, num_layers=1, num_heads=12, channels=768)
    wte = config.layout.views(initialize_parameters(config))["wte"]
    expected = np.array([0.0385383, 0.0297457, 0.0180143, -0.0421104], dtype=np.float32)
    np.testing.assert_allclose(wte[0, :4], expected, rtol=0, atol=5e-8)


def test_constant_tensors_and_padding_rows(tiny_layout):
    tensors = tiny_layout.views(initialize_parameters(TINY))
    for name, tensor in tensors.items():
        if name in ("ln1w", "ln2w", "lnfw"):
            assert (tensor == 1).all()
        elif name.endswith("b"):
            assert (tensor == 0).all()
        else:
            # Every layer is drawn: none is left at zero, none repeats another.
            assert np.unique(tensor[: TINY.vocab_size]).size > 0.99 * tensor[: TINY.vocab_size].size
    assert (tensors["wte"][TINY.vocab_size :] == 0).all()


@pytest.mark.torch
def test_equals_pytorchs_stream_in_module_order():
    """torch's CPU normal_ with the same seed, module by module. Its vectorized form rounds the angle in float32, whose
    unit in the last place is 2^-21 from 4 to 2 pi; times the largest radius that 24-bit uniforms can give, 5.8."""
    import torch

    config = GPT2Config(max_sequence_length=16, vocab_size=203, num_layers=2, num_heads=4, channels=32)
    tensors = config.layout.views(initialize_parameters(config))
    generator = torch.Generator().manual_seed(42)
    residual_std = 0.02 / math.sqrt(2 * config.num_layers)
    drawn = [(tensors["wte"][: config.vocab_size], 0.02), (tensors["wpe"], 0.02)]
    for layer in range(config.num_layers):
        drawn += [(tensors["qkvw"][layer], 0.02), (tensors["attprojw"][layer], residual_std)]
        drawn += [(tensors["fcw"][layer], 0.02), (tensors["fcprojw"][layer], residual_std)]
    for found, std in drawn:
        expected = torch.empty(found.shape).normal_(0.0, std, generator=generator).numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=5.8 * std * 2**-21)


def test_another_seed_gives_other_weights():
    assert not np.array_equal(initialize_parameters(TINY, 43), initialize_parameters(TINY))
    settings = ModelSettings(init="d6", **dataclasses.asdict(TINY))
    np.testing.assert_array_equal(load_weights(settings, 43)[1], initialize_parameters(TINY, 43))
    np.testing.assert_array_equal(load_weights(settings)[1], initialize_parameters(TINY, 42))
