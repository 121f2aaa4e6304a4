"""llm.c's debug state files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2Config, config_from_descriptor
from gpt2_jax.llmc.debug_state import DebugState, read_debug_state, write_debug_state
from tests.conftest import TINY
from tests.llmc.twins import header

B, T, V = 3, 5, 203


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "debug_state.bin"


@pytest.fixture
def state(tiny_layout) -> DebugState:
    random = np.random.default_rng(5)
    tokens = random.integers(0, V, (B, T + 1)).astype(np.int32)
    tokens[0, :2] = 0, V - 1
    logits = random.normal(size=(B, T, V)).astype(np.float32)
    grads = random.normal(size=tiny_layout.num_parameters).astype(np.float32)
    return DebugState(tokens[:, :-1], tokens[:, 1:], logits, np.float32(5.25), grads)


def refusal(path: Path, config: GPT2Config = TINY) -> str:
    with pytest.raises(Gpt2JaxError) as raised:
        read_debug_state(path, config)
    assert str(raised.value).startswith(f"{path}: expected ")
    assert "---> HINT: python scripts/write_starter_pack.py" in str(raised.value)
    return str(raised.value)


def test_what_was_written_is_read(path, state):
    write_debug_state(path, state)
    for read, written in zip(read_debug_state(path, TINY), state, strict=True):
        assert read.dtype == written.dtype
        np.testing.assert_array_equal(read, written)


def test_file_that_is_read_and_written_again_has_the_same_bytes(path, state):
    write_debug_state(path, state)
    content = path.read_bytes()
    write_debug_state(path, read_debug_state(path, TINY))
    assert path.read_bytes() == content


def test_header_and_the_order_of_the_body(path, state):
    write_debug_state(path, state)
    parts = [state.x_BT, state.y_BT, state.logits_BTV, np.float32(5.25), state.grads]
    assert path.read_bytes() == header(20240327, 2, B, T) + b"".join(part.tobytes() for part in parts)


def test_inputs_of_other_types_are_written_as_the_format_has_them(path, state):
    logits = state.logits_BTV.astype(np.float64)
    wide = DebugState(state.x_BT.astype(np.int64), state.y_BT.astype(np.uint16), logits, 5.25, state.grads)
    write_debug_state(path, state)
    content = path.read_bytes()
    write_debug_state(path, wide)
    assert path.read_bytes() == content


def test_published_size_of_the_124m_file(path):
    path.write_bytes(header(20240327, 2, 4, 64))
    message = refusal(path, config_from_descriptor("d12"))
    assert "expected a debug state file for this model of 549369860 bytes by its header, found 1024 bytes" in message


def test_version_1_is_refused(path):
    path.write_bytes(header(20240327, 1, B, T))
    assert "expected a debug state file of version 2, found version 1" in refusal(path)


@pytest.mark.parametrize(("batch_size", "length"), [(0, 5), (-1, 5), (3, 0), (3, 17), (3, -5)])
def test_impossible_batch_sizes_are_refused(path, batch_size, length):
    path.write_bytes(header(20240327, 2, batch_size, length))
    assert f"expected batch size >= 1 and sequence length 1 to 16, found {batch_size} and {length}" in refusal(path)


@pytest.mark.parametrize(("change", "state_of_file"), [(-1, "truncated"), (1, "grown")])
def test_one_byte_too_few_or_too_many_is_refused(path, state, change, state_of_file):
    write_debug_state(path, state)
    content = path.read_bytes()
    path.write_bytes((content + b"\0")[: len(content) + change])
    assert f"found {len(content) + change} bytes ({state_of_file})" in refusal(path)


def test_state_of_another_model_is_refused(path, state):
    write_debug_state(path, state)
    deeper = GPT2Config(max_sequence_length=16, vocab_size=V, num_layers=3, num_heads=4, channels=32)
    assert "expected a debug state file for this model of" in refusal(path, deeper)


@pytest.mark.parametrize("bad", [-1, V])
@pytest.mark.parametrize("field", ["x_BT", "y_BT"])
def test_token_ids_beyond_the_vocabulary_are_refused(path, state, field, bad):
    tokens = getattr(state, field).copy()
    tokens[1, 2] = bad
    write_debug_state(path, state._replace(**{field: tokens}))
    assert f"expected token ids in [0, {V}), found" in refusal(path)
    assert str(bad) in refusal(path)
