"""llm.c's data loader: its documented orders, and a twin in plain Python for all the others."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc.loader import LoaderState, TokenLoader
from gpt2_jax.llmc.token_shard import open_token_shard, write_token_shard
from tests.llmc.twins import LoaderTwin

# Three shards of 7, 3 and 5 samples of 2 * 4 tokens, each with a tail that is dropped; every token is another one.
B, T = 2, 4
SIZES = (7 * B * T + 1, 3 * B * T + 6, 6 * B * T)
ANY_ID = 2**16


def write_shards(folder: Path, sizes: tuple[int, ...] = SIZES) -> tuple[str, list[np.ndarray]]:
    """A pattern, and the shards that it names in the order of their names."""
    shards = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    for index, shard in enumerate(shards):
        write_token_shard(folder / f"shard_{index:02d}.bin", shard)
    return str(folder / "shard_*.bin"), shards


def loader_of(pattern: str, **options) -> TokenLoader:
    return TokenLoader(pattern, B, T, vocab_size=ANY_ID, **options)


def next_tokens(loader: TokenLoader) -> list[int]:
    """The B * T + 1 tokens of the next batch, whose targets are its inputs moved on by one."""
    x_BT, y_BT = loader.next_batch()
    assert x_BT.shape == y_BT.shape == (loader.batch_size, loader.sequence_length)
    assert x_BT.dtype == y_BT.dtype == np.int32
    tokens = [*x_BT.ravel().tolist(), y_BT.ravel().tolist()[-1]]
    assert y_BT.ravel().tolist() == tokens[1:]
    return tokens


def one_epoch(loader: TokenLoader) -> list[list[int]]:
    return [next_tokens(loader) for _ in range(loader.num_batches)]


def comparable(state: LoaderState) -> dict[str, object]:
    """A state's fields, with its arrays as bytes."""
    fields = dataclasses.asdict(state)
    return {name: value.tobytes() if isinstance(value, np.ndarray) else value for name, value in fields.items()}


@pytest.mark.parametrize(
    ("sequence_length", "num_samples", "first_samples"),
    [(1024, 74, [29, 58, 10, 4, 11, 25, 63, 56]), (64, 1192, [408, 791, 914, 1057, 81])],
)
def test_documented_shuffled_order_of_tiny_shakespeare(tmp_path, sequence_length, num_samples, first_samples):
    path = str(tmp_path / "tiny_shakespeare_train.bin")
    write_token_shard(path, np.arange(305_260) // (4 * sequence_length))
    loader = TokenLoader(path, 4, sequence_length, vocab_size=50257, shuffle=True)
    assert (loader.num_batches, loader.num_tokens) == (num_samples, 305_260)
    batches = [loader.next_batch() for _ in range(num_samples)]
    samples = [int(x_BT[0, 0]) for x_BT, _ in batches]
    assert samples[: len(first_samples)] == first_samples
    assert sorted(samples) == list(range(num_samples))
    assert all((x_BT == sample).all() for (x_BT, _), sample in zip(batches, samples, strict=True))


def test_sequential_order_goes_through_all_shards_and_starts_again(tmp_path):
    pattern, shards = write_shards(tmp_path)
    loader = loader_of(pattern)
    assert (loader.num_batches, loader.num_tokens) == (15, sum(SIZES))
    epoch = [shard[i : i + 9].tolist() for shard, n in zip(shards, (7, 3, 5), strict=True) for i in range(0, 8 * n, 8)]
    assert [next_tokens(loader) for _ in range(40)] == (epoch * 3)[:40]


def test_shards_are_taken_in_the_order_of_their_names(tmp_path):
    for name, token in (("b_2", 2), ("a", 0), ("b_10", 1), ("c", 3)):
        write_token_shard(tmp_path / f"{name}.bin", np.full(B * T + 1, token))
    loader = loader_of(str(tmp_path / "*.bin"))
    assert [next_tokens(loader)[0] for _ in range(5)] == [0, 1, 2, 3, 0]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("rank", "num_processes"), [(0, 1), (0, 2), (1, 2), (2, 3)])
