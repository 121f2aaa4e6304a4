"""llm.c's random streams against its published values and against twins in plain Python."""

from __future__ import annotations

import math
import random
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc.random import GENERATOR_STRUCT, Mt19937, XorShift
from tests.llmc.twins import Mersenne, normals, permutation

# A state of 624 words is renewed at the first, the 625th, the 1249th draw.
POSITIONS = [0, 1, 2, 623, 624, 625, 1247, 1248, 1249, 2000]


def normal(generator: Mt19937, count: int, std: float = 1.0) -> np.ndarray:
    out = np.full(count, np.nan, dtype=np.float32)
    generator.fill_normal(out, std)
    return out


def generators_after(count: int, seed: int = 42) -> tuple[Mt19937, Mersenne]:
    generator, twin = Mt19937(seed), Mersenne(seed)
    generator.draws(count)
    for _ in range(count):
        twin.draw()
    return generator, twin


def test_published_stream_of_seed_137():
    generator = Mt19937(137)
    assert generator.draws(5).tolist() == [4053805790, 2173880614, 380293709, 1237255315, 2986595568]
    np.testing.assert_allclose(normal(generator, 8)[:3], [0.794766, 1.436932, -0.229219], atol=1e-6)
    assert generator.draws(1).tolist() == [2186503452]
    np.testing.assert_allclose(normal(generator, 16)[:3], [-1.281388, -2.646396, -0.065695], atol=1e-6)
    assert generator.draws(1).tolist() == [2756748748]


def test_first_draws_of_seed_42():
    draws = Mt19937(42).draws(3)
    assert draws.dtype == np.uint32
    assert draws.tolist() == [1608637542, 3421126067, 4083286876]


def test_first_weights_of_the_d12_model():
    expected = [0.0385383, 0.0297457, 0.0180143, -0.0421104]
    np.testing.assert_allclose(normal(Mt19937(42), 16, 0.02)[:4], expected, atol=1e-7)


@given(seed=st.integers(0, 2**32 - 1))
def test_draws_of_any_seed_are_those_of_the_twin(seed):
    twin = Mersenne(seed)
    assert Mt19937(seed).draws(700).tolist() == [twin.draw() for _ in range(700)]


def test_draws_in_pieces_are_the_draws_at_once():
    generator = Mt19937(7)
    pieces = np.concatenate([generator.draws(count) for count in (0, 1, 622, 1, 0, 1, 1000)])
    assert pieces.tolist() == Mt19937(7).draws(1625).tolist()


def test_published_permutation_of_8():
    values = np.arange(8)
    Mt19937(42).permute(values)
    assert values.tolist() == [1, 0, 3, 7, 5, 4, 2, 6]


@pytest.mark.parametrize("size", [0, 1, 2, 3, 100, 1000])
def test_permutations_are_those_of_the_twin_and_take_as_many_draws(size):
    generator, twin = Mt19937(43), Mersenne(43)
    for _ in range(3):
        values = np.arange(size, dtype=np.int32)
        generator.permute(values)
        assert values.tolist() == permutation(range(size), twin)
    assert generator.draws(1).tolist() == [twin.draw()]


def test_permutation_permutes_what_is_there():
    values = np.array([5, 5, 9, 1])
    Mt19937(1).permute(values)
    assert values.tolist() == permutation([5, 5, 9, 1], Mersenne(1))


def test_uniforms_are_the_low_24_bits():
    uniforms = Mt19937(42).uniforms(2000)
    assert uniforms.dtype == np.float32
    twin = Mersenne(42)
    assert uniforms.tolist() == [(twin.draw() & 0xFFFFFF) / 2**24 for _ in range(2000)]


@pytest.mark.parametrize("size", [16, 17, 31, 32, 40, 1000])
@pytest.mark.parametrize("std", [1.0, 0.02, 0.02 / math.sqrt(24)])
def test_normals_are_those_of_the_twin_and_take_as_many_draws(size, std):
    generator, twin = Mt19937(42), Mersenne(42)
    np.testing.assert_array_equal(normal(generator, size, std), normals(twin.draw, size, std))
    assert generator.draws(1).tolist() == [twin.draw()]


@pytest.mark.parametrize("size", range(1, 16))
def test_few_normals_are_close_to_the_twins_and_take_as_many_draws(size):
    generator, twin = Mt19937(42), Mersenne(42)
    np.testing.assert_allclose(normal(generator, size, 0.02), normals(twin.draw, size, 0.02), rtol=0, atol=1e-7)
    assert generator.draws(1).tolist() == [twin.draw()]


def test_few_normals_are_those_of_the_twin_bit_for_bit():
    for seed in range(100):
        np.testing.assert_array_equal(normal(Mt19937(seed), 15, 0.02), normals(Mersenne(seed).draw, 15, 0.02))


