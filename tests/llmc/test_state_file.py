"""llm.c's training state files."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

import numpy as np
import pytest

from gpt2_jax.buffer.layout import ParameterLayout
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2Config, config_from_descriptor
from gpt2_jax.llmc.loader import LoaderState
from gpt2_jax.llmc.random import GENERATOR_STRUCT, Mt19937
from gpt2_jax.llmc.state_file import ProcessState, TrainingState, num_processes_of, read_state_files, write_state_files
from tests.llmc.twins import Mersenne, header

CONFIG = GPT2Config(max_sequence_length=4, vocab_size=5, num_layers=2, num_heads=1, channels=4)
LAYOUT = CONFIG.layout
N = LAYOUT.num_parameters
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
    return TrainingState(1234, m, v, (ProcessState(loader, 2**63 + 5, 2**40 + 7),), weights if master else None)


def write(path: Path, state: TrainingState) -> None:
    write_state_files([path], state, LAYOUT)


def refusal(path: Path, layout: ParameterLayout = LAYOUT) -> str:
    with pytest.raises(Gpt2JaxError) as raised:
        read_state_files([path], layout)
    assert str(raised.value).startswith(f"{path}: expected ")
    assert "---> HINT: python scripts/train.py --resume" in str(raised.value)
    return str(raised.value)


all_kinds = pytest.mark.parametrize(("shuffled", "master"), [(False, False), (True, False), (False, True), (True, True)])


@all_kinds
def test_what_was_written_is_read(path, shuffled, master):
    written = training_state(shuffled=shuffled, master=master)
    write(path, written)
    read = read_state_files([path], LAYOUT)
    (process,) = read.processes
    assert (read.step, process.rounding_state, process.last_rounding_state) == (1234, 2**63 + 5, 2**40 + 7)
    np.testing.assert_array_equal(read.m, written.m)
    np.testing.assert_array_equal(read.v, written.v)
    assert (read.master is None) == (not master)
    if master:
        np.testing.assert_array_equal(read.master, written.master)
    assert (process.loader.shard_index, process.loader.sample_index) == (1, 4)
    if shuffled:
        assert process.loader.shard_permutation.tolist() == SHARDS
        assert process.loader.sample_permutation.tolist() == SAMPLES
        assert process.loader.generator.tobytes() == written.processes[0].loader.generator.tobytes()
    else:
        assert process.loader == LoaderState(1, 4)


@all_kinds
def test_file_that_is_read_and_written_again_has_the_same_bytes(path, shuffled, master):
    write(path, training_state(shuffled=shuffled, master=master))
    content = path.read_bytes()
    write(path, read_state_files([path], LAYOUT))
    assert path.read_bytes() == content


@all_kinds
def test_header_words_lie_where_llmc_has_them(path, shuffled, master):
    write(path, training_state(shuffled=shuffled, master=master))
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
    write(path, state)
    body = state.m.tobytes() + state.v.tobytes() + (state.master.tobytes() if master else b"")
    if shuffled:
        twin = Mersenne(42)
        for _ in range(700):
            twin.draw()
        body += struct.pack("<Q3i", 3, *SHARDS) + struct.pack("<Q5i", 5, *SAMPLES) + twin.struct_bytes()
    assert path.read_bytes()[1024:] == body


@all_kinds
def test_size_of_the_file(path, shuffled, master):
    write(path, training_state(shuffled=shuffled, master=master))
    loader_bytes = 8 + 4 * 3 + 8 + 4 * 5 + 2520 if shuffled else 0
    assert path.stat().st_size == 1024 + 4 * N * (3 if master else 2) + loader_bytes


def test_generator_takes_2520_bytes():
    assert GENERATOR_STRUCT.itemsize == 2520


def test_published_size_of_the_124m_file_with_master_weights(path):
    path.write_bytes(header(20240527, 1, 1, 0, 1))
    assert "expected a training state file of 1493711872 bytes by its header, found 1024" in refusal(
        path, config_from_descriptor("d12").layout
    )


def test_fresh_rounding_streams_start_at_llmcs_seed(path):
    state = training_state(shuffled=False, master=False)
    write(path, dataclasses.replace(state, processes=(ProcessState(state.processes[0].loader),)))
    assert struct.unpack_from("<2Q", path.read_bytes(), 80) == (13371337, 13371337)


@pytest.mark.parametrize("rank", [0, 1])
def test_state_of_one_of_two_processes_is_refused_alone(path, rank):
    path.write_bytes(header(20240527, 1, 2, rank) + b"\0" * (8 * N))
    assert "expected the state of one of 1 process(es), found one of 2" in refusal(path)


@pytest.mark.parametrize(("num_processes", "rank"), [(1, 1), (0, 0), (1, -1), (-1, -2)])
def test_impossible_ranks_are_refused(path, num_processes, rank):
    path.write_bytes(header(20240527, 1, num_processes, rank) + b"\0" * (8 * N))
    assert f"found rank {rank} of {num_processes}, 0, 0, 0" in refusal(path)


@pytest.mark.parametrize(("master", "shuffled", "step"), [(2, 0, 0), (-1, 0, 0), (0, 2, 0), (0, 0, -1)])
def test_impossible_words_are_refused(path, master, shuffled, step):
    path.write_bytes(header(20240527, 1, 1, 0, master, shuffled, 0, 0, 0, 0, step) + b"\0" * (8 * N))
    expected = "expected a rank below the number of processes, master and shuffle words of 0 or 1 and a step >= 0"
    assert f"{expected}, found rank 0 of 1, {master}, {shuffled}, {step}" in refusal(path)


def test_other_version_is_refused(path):
    path.write_bytes(header(20240527, 2, 1, 0))
    assert "expected a training state file of version 1, found version 2" in refusal(path)


@all_kinds
def test_state_of_a_model_of_another_size_is_refused(path, shuffled, master):
    write(path, training_state(shuffled=shuffled, master=master))
    for channels in (2, 3, 5, 12):
        other = dataclasses.replace(CONFIG, channels=channels).layout
        assert "expected a training state file" in refusal(path, other)


@pytest.mark.parametrize(("change", "state"), [(-1, "truncated"), (1, "grown")])
@all_kinds
def test_one_byte_too_few_or_too_many_is_refused(path, shuffled, master, change, state):
    write(path, training_state(shuffled=shuffled, master=master))
    content = path.read_bytes()
    path.write_bytes((content + b"\0")[: len(content) + change])
    assert f"found {len(content) + change} bytes ({state})" in refusal(path)


@pytest.mark.parametrize("count", [0, 4, 2**31 - 1, 2**31, 2**62, 2**64 - 1])
def test_damaged_permutation_counts_are_refused(path, count):
    write(path, training_state(shuffled=True, master=False))
    content = bytearray(path.read_bytes())
    struct.pack_into("<Q", content, 1024 + 8 * N, count)
    path.write_bytes(content)
    refusal(path)


def test_shuffled_state_that_ends_before_its_permutations_is_refused(path):
    path.write_bytes(header(20240527, 1, 1, 0, 0, 1) + b"\0" * (8 * N))
    assert f"expected a training state file with a loader permutation at byte {1024 + 8 * N}, found" in refusal(path)


def test_state_that_is_not_shuffled_must_not_have_a_loader_part(path):
    write(path, training_state(shuffled=True, master=False))
    content = bytearray(path.read_bytes())
    struct.pack_into("<i", content, 4 * 5, 0)
    path.write_bytes(content)
    assert "(grown)" in refusal(path)


def state_of_ranks(num_processes: int, *, shuffled: bool = True) -> TrainingState:
    """Each process has its own loader and its own generator of stochastic rounding."""
    state = training_state(shuffled=shuffled, master=True)
    loader = state.processes[0].loader
    processes = []
    for rank in range(num_processes):
        generator = Mt19937(42 + rank).to_struct() if shuffled else None
        processes.append(ProcessState(dataclasses.replace(loader, sample_index=rank, generator=generator), rank, 10 + rank))
    return dataclasses.replace(state, processes=tuple(processes))


def rank_paths(folder: Path, num_processes: int) -> list[Path]:
    return [folder / f"state_{rank}.bin" for rank in range(num_processes)]


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_states_of_several_ranks_are_merged_into_what_was_written(tmp_path, num_processes, zero, shuffled):
    state, paths = state_of_ranks(num_processes, shuffled=shuffled), rank_paths(tmp_path, num_processes)
    write_state_files(paths, state, LAYOUT, zero=zero)
    read = read_state_files(paths, LAYOUT)
    for name in ("m", "v", "master"):
        np.testing.assert_array_equal(getattr(read, name), getattr(state, name), err_msg=name)
    assert read.step == state.step
    for rank, (found, written) in enumerate(zip(read.processes, state.processes, strict=True)):
        assert num_processes_of(paths[rank]) == num_processes
        assert (found.rounding_state, found.last_rounding_state) == (rank, 10 + rank)
        assert found.loader.sample_index == rank
        if shuffled:
            assert found.loader.generator.tobytes() == written.loader.generator.tobytes()


def test_each_rank_keeps_its_part_of_every_layer_of_every_tensor(tmp_path):
    """llm.c: tensor i begins at its offset / ranks, layer l of it at l * s, and holds elements [r * s, (r + 1) * s)."""
    state, paths = state_of_ranks(4), rank_paths(tmp_path, 4)
    write_state_files(paths, state, LAYOUT, zero=True)
    for rank, path in enumerate(paths):
        part = np.fromfile(path, "<f4", N // 4, offset=1024)
        for tensor in LAYOUT.tensors:
            layers = tensor.num_layers
            s = tensor.size // layers // 4
            for layer in range(layers):
                start = tensor.offset + layer * 4 * s + rank * s
                place = tensor.offset // 4 + layer * s
                np.testing.assert_array_equal(part[place : place + s], state.m[start : start + s])


def test_a_number_of_processes_that_divides_no_layer_is_refused(tmp_path):
    with pytest.raises(Gpt2JaxError, match="divides the 512 elements of each layer of wte, found 3"):
        write_state_files(rank_paths(tmp_path, 3), state_of_ranks(3), LAYOUT, zero=True)


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    two, paths = state_of_ranks(2), rank_paths(tmp_path, 2)
    write_state_files(paths, two, LAYOUT, zero=True)
    for wrong in (paths[::-1], [paths[0], paths[0]]):
        with pytest.raises(Gpt2JaxError, match=r"expected the state of rank [01] of 2 process\(es\) at step 1234, found rank"):
            read_state_files(wrong, LAYOUT)
    for other in (
        dataclasses.replace(two, step=1235),
        dataclasses.replace(two, master=None),
        state_of_ranks(2, shuffled=False),
    ):
        others = [tmp_path / "other_0.bin", tmp_path / "other_1.bin"]
        write_state_files(others, other, LAYOUT, zero=True)
        with pytest.raises(Gpt2JaxError, match=r"other_1\.bin: expected the state of rank 1"):
            read_state_files([paths[0], others[1]], LAYOUT)
    write_state_files(others, two, LAYOUT)
    for mixed in ([paths[0], others[1]], [others[0], paths[1]]):
        with pytest.raises(Gpt2JaxError, match=r"1\.bin: expected buffers of \d+ elements as in rank 0's, found \d+"):
            read_state_files(mixed, LAYOUT)