def test_many_epochs_are_those_of_the_twin(tmp_path, shuffle, rank, num_processes):
    pattern, shards = write_shards(tmp_path, tuple(size * num_processes for size in SIZES))
    loader = loader_of(pattern, shuffle=shuffle, process_rank=rank, num_processes=num_processes)
    twin = LoaderTwin(shards, B, T, shuffle=shuffle, rank=rank, num_processes=num_processes)
    for _ in range(5 * loader.num_batches + 3):
        assert next_tokens(loader) == twin.next_tokens()


@given(
    sizes=st.lists(st.integers(5, 40), min_size=1, max_size=4).map(tuple),
    shuffle=st.booleans(),
    shape=st.sampled_from([(1, 1), (1, 4), (2, 2)]),
)
def test_any_shards_are_read_as_the_twin_reads_them(tmp_path_factory, sizes, shuffle, shape):
    pattern, shards = write_shards(tmp_path_factory.mktemp("shards"), sizes)
    loader = TokenLoader(pattern, *shape, vocab_size=ANY_ID, shuffle=shuffle)
    twin = LoaderTwin(shards, *shape, shuffle=shuffle)
    for _ in range(2 * loader.num_batches + 1):
        assert next_tokens(loader) == twin.next_tokens()


@pytest.mark.parametrize("shuffle", [False, True])
def test_processes_together_see_every_token_once_an_epoch(tmp_path, shuffle):
    pattern, shards = write_shards(tmp_path, (3 * 5 * B * T + 20, 3 * 2 * B * T + 1))
    loaders = [loader_of(pattern, shuffle=shuffle, process_rank=rank, num_processes=3) for rank in range(3)]
    for _ in range(2):
        inputs = [token for loader in loaders for tokens in one_epoch(loader) for token in tokens[:-1]]
        assert sorted(inputs) == [*shards[0][: 3 * 5 * B * T].tolist(), *shards[1][: 3 * 2 * B * T].tolist()]


def test_epochs_are_shuffled_differently(tmp_path):
    loader = loader_of(write_shards(tmp_path)[0], shuffle=True)
    first, second = one_epoch(loader), one_epoch(loader)
    assert first != second
    assert sorted(first) == sorted(second)


def test_reset_of_a_sequential_loader_is_a_new_start(tmp_path):
    pattern, _ = write_shards(tmp_path)
    loader = loader_of(pattern)
    for _ in range(9):
        loader.next_batch()
    loader.reset()
    fresh = loader_of(pattern)
    assert [next_tokens(loader) for _ in range(20)] == [next_tokens(fresh) for _ in range(20)]


@pytest.mark.parametrize("shuffle", [False, True])
def test_loader_restored_at_any_batch_continues_identically(tmp_path, shuffle):
    """Over two epochs of three shards; every state is used only after the loader has moved on."""
    pattern, _ = write_shards(tmp_path)
    loader = loader_of(pattern, shuffle=shuffle)
    states, batches = [], []
    for _ in range(2 * loader.num_batches + 2):
        states.append(loader.state())
        batches.append(next_tokens(loader))
    for position, state in enumerate(states):
        restored = loader_of(pattern, shuffle=shuffle)
        restored.restore(state)
        assert comparable(restored.state()) == comparable(state)
        assert [next_tokens(restored) for _ in batches[position:]] == batches[position:]
        assert comparable(restored.state()) == comparable(loader.state())