def test_no_normals_take_no_draws():
    generator = Mt19937(42)
    normal(generator, 0)
    assert generator.draws(1).tolist() == [1608637542]


# 2^20 and 8 more: the last 16, which are drawn anew, lie on both sides of 2^20.
@pytest.mark.parametrize("size", [2**20 + 8, 2**20 + 16, 2**20 + 40])
def test_many_normals_equal_the_algorithm_in_one_piece(size):
    source = random.Random()
    source.setstate((3, (*Mersenne(42).words, 624), None))

    def uniforms(count: int) -> np.ndarray:
        draws = np.array([source.getrandbits(32) for _ in range(count)], dtype=np.uint32)
        return (draws % 2**24).astype(np.float32) / np.float32(2**24)

    def box_muller(values: np.ndarray) -> np.ndarray:
        first, second = np.split(values.reshape(-1, 16), 2, axis=1)
        logarithm = np.log(np.float64(np.float32(1) - first + np.float32(1e-12))).astype(np.float32)
        radius = np.sqrt(np.float32(-2) * logarithm)
        theta = np.float64(np.float32(2 * np.pi * np.float64(second)))
        pair = [radius * np.cos(theta).astype(np.float32), radius * np.sin(theta).astype(np.float32)]
        return (np.concatenate(pair, axis=1) * np.float32(0.02)).ravel()

    expected = uniforms(size)
    whole = size // 16 * 16
    expected[:whole] = box_muller(expected[:whole])
    if size % 16:
        expected[-16:] = box_muller(uniforms(16))

    generator = Mt19937(42)
    np.testing.assert_array_equal(normal(generator, size, 0.02), expected)
    assert generator.draws(1).tolist() == [source.getrandbits(32)]


@pytest.mark.parametrize("position", POSITIONS)
def test_struct_is_llmcs_at_every_position(position):
    generator, twin = generators_after(position)
    assert generator.to_struct().tobytes() == twin.struct_bytes()


@pytest.mark.parametrize("position", POSITIONS)
def test_generator_from_a_struct_continues_alike_and_gives_the_same_struct(position):
    generator, twin = generators_after(position)
    restored = Mt19937.from_struct(np.frombuffer(twin.struct_bytes(), GENERATOR_STRUCT)[0])
    assert restored.to_struct().tobytes() == twin.struct_bytes()
    assert restored.draws(1300).tolist() == generator.draws(1300).tolist()
    assert restored.to_struct().tobytes() == generator.to_struct().tobytes()


def test_struct_does_not_change_with_its_generator():
    generator = Mt19937(42)
    saved = generator.to_struct()
    before = saved.tobytes()
    generator.draws(2000)
    assert saved.tobytes() == before


def test_seed_field_that_llmc_leaves_uninitialised_does_not_matter():
    content = b"\xab" * 8 + Mersenne(42).struct_bytes()[8:]
    assert Mt19937.from_struct(np.frombuffer(content, GENERATOR_STRUCT)[0]).draws(1).tolist() == [1608637542]


@pytest.mark.parametrize(
    ("left", "next_word"),
    [(0, 0), (0, 625), (1, 1), (1, 625), (624, 0), (624, 2), (2, 624), (-1, 626), (625, 0), (5, 2**32 - 1), (-(2**31), 1)],
)
def test_counters_that_no_generator_can_have_are_refused(left, next_word):
    content = bytearray(Mersenne(42).struct_bytes())
    struct.pack_into("<iI", content, 8, left, next_word)
    message = f"expected left = 625 - next with next 1 to 624, found {left} and {next_word}"
    with pytest.raises(Gpt2JaxError, match=message):
        Mt19937.from_struct(np.frombuffer(bytes(content), GENERATOR_STRUCT)[0])


def test_published_sampling_stream_of_state_1337():
    generator = XorShift(1337)
    assert [generator.draw() for _ in range(4)] == [989205090, 818269915, 1335155955, 3876892996]


def test_published_sampling_uniforms_of_state_1337():
    generator = XorShift(1337)
    uniforms = [generator.uniform(), generator.uniform()]
    assert all(isinstance(uniform, np.float32) for uniform in uniforms)
    np.testing.assert_allclose(uniforms, [0.2303172, 0.1905183], atol=1e-7)


def test_published_rounding_stream_of_rank_0():
    generator = XorShift(13371337)
    assert [generator.draw() for _ in range(4)] == [740755583, 337499614, 90980514, 844950619]


def test_sampling_uniforms_are_the_high_24_bits_and_below_1():
    generator, twin = XorShift(2**64 - 1), XorShift(2**64 - 1)
    for _ in range(1000):
        uniform = generator.uniform()
        assert 0 <= uniform < 1
        assert uniform * 2**24 == twin.draw() >> 8
