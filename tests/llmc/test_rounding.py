"""llm.c's stochastic rounding: published noise, a twin in plain Python for every element, and the stream of seeds."""

from __future__ import annotations

import math
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.llmc.rounding import RoundingStream, noise_position, rounded_bits, squirrel_noise, stochastically_rounded
from tests.llmc.twins import MASK, XorShiftTwin, squirrel

# qkvw has 3 * 24 * 24 = 1728 elements a layer: three whole blocks of 512 and a part of one; wte more than one chunk's.
LAYOUT = GPT2Config(max_sequence_length=8, vocab_size=300, num_layers=2, num_heads=1, channels=24).layout
SEEDS = np.array([17 * i + 2**31 for i in range(16)], dtype=np.uint32)


def words(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint32)


@pytest.mark.parametrize(
    ("x", "y", "seed", "noise"),
    [(0, 0, 0, 377036288), (1, 0, 0, 3365260061), (0, 1, 0, 2397028398), (5, 7, 12345, 935514565)],
)
def test_published_noise(x, y, seed, noise):
    assert squirrel_noise(noise_position(words(x), words(y)), words(seed)).tolist() == [noise]


@given(x=st.integers(0, MASK), seed=st.integers(0, MASK))
def test_noise_of_any_position_and_seed_is_the_twins(x, seed):
    assert squirrel_noise(words(x), words(seed)).tolist() == [squirrel(x, seed)]


def rounded_twin(value: float, noise: int) -> float:
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    bits = (bits | 0xFFFF) + 1 if bits & 0xFFFF > noise & 0xFFFF else bits & ~0xFFFF
    return struct.unpack("<f", struct.pack("<I", bits))[0]


@given(value=st.floats(-(2.0**100), 2.0**100, width=32), noise=st.integers(0, MASK))
def test_rounding_takes_one_of_the_two_neighbours(value, noise):
    found = float(rounded_bits(np.array([value], np.float32).view(np.uint32), words(noise)).view(np.float32)[0])
    assert found == rounded_twin(value, noise)
    assert math.copysign(1, found) == math.copysign(1, value)
    assert found == float(ml_dtypes.bfloat16(found))
    # Neighbours in bfloat16 are at most 2^-7 of the smaller one apart, 2^-133 where numbers are subnormal.
    assert abs(found - value) <= max(2.0**-7 * abs(value), 2.0**-133)


@given(value=st.floats(allow_nan=False, width=16), noise=st.integers(0, MASK))
def test_what_bfloat16_can_represent_never_moves(value, noise):
    value = np.array([value], ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(rounded_bits(value.view(np.uint32), words(noise)).view(np.float32), value)


def test_every_element_of_the_buffer_is_rounded_by_the_noise_of_its_place():
    params = np.random.default_rng(5).normal(size=LAYOUT.num_parameters).astype(np.float32)
    rounded = stochastically_rounded(params, LAYOUT, SEEDS)
    np.testing.assert_array_equal(rounded, rounded.astype(ml_dtypes.bfloat16).astype(np.float32))
    for tensor, seed in zip(LAYOUT.tensors, SEEDS.tolist(), strict=True):
        layers = tensor.num_layers
        size = tensor.size // layers
        for layer in range(layers):
            for index in {0, 1, 511 % size, 512 % size, 1023 % size, 1024 % size, size - 1}:
                position = index % 512 + 198491317 * (index // 512 * 512 + layer) & MASK
                place = tensor.offset + layer * size + index
                expected = rounded_twin(float(params[place]), squirrel(position, seed))
                assert rounded[place] == expected, (tensor.name, layer, index)


def test_rounding_is_unbiased():
    """The mean of 8,000 roundings of one value between two neighbours: within five of its standard deviations."""
    params = np.full(LAYOUT.num_parameters, 1 + 2**-7 / 4, np.float32)
    mean = stochastically_rounded(params, LAYOUT, SEEDS).mean(dtype=np.float64)
    deviation = 2**-7 * math.sqrt(0.25 * 0.75 / LAYOUT.num_parameters)
    assert abs(mean - params[0]) < 5 * deviation


def test_chunks_do_not_show(monkeypatch):
    params = np.random.default_rng(6).normal(size=LAYOUT.num_parameters).astype(np.float32)
    whole = stochastically_rounded(params, LAYOUT, SEEDS)
    monkeypatch.setattr("gpt2_jax.llmc.rounding._CHUNK", 512)
    np.testing.assert_array_equal(stochastically_rounded(params, LAYOUT, SEEDS), whole)


@pytest.mark.parametrize("num_micro_batches", [1, 3])
def test_the_stream_draws_once_a_micro_batch_and_once_a_tensor_of_an_applied_update(num_micro_batches):
    stream, twin = RoundingStream(), XorShiftTwin(13371337)
    last = []
    for applied in (True, False, True, True, False):
        expected = stream.next_seeds(num_micro_batches)
        for _ in range(num_micro_batches):
            twin.draw()
        if applied:
            last = [twin.draw() for _ in range(16)]
            assert expected.tolist() == last
        stream.step_done(num_micro_batches, applied=applied)
        assert stream.last_seeds().tolist() == last
        assert stream.state == twin.state


def test_first_seeds_of_rank_0_follow_the_embeddings_draw():
    assert RoundingStream().next_seeds(1)[:3].tolist() == [337499614, 90980514, 844950619]


def test_a_stream_goes_on_from_its_two_states():
    stream = RoundingStream()
    stream.step_done(2, applied=True)
    resumed = RoundingStream(stream.state, stream.last_update_state)
    assert resumed.last_seeds().tolist() == stream.last_seeds().tolist()
    assert resumed.next_seeds(2).tolist() == stream.next_seeds(2).tolist()
