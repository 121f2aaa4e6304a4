"""llm.c's token shards."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc.token_shard import open_token_shard, write_token_shard
from tests.llmc.twins import header


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shard.bin"


def refusal(path: Path) -> str:
    with pytest.raises(Gpt2JaxError) as raised:
        open_token_shard(path)
    assert str(raised.value).startswith(f"{path}: expected ")
    assert "---> HINT: python scripts/prepare_data.py" in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.uint64])
def test_bytes_of_a_shard(path, dtype):
    write_token_shard(path, np.array([50256, 0, 65535, 258], dtype=dtype))
    assert path.read_bytes() == header(20240520, 1, 4) + struct.pack("<4H", 50256, 0, 65535, 258)


def test_shard_that_is_read_and_written_again_has_the_same_bytes(path):
    write_token_shard(path, np.random.default_rng(0).integers(0, 2**16, 1001))
    content = path.read_bytes()
    write_token_shard(path, open_token_shard(path).copy())
    assert path.read_bytes() == content


def test_size_of_the_tiny_shakespeare_shards(path):
    for num_tokens, num_bytes in ((32_768, 66_560), (305_260, 611_544)):
        write_token_shard(path, np.zeros(num_tokens, np.uint16))
        assert path.stat().st_size == num_bytes
        assert len(open_token_shard(path)) == num_tokens


def test_opened_shard_is_a_row_of_uint16_that_cannot_be_written_to(path):
    write_token_shard(path, np.arange(10))
    tokens = open_token_shard(path)
    assert (tokens.shape, tokens.dtype, tokens.tolist()) == ((10,), np.dtype(np.uint16), list(range(10)))
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


def test_every_second_token_of_an_array_can_be_written(path):
    write_token_shard(path, np.arange(10)[::2])
    assert open_token_shard(path).tolist() == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("bad", [-1, 65536, 2**40])
def test_ids_that_16_bits_cannot_hold_are_not_written(path, bad):
    with pytest.raises(Gpt2JaxError, match=r"expected token ids in \[0, 65536\), found .*" + str(bad)):
        write_token_shard(path, np.array([5, bad, 7]))
    assert not path.exists()


@pytest.mark.parametrize(
    ("shape", "found"), [((0,), "none"), ((2, 3), r"shape \(2, 3\)"), ((2**31,), "at least 2147483648\n---> HINT: split")]
)
def test_rows_that_the_header_cannot_count_are_not_written(path, shape, found):
    tokens = np.broadcast_to(np.uint16(0), shape)
    with pytest.raises(Gpt2JaxError, match=f"expected a row of 1 to 2147483647 tokens, found {found}"):
        write_token_shard(path, tokens)
    assert not path.exists()


@pytest.mark.parametrize("count", [0, -1, -(2**31)])
def test_count_below_one_is_refused(path, count):
    path.write_bytes(header(20240520, 1, count))
    assert f"expected at least 1 token, found {count} in the header" in refusal(path)


@pytest.mark.parametrize(("change", "state"), [(-2, "truncated"), (-1, "truncated"), (1, "grown"), (2, "grown")])
def test_size_that_does_not_fit_the_count_is_refused(path, change, state):
    path.write_bytes(header(20240520, 1, 10) + b"\0" * (20 + change))
    assert f"expected a token shard of 1044 bytes by its header, found {1044 + change} bytes ({state})" in refusal(path)


def test_shard_of_llama_3_is_named(path):
    path.write_bytes(header(20240801, 7, 2) + b"\0" * 8)
    assert "expected a token shard (magic 20240520), found magic 20240801 (a Llama-3 token shard)" in refusal(path)


def test_other_version_is_refused(path):
    path.write_bytes(header(20240520, 2, 1) + b"\0\0")
    assert "expected a token shard of version 1, found version 2" in refusal(path)