def test_state_holds_the_indices_that_llmc_saves(tmp_path):
    """After 8 of 7 + 3 + 5 samples in order: shard 1, and sample 1 of it is the next one."""
    pattern, shards = write_shards(tmp_path)
    loader = loader_of(pattern)
    for _ in range(8):
        loader.next_batch()
    assert loader.state() == LoaderState(1, 1)

    shuffled, twin = loader_of(pattern, shuffle=True), LoaderTwin(shards, B, T, shuffle=True)
    for _ in range(8):
        shuffled.next_batch()
        twin.next_tokens()
    state = shuffled.state()
    assert (state.shard_index, state.sample_index) == (twin.place, twin.sample)
    assert state.shard_permutation.tolist() == twin.shard_order
    assert state.sample_permutation.tolist() == twin.sample_order
    assert state.generator.tobytes() == twin.generator.struct_bytes()


def test_restored_loader_leaves_the_state_as_it_is(tmp_path):
    pattern, _ = write_shards(tmp_path)
    loader = loader_of(pattern, shuffle=True)
    state, same = loader.state(), loader.state()
    loader.restore(state)
    for _ in range(40):
        loader.next_batch()
    assert comparable(state) == comparable(same)


@pytest.mark.parametrize("shuffle", [False, True])
def test_state_with_the_other_shuffling_is_refused(tmp_path, shuffle):
    pattern, _ = write_shards(tmp_path)
    state = loader_of(pattern, shuffle=not shuffle).state()
    message = f"expected one {'with' if shuffle else 'without'} shuffling, found the other"
    with pytest.raises(Gpt2JaxError, match=message):
        loader_of(pattern, shuffle=shuffle).restore(state)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("shard_index", [-1, 3, 2**64 - 1])
def test_state_with_a_shard_index_out_of_range_is_refused(tmp_path, shuffle, shard_index):
    loader = loader_of(write_shards(tmp_path)[0], shuffle=shuffle)
    state = dataclasses.replace(loader.state(), shard_index=shard_index)
    with pytest.raises(Gpt2JaxError, match=f"expected a shard index below 3, found {shard_index}"):
        loader.restore(state)


@pytest.mark.parametrize("sample_index", [-1, 8, 2**64 - 1])
def test_state_with_a_sample_index_out_of_range_is_refused(tmp_path, sample_index):
    loader = loader_of(write_shards(tmp_path)[0])
    loader.restore(LoaderState(0, 7))
    with pytest.raises(Gpt2JaxError, match=f"expected a sample index of at most 7, found {sample_index}"):
        loader.restore(LoaderState(0, sample_index))


def test_sequential_state_of_longer_data_is_refused(tmp_path):
    pattern, _ = write_shards(tmp_path)
    with pytest.raises(Gpt2JaxError, match="expected a sample index of at most 3, found 4"):
        loader_of(pattern).restore(LoaderState(1, 4))


@pytest.mark.parametrize("sizes", [SIZES[:2], (*SIZES, 20)])
def test_shuffled_state_of_another_number_of_shards_is_refused(tmp_path, sizes):
    (tmp_path / "other").mkdir()
    loader = loader_of(write_shards(tmp_path)[0], shuffle=True)
    state = loader_of(write_shards(tmp_path / "other", sizes)[0], shuffle=True).state()
    with pytest.raises(Gpt2JaxError, match=f"expected a permutation of 3 shards, found {len(sizes)} entries that are none"):
        loader.restore(state)


def test_shuffled_state_of_shards_of_another_length_is_refused(tmp_path):
    (tmp_path / "other").mkdir()
    loader = loader_of(write_shards(tmp_path, (57, 57))[0], shuffle=True)
    state = loader_of(write_shards(tmp_path / "other", (49, 49))[0], shuffle=True).state()
    with pytest.raises(Gpt2JaxError, match="expected a permutation of 7 samples, found 6 entries that are none"):
        loader.restore(state)


@pytest.mark.parametrize(("field", "message"), [("shard_permutation", "3 shards, found 3"), ("sample_permutation", "samples")])
def test_state_whose_permutation_names_one_entry_twice_is_refused(tmp_path, field, message):
    loader = loader_of(write_shards(tmp_path)[0], shuffle=True)
    state = loader.state()
    getattr(state, field)[0] = getattr(state, field)[1]
    with pytest.raises(Gpt2JaxError, match=rf"expected a permutation of .*{message}"):
        loader.restore(state)


