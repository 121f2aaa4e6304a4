"""llm.c's model files: versions 3 and 5 written and read, 1 and 4 read, everything else refused."""

from __future__ import annotations

import shlex
import struct
from pathlib import Path

import numpy as np
import pytest

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2Config, config_from_descriptor
from gpt2_jax.llmc.model_file import read_model_config, read_model_file, write_model_file
from tests.conftest import TINY
from tests.llmc.twins import header

# TINY's header: magic, version, positions, tokens, layers, heads, channels, rows of wte.
TINY_WORDS = [20240326, 3, 16, 203, 2, 4, 32, 256]
V, VP, T, L, C = 203, 256, 16, 2, 32
TENSORS = [
    ("wte", VP * C),
    ("wpe", T * C),
    ("ln1w", L * C),
    ("ln1b", L * C),
    ("qkvw", L * 3 * C * C),
    ("qkvb", L * 3 * C),
    ("attprojw", L * C * C),
    ("attprojb", L * C),
    ("ln2w", L * C),
    ("ln2b", L * C),
    ("fcw", L * 4 * C * C),
    ("fcb", L * 4 * C),
    ("fcprojw", L * C * 4 * C),
    ("fcprojb", L * C),
    ("lnfw", C),
    ("lnfb", C),
]
N = sum(size for _, size in TENSORS)


