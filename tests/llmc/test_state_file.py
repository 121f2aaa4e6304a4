"""llm.c's training state files."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc.loader import LoaderState
from gpt2_jax.llmc.random import GENERATOR_STRUCT, Mt19937
from gpt2_jax.llmc.state_file import TrainingState, read_state_file, write_state_file
from tests.llmc.twins import Mersenne, header

N = 50
SHARDS, SAMPLES = [2, 0, 1], [3, 1, 4, 0, 2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.bin"


def training_state(*, shuffled: bool, master: bool) -> TrainingState:
    m, v, weights = np.random.default_rng(3).normal(size=(3, N)).astype(np.float32)
    loader = LoaderState(1, 4)
    if shuffled:
        generator = Mt19937(42)
        generator.draws(700)
        loader = LoaderState(1, 4, np.array(SHARDS, np.int32), np.array(SAMPLES, np.int32), generator.to_struct())
    return TrainingState(1234, m, v, loader, weights if master else None, 2**63 + 5, 2**40 + 7)


def refusal(path: Path, num_parameters: int = N) -> str:
    with pytest.raises(Gpt2JaxError) as raised:
        read_state_file(path, num_parameters)
    assert str(raised.value).startswith(f"{path}: expected ")
    assert "---> HINT: python scripts/train.py --resume" in str(raised.value)
    return str(raised.value)


all_kinds = pytest.mark.parametrize(("shuffled", "master"), [(False, False), (True, False), (False, True), (True, True)])


@all_kinds
def test_what_was_written_is_read(path, shuffled, master):
    written = training_state(shuffled=shuffled, master=master)
    write_state_file(path, written)
    read = read_state_file(path, N)
    assert (read.step, read.rounding_state, read.last_rounding_state) == (1234, 2**63 + 5, 2**40 + 7)
    np.testing.assert_array_equal(read.m, written.m)
    np.testing.assert_array_equal(read.v, written.v)
    assert (read.master is None) == (not master)
    if master:
        np.testing.assert_array_equal(read.master, written.master)
    assert (read.loader.shard_index, read.loader.sample_index) == (1, 4)
    if shuffled:
        assert read.loader.shard_permutation.tolist() == SHARDS
        assert read.loader.sample_permutation.tolist() == SAMPLES
        assert read.loader.generator.tobytes() == written.loader.generator.tobytes()
    else:
        assert read.loader == LoaderState(1, 4)


@all_kinds
def test_file_that_is_read_and_written_again_has_the_same_bytes(path, shuffled, master):
    write_state_file(path, training_state(shuffled=shuffled, master=master))
    content = path.read_bytes()
    write_state_file(path, read_state_file(path, N))
    assert path.read_bytes() == content


@all_kinds
def test_header_words_lie_where_llmc_has_them(path, shuffled, master):
    write_state_file(path, training_state(shuffled=shuffled, master=master))
    content = path.read_bytes()
    assert struct.unpack_from("<6i", content, 0) == (20240527, 1, 1, 0, int(master), int(shuffled))
    assert struct.unpack_from("<i", content, 4 * 10) == (1234,)
    assert struct.unpack_from("<2Q", content, 4 * 20) == (2**63 + 5, 2**40 + 7)
    assert struct.unpack_from("<2Q", content, 4 * 30) == (1, 4)
    words = struct.unpack_from("<256i", content)
    named = {*range(6), 10, *range(20, 24), *range(30, 34)}
    assert all(word == 0 for index, word in enumerate(words) if index not in named)


@all_kinds
def test_order_of_the_body(path, shuffled, master):
    state = training_state(shuffled=shuffled, master=master)
    write_state_file(path, state)
    body = state.m.tobytes() + state.v.tobytes() + (state.master.tobytes() if master else b"")
    if shuffled:
        twin = Mersenne(42)
        for _ in range(700):
            twin.draw()
        body += struct.pack("<Q3i", 3, *SHARDS) + struct.pack("<Q5i", 5, *SAMPLES) + twin.struct_bytes()
    assert path.read_bytes()[1024:] == body


@all_kinds
def test_size_of_the_file(path, shuffled, master):
    write_state_file(path, training_state(shuffled=shuffled, master=master))
    loader_bytes = 8 + 4 * 3 + 8 + 4 * 5 + 2520 if shuffled else 0
    assert path.stat().st_size == 1024 + 4 * N * (3 if master else 2) + loader_bytes


def test_generator_takes_2520_bytes():
    assert GENERATOR_STRUCT.itemsize == 2520


def test_published_size_of_the_124m_file_with_master_weights(path):
    path.write_bytes(header(20240527, 1, 1, 0, 1))
    assert "expected a training state file of 1493711872 bytes by its header, found 1024" in refusal(path, 124_475_904)


def test_fresh_rounding_streams_start_at_llmcs_seed(path):
    state = training_state(shuffled=False, master=False)
    write_state_file(path, TrainingState(state.step, state.m, state.v, state.loader))
    assert struct.unpack_from("<2Q", path.read_bytes(), 80) == (13371337, 13371337)


@pytest.mark.parametrize(("num_processes", "rank"), [(2, 0), (2, 1), (1, 1), (0, 0), (1, -1)])
def test_state_of_one_of_several_processes_is_refused(path, num_processes, rank):
    path.write_bytes(header(20240527, 1, num_processes, rank) + b"\0" * (8 * N))
    assert f"expected the state of rank 0 of 1 process, found rank {rank} of {num_processes}" in refusal(path)


@pytest.mark.parametrize(("master", "shuffled", "step"), [(2, 0, 0), (-1, 0, 0), (0, 2, 0), (0, 0, -1)])
def test_impossible_words_are_refused(path, master, shuffled, step):
    path.write_bytes(header(20240527, 1, 1, 0, master, shuffled, 0, 0, 0, 0, step) + b"\0" * (8 * N))
    expected = "expected master and shuffle words of 0 or 1 and a step >= 0"
    assert f"{expected}, found {master}, {shuffled}, {step}" in refusal(path)


def test_other_version_is_refused(path):
    path.write_bytes(header(20240527, 2, 1, 0))
    assert "expected a training state file of version 1, found version 2" in refusal(path)


@all_kinds
def test_state_of_a_model_of_another_size_is_refused(path, shuffled, master):
    write_state_file(path, training_state(shuffled=shuffled, master=master))
    for num_parameters in (1, N - 1, N + 1, 10 * N):
        assert "expected a training state file" in refusal(path, num_parameters)


@pytest.mark.parametrize(("change", "state"), [(-1, "truncated"), (1, "grown")])
@all_kinds
def test_one_byte_too_few_or_too_many_is_refused(path, shuffled, master, change, state):
    write_state_file(path, training_state(shuffled=shuffled, master=master))
    content = path.read_bytes()
    path.write_bytes((content + b"\0")[: len(content) + change])
    assert f"found {len(content) + change} bytes ({state})" in refusal(path)


@pytest.mark.parametrize("count", [0, 4, 2**31 - 1, 2**31, 2**62, 2**64 - 1])
def test_damaged_permutation_counts_are_refused(path, count):
    write_state_file(path, training_state(shuffled=True, master=False))
    content = bytearray(path.read_bytes())
    struct.pack_into("<Q", content, 1024 + 8 * N, count)
    path.write_bytes(content)
    refusal(path)


def test_shuffled_state_that_ends_before_its_permutations_is_refused(path):
    path.write_bytes(header(20240527, 1, 1, 0, 0, 1) + b"\0" * (8 * N))
    assert f"expected a training state file with a loader permutation at byte {1024 + 8 * N}, found" in refusal(path)


def test_state_that_is_not_shuffled_must_not_have_a_loader_part(path):
    write_state_file(path, training_state(shuffled=True, master=False))
    content = bytearray(path.read_bytes())
    struct.pack_into("<i", content, 4 * 5, 0)
    path.write_bytes(content)
    assert "(grown)" in refusal(path)