def test_shard_that_is_too_small_for_one_batch_is_refused_by_name(tmp_path):
    pattern, _ = write_shards(tmp_path, (20, B * T, 20))
    with pytest.raises(Gpt2JaxError) as raised:
        loader_of(pattern)
    expected = "shard_01.bin: expected at least 9 tokens for one batch (1 process(es) x 2 x 4 + 1), found 8"
    assert expected in str(raised.value)


def test_smallest_shard_holds_one_token_more_than_a_batch_of_all_processes(tmp_path):
    pattern, _ = write_shards(tmp_path, (2 * B * T + 1,))
    assert loader_of(pattern, num_processes=2, process_rank=1).num_batches == 1
    with pytest.raises(Gpt2JaxError, match=f"expected at least {3 * B * T + 1} tokens"):
        loader_of(pattern, num_processes=3)


def test_shard_that_is_no_shard_is_refused_at_the_start(tmp_path):
    pattern, _ = write_shards(tmp_path)
    (tmp_path / "shard_99.bin").write_bytes(b"x" * 2000)
    with pytest.raises(Gpt2JaxError, match=r"shard_99\.bin: expected a token shard"):
        loader_of(pattern)


def test_pattern_without_a_match_is_refused(tmp_path):
    write_shards(tmp_path)
    pattern = str(tmp_path / "other_*.bin")
    with pytest.raises(Gpt2JaxError) as raised:
        loader_of(pattern)
    assert f"{pattern}: expected at least one token shard, found no file of that name or pattern" in str(raised.value)


def test_folder_in_place_of_a_pattern_is_refused(tmp_path):
    write_shards(tmp_path)
    with pytest.raises(Gpt2JaxError, match="expected a token shard, found a folder"):
        loader_of(str(tmp_path))


def test_path_with_pattern_characters_in_it_is_taken_literally(tmp_path):
    (tmp_path / "run[1]").mkdir()
    write_shards(tmp_path / "run[1]")
    loader = loader_of(str(tmp_path / "run[1]" / "shard_01.bin"))
    assert next_tokens(loader)[0] == SIZES[0]


@pytest.mark.parametrize("position", [0, 13, 3 * B * T])
def test_token_beyond_the_vocabulary_is_refused_with_its_shard_and_position(tmp_path, position):
    """The first token of a shard, one in its middle, and the last one, which is nothing but a target."""
    tokens = np.full(3 * B * T + 1, 299)
    write_token_shard(tmp_path / "a.bin", tokens)
    tokens[position] = 300
    write_token_shard(tmp_path / "b.bin", tokens)
    loader = TokenLoader(str(tmp_path / "*.bin"), B, T, vocab_size=300)
    with pytest.raises(Gpt2JaxError, match=rf"/b\.bin: expected token ids below 300, found 300 at token {position}\n"):
        one_epoch(loader)


def test_first_of_several_tokens_beyond_the_vocabulary_is_the_one_in_the_message(tmp_path):
    write_token_shard(tmp_path / "a.bin", np.array([1, 2, 300, 3, 400, 4, 5, 6, 7]))
    loader = TokenLoader(str(tmp_path / "a.bin"), B, T, vocab_size=300)
    with pytest.raises(Gpt2JaxError, match="found 300 at token 2"):
        loader.next_batch()


def test_shuffled_loader_names_the_shard_that_is_really_open(tmp_path):
    for name, token in (("a", 1), ("b", 500), ("c", 1), ("d", 1)):
        write_token_shard(tmp_path / f"{name}.bin", np.full(B * T + 1, token))
    loader = TokenLoader(str(tmp_path / "*.bin"), B, T, vocab_size=300, shuffle=True)
    with pytest.raises(Gpt2JaxError, match=r"/b\.bin: expected token ids below 300, found 500 at token 0"):
        one_epoch(loader)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("skipped", [0, 1, 7, 14, 15, 16, 40])