def tiny_header(**changes: int) -> bytes:
    names = ["magic", "version", "positions", "tokens", "layers", "heads", "channels", "rows"]
    return header(*[changes.get(name, word) for name, word in zip(names, TINY_WORDS, strict=True)])


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Rounded to nearest even with integers alone."""
    bits = values.astype("<f4").view("<u4").astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def from_bfloat16_bits(bits: np.ndarray) -> np.ndarray:
    return (bits.astype("<u4") << 16).view("<f4")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.bin"


def refusal(path: Path) -> str:
    """The error of reading, which is the same for the sizes alone."""
    with pytest.raises(Gpt2JaxError) as raised:
        read_model_config(path)
    with pytest.raises(Gpt2JaxError) as raised_by_file:
        read_model_file(path)
    assert str(raised.value) == str(raised_by_file.value)
    assert str(path) in str(raised.value)
    assert "---> HINT: curl -fL --create-dirs -o 'gpt2/#1' 'https://huggingface.co/openai-community/gpt2/" in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(("dtype", "version", "bytes_per_element"), [("float32", 3, 4), ("bfloat16", 5, 2)])
def test_header_words_and_size_of_a_written_file(path, tiny_params, dtype, version, bytes_per_element):
    write_model_file(path, TINY, tiny_params, dtype)
    content = path.read_bytes()
    assert content[:1024] == tiny_header(version=version)
    assert len(content) == 1024 + bytes_per_element * N


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_file_that_is_read_and_written_again_has_the_same_bytes(path, tiny_params, dtype):
    write_model_file(path, TINY, tiny_params, dtype)
    content = path.read_bytes()
    config, params = read_model_file(path)
    write_model_file(path, config, params, dtype)
    assert config == TINY
    assert path.read_bytes() == content


def test_version_3_holds_the_flat_buffer_bit_for_bit(path, tiny_params):
    write_model_file(path, TINY, tiny_params)
    assert path.read_bytes()[1024:] == struct.pack(f"<{N}f", *tiny_params.tolist())
    assert read_model_file(path)[1].tobytes() == tiny_params.tobytes()


def test_body_has_the_16_tensors_in_llmcs_order(path, tiny_layout, tiny_params):
    write_model_file(path, TINY, tiny_params)
    body, start = np.frombuffer(path.read_bytes()[1024:], "<f4"), 0
    tensors = tiny_layout.views(tiny_params)
    for name, size in TENSORS:
        np.testing.assert_array_equal(tensors[name].ravel(), body[start : start + size], err_msg=name)
        start += size
    assert start == body.size


def test_version_5_holds_every_tensor_rounded_to_nearest_even(path, tiny_params):
    write_model_file(path, TINY, tiny_params, "bfloat16")
    bits = bfloat16_bits(tiny_params)
    assert path.read_bytes()[1024:] == bits.tobytes()
    np.testing.assert_array_equal(read_model_file(path)[1], from_bfloat16_bits(bits))


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        (1 + 2**-8, 0x3F80),  # half way, down to the even neighbour
        (1 + 3 * 2**-8, 0x3F82),  # half way, up to the even neighbour
        (1 + 2**-8 + 2**-20, 0x3F81),
        (1 + 2**-8 - 2**-20, 0x3F80),
        (-(1 + 3 * 2**-8), 0xBF82),
        (2 - 2**-9, 0x4000),  # carries into the exponent
        (float("inf"), 0x7F80),
    ],
)
def test_bfloat16_rounding_of_single_values(path, tiny_params, value, bits):
    params = tiny_params.copy()
    params[-1] = value
    write_model_file(path, TINY, params, "bfloat16")
    assert struct.unpack("<H", path.read_bytes()[-2:]) == (bits,)


def test_read_parameters_are_a_buffer_of_float32_that_can_be_written_to(path, tiny_params):
    for dtype in ("float32", "bfloat16"):
        write_model_file(path, TINY, tiny_params, dtype)
        params = read_model_file(path)[1]
        assert (params.shape, params.dtype) == ((N,), np.dtype(np.float32))
        params[0] = 1


def test_version_1_has_no_padding_rows_and_gets_zeros(path, tiny_params):
    without_padding = np.concatenate([tiny_params[: V * C], tiny_params[VP * C :]])
    path.write_bytes(tiny_header(version=1, rows=0) + without_padding.astype("<f4").tobytes())
    config, params = read_model_file(path)
    assert config == read_model_config(path) == TINY
    np.testing.assert_array_equal(params, tiny_params)


def test_version_4_mixes_float32_layernorms_into_bfloat16(path, tiny_params):
    body, expected, start = b"", np.empty(N, np.float32), 0
    for name, size in TENSORS:
        values = tiny_params[start : start + size]
        if name.startswith("ln"):
            body += values.astype("<f4").tobytes()
            expected[start : start + size] = values
        else:
            body += bfloat16_bits(values).tobytes()
            expected[start : start + size] = from_bfloat16_bits(bfloat16_bits(values))
        start += size
    path.write_bytes(tiny_header(version=4) + body)
    config, params = read_model_file(path)
    assert config == read_model_config(path) == TINY
    np.testing.assert_array_equal(params, expected)


def test_version_2_is_refused(path):
    path.write_bytes(tiny_header(version=2) + b"\0" * (2 * N))
    assert "expected a model file of version 3 or 5 or 1 or 4, found version 2" in refusal(path)


def test_version_3_of_the_one_day_without_padding_is_refused(path):
    path.write_bytes(tiny_header(rows=0) + b"\0" * (4 * N))
    assert "expected a padded vocabulary of 256 rows for 203 tokens, found 0" in refusal(path)


@pytest.mark.parametrize(
    ("descriptor", "num_parameters", "float32_bytes", "bfloat16_bytes"),
    [
        ("d6", 30_357_504, 121_431_040, 60_716_032),
        ("d12", 124_475_904, 497_904_640, 248_952_832),
        ("d48", 1_557_686_400, 6_230_746_624, 3_115_373_824),
    ],
)
def test_published_sizes_of_the_gpt2_models(path, descriptor, num_parameters, float32_bytes, bfloat16_bytes):
    config = config_from_descriptor(descriptor)
    assert config.layout.num_parameters == num_parameters
    words = (1024, 50257, config.num_layers, config.num_heads, config.channels, 50304)
    path.write_bytes(header(20240326, 3, *words))
    assert f"expected a model file of version 3 of {float32_bytes} bytes by its header, found 1024" in refusal(path)
    path.write_bytes(header(20240326, 5, *words))
    assert f"expected a model file of version 5 of {bfloat16_bytes} bytes by its header, found 1024" in refusal(path)


@pytest.mark.parametrize(("change", "state"), [(-1, "truncated"), (1, "grown")])
@pytest.mark.parametrize(
    ("version", "body_bytes"),
    [(1, 4 * (N - (VP - V) * C)), (3, 4 * N), (4, 2 * N + 2 * (4 * L * C + 2 * C)), (5, 2 * N)],
)
def test_one_byte_too_few_or_too_many_is_refused(path, version, body_bytes, change, state):
    path.write_bytes(tiny_header(version=version) + b"\0" * (body_bytes + change))
    expected = f"of version {version} of {1024 + body_bytes} bytes by its header, found {1024 + body_bytes + change} bytes"
    assert f"{expected} ({state})" in refusal(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": 0}, "max_sequence_length: expected at least 1, found 0"),
        ({"tokens": -203}, "vocab_size: expected at least 1, found -203"),
        ({"layers": 0}, "num_layers: expected at least 1, found 0"),
        ({"heads": 0}, "num_heads: expected at least 1, found 0"),
        ({"channels": -32}, "channels: expected at least 1, found -32"),
        ({"heads": 5}, "expected channels to be a multiple of num_heads, found 32 channels and 5 heads"),
        ({"rows": 203}, "expected a padded vocabulary of 256 rows for 203 tokens, found 203"),
    ],
)
def test_impossible_sizes_in_the_header_are_refused(path, changes, message):
    path.write_bytes(tiny_header(**changes) + b"\0" * (4 * N))
    assert message in refusal(path)


def test_size_of_an_impossibly_large_model_is_reported_exactly(path):
    channels = 2**31 - 4
    path.write_bytes(tiny_header(channels=channels))
    num_parameters = (VP + T + 13 * L + 2) * channels + 12 * L * channels**2
    assert f"expected a model file of version 3 of {1024 + 4 * num_parameters} bytes by its header" in refusal(path)


def test_sizes_that_agree_with_the_file_only_modulo_2_to_the_64_are_refused(path):
    words = {"positions": 293_788_664, "tokens": 128, "layers": 362_465_405, "heads": 1, "channels": 1_737_226_979}
    path.write_bytes(tiny_header(**words, rows=128) + b"\0" * (4 * 32_469))
    assert "(truncated)" in refusal(path)


@pytest.mark.parametrize("position", [V * C, VP * C - 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_padding_rows_that_are_not_zero_are_refused(path, tiny_params, dtype, position):
    params = tiny_params.copy()
    params[position] = 2**-20
    write_model_file(path, TINY, params, dtype)
    with pytest.raises(Gpt2JaxError, match="expected zeros in the padding rows 203 to 255 of wte"):
        read_model_file(path)


@pytest.mark.parametrize(
    "bits",
    [0x7FC00000, 0x7F800001],
)
def test_nan_in_the_padding_rows_is_refused_without_a_warning(path, tiny_params, bits):
    params = tiny_params.copy()
    params.view(np.uint32)[V * C] = bits
    write_model_file(path, TINY, params)
    with pytest.raises(Gpt2JaxError, match="expected zeros in the padding rows 203 to 255 of wte"):
        read_model_file(path)


def test_sizes_are_read_without_the_body(path, tiny_params):
    params = tiny_params.copy()
    params[V * C] = 1
    write_model_file(path, TINY, params)
    assert read_model_config(path) == TINY


def test_vocabulary_without_padding_rows(path):
    config = GPT2Config(max_sequence_length=4, vocab_size=128, num_layers=1, num_heads=1, channels=8)
    params = np.arange(config.layout.num_parameters, dtype=np.float32)
    write_model_file(path, config, params)
    np.testing.assert_array_equal(read_model_file(path)[1], params)


@pytest.mark.parametrize("params", [np.zeros(N - 1, np.float32), np.zeros((1, N), np.float32), np.zeros(N, np.float64)])
def test_parameters_of_another_shape_or_type_are_not_written(path, params):
    with pytest.raises(Gpt2JaxError, match=rf"expected parameters of shape \({N},\) float32, found"):
        write_model_file(path, TINY, params)
    assert not path.exists()


def test_parameters_may_be_any_view_of_the_buffer(path, tiny_params):
    every_second = np.stack([tiny_params, tiny_params * 2], axis=1)[:, 0]
    write_model_file(path, TINY, every_second)
    assert path.read_bytes()[1024:] == tiny_params.tobytes()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("gpt2_124M.bin", "curl -fL -o {path} https://huggingface.co/datasets/"),
        ("gpt2_124M_bf16.bin", "curl -fL -o {path} https://huggingface.co/datasets/"),
        (
            "gpt2_1558M.bin",
            "curl -fL --create-dirs -o 'gpt2-xl/#1' 'https://huggingface.co/openai-community/gpt2-xl/resolve/main/{{config",
        ),
        ("gpt2-medium", "curl -fL --create-dirs -o 'gpt2-medium/#1'"),
        ("model_500.bin", "{model}   (another model file of the run)"),
        ("state_00000500_00000.bin", "{model}   (another model file of the run)"),
        ("gpt2_debug.bin", "curl -fL --create-dirs -o 'gpt2/#1'"),
    ],
)
def test_a_missing_model_file_says_how_to_get_it(tmp_path, name, hint):
    folder = tmp_path / "a b"
    folder.mkdir()
    (folder / "model_00000500.bin").touch()
    with pytest.raises(Gpt2JaxError, match="found no such file") as raised:
        read_model_config(folder / name)
    quoted = {"path": shlex.quote(str(folder / name)), "model": shlex.quote(str(folder / "model_00000500.bin"))}
    assert raised.value.hint.startswith(hint.format(**quoted))
    assert ("there is model_00000500.bin in " in raised.value.problem) == ("500" in name)