def test_skipping_batches_is_taking_them(tmp_path, shuffle, skipped):
    pattern, _ = write_shards(tmp_path)
    taking, skipping = loader_of(pattern, shuffle=shuffle), loader_of(pattern, shuffle=shuffle)
    for _ in range(skipped):
        taking.next_batch()
    skipping.skip(skipped)
    assert comparable(skipping.state()) == comparable(taking.state())
    assert [next_tokens(skipping) for _ in range(20)] == [next_tokens(taking) for _ in range(20)]


@pytest.mark.parametrize("shuffle", [False, True])
def test_last_place_is_where_the_batch_was_read(tmp_path, shuffle):
    pattern, _ = write_shards(tmp_path, tuple(2 * size for size in SIZES))
    loader = loader_of(pattern, shuffle=shuffle, process_rank=1, num_processes=2)
    for _ in range(20):
        tokens = next_tokens(loader)
        shard = open_token_shard(loader.last_place.path)
        assert shard[loader.last_place.token : loader.last_place.token + B * T + 1].tolist() == tokens


@pytest.mark.parametrize(
    ("pattern", "found", "hint"),
    [
        ("mine_trian.bin", "; there is mine_train.bin in", "python scripts/prepare_data.py --source TEXT_FILE"),
        ("dta/mine_train.bin", "; there is data in", "python scripts/prepare_data.py --source TEXT_FILE"),
        (
            "data/fineweb10B/fineweb_train_*.bin",
            "",
            "python scripts/prepare_data.py --source fineweb --tokens 10B --output-dir ",
        ),
        ("data/edu_fineweb100B/edu_fineweb_val_*.bin", "", "python scripts/prepare_data.py --source edu_fineweb-shards "),
        ("data/kjv_train.bin", "", "python scripts/prepare_data.py"),
        ("dev/data/tinyshakespeare/tiny_shakespeare_train.bin", "", "python scripts/prepare_data.py --source tinyshakespeare"),
    ],
)
def test_missing_shards_say_what_there_is_and_how_to_get_them(tmp_path, pattern, found, hint):
    (tmp_path / "data").mkdir()
    (tmp_path / "mine_train.bin").touch()
    with pytest.raises(Gpt2JaxError) as raised:
        TokenLoader(str(tmp_path / pattern), 1, 4, vocab_size=50)
    assert f"found no file of that name or pattern{found}" in raised.value.problem
    assert raised.value.hint.startswith(hint)
    assert ("edu_fineweb-shards" in raised.value.hint) == ("edu" in pattern)


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("data/mine_trian.bin", "data/mine_train.bin"),
        ("dta/mine_train.bin", "data/mine_train.bin"),
        ("dta/mine_train*.bin", "'data/mine_train*.bin'"),
        ("data/mine_vla.bin", "data/mine_val.bin"),
        ("data/pile_000001.bin", None),
        ("data/mine_valid_train.bin", None),  # not the validation shard
    ],
)
def test_shards_that_are_there_are_named_in_place_of_mistyped_ones(tmp_path, monkeypatch, pattern, meant):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        write_token_shard(tmp_path / "data" / f"mine_{split}.bin", np.arange(40))
    with pytest.raises(Gpt2JaxError) as raised:
        TokenLoader(pattern, 1, 4, vocab_size=50)
    if meant is None:
        assert raised.value.hint.startswith("python scripts/prepare_data.py")
    else:
        assert raised.value.hint == f"{meant}   (the nearest name of token shards)"
        TokenLoader(shlex.split(meant)[0], 1, 4, vocab_size=50)


def test_validation_shards_never_stand_for_missing_training_shards(tmp_path):
    write_token_shard(tmp_path / "mine_val.bin", np.arange(40))
    with pytest.raises(Gpt2JaxError) as raised:
        TokenLoader(str(tmp_path / "mine_train.bin"), 1, 4, vocab_size=50)
    assert raised.value.hint.startswith("python scripts/prepare_data.py --source TEXT_FILE")
