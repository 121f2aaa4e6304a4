"""Folders of weights in safetensors: every tensor is used, checked or refused by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from gpt2_jax.config import ModelSettings
from gpt2_jax.data.tokenizer import gpt2_tokenizer, token_bytes
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.interop.huggingface import read_huggingface_folder
from gpt2_jax.models.weights import load_weights, read_sizes
from tests.conftest import TINY
from tests.contract.guard import no_hang
from tests.interop.folders import DTYPES, cut, state_dict, write_config, write_folder


@pytest.fixture
def tensors(tiny_params):
    return state_dict(TINY, tiny_params)


def write_shards(folder, tensors, num_shards=3):
    """The folder's shards and their index; returns the index's content."""
    folder.mkdir(exist_ok=True)
    write_config(folder, TINY)
    shards, index = cut(tensors, num_shards, "safetensors")
    for name, part in shards.items():
        save_file(part, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_shards", [0, 1, 3])
def test_weights_are_read_in_every_dtype_from_one_file_or_shards(tmp_path, tiny_params, dtype, num_shards):
    tensors = state_dict(TINY, tiny_params, dtype=dtype)
    if num_shards:
        write_shards(tmp_path, tensors, num_shards)
    else:
        write_folder(tmp_path, TINY, tensors)
    config, params = read_huggingface_folder(tmp_path)
    assert config == TINY
    np.testing.assert_array_equal(params, tiny_params.astype(DTYPES[dtype]).astype(np.float32))


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("body", ["transformer.", ""])
def test_prefixes_are_not_part_of_the_names(tmp_path, tensors, tiny_params, wrapper, body):
    renamed = {wrapper + body + name.removeprefix("transformer."): value for name, value in tensors.items()}
    renamed[f"{wrapper}lm_head.weight"] = tensors["transformer.wte.weight"]
    np.testing.assert_array_equal(read_huggingface_folder(write_folder(tmp_path, TINY, renamed))[1], tiny_params)


def test_prefixes_within_the_names_are_none_of_them_either(tmp_path, tensors, tiny_params):
    """torch.compile of every block alone."""
    renamed = {name.replace(".h.0.", ".h.0._orig_mod."): value for name, value in tensors.items()}
    assert renamed.keys() != tensors.keys()
    np.testing.assert_array_equal(read_huggingface_folder(write_folder(tmp_path, TINY, renamed))[1], tiny_params)


def test_a_tensor_under_two_names_is_refused(tmp_path, tensors):
    twice = tensors | {"wpe.weight": tensors["transformer.wpe.weight"]}
    with pytest.raises(Gpt2JaxError, match=r"expected wpe.weight once, found (transformer.)?wpe.weight and "):
        read_huggingface_folder(write_folder(tmp_path, TINY, twice))


T = TINY.max_sequence_length
MASK = np.tri(T).reshape(1, 1, T, T)


@pytest.mark.parametrize(
    "derived",
    [
        {"h.0.attn.bias": MASK.astype(bool), "h.1.attn.bias": MASK.astype(np.uint8)},
        {"h.1.attn.bias": MASK.astype(np.float32), "h.1.attn.masked_bias": np.array(-1e4, np.float32)},
        {"h.0.attn.bias": MASK.astype(np.float16), "h.0.attn.masked_bias": np.array(-1e9, np.float32)},
        {"h.0.attn.bias": MASK.astype(ml_dtypes.bfloat16), "h.0.attn.masked_bias": np.array(-1e4, ml_dtypes.bfloat16)},
    ],
)
def test_causal_masks_of_old_files_are_accepted(tmp_path, tensors, tiny_params, derived):
    derived = {f"transformer.{name}": value for name, value in derived.items()}
    np.testing.assert_array_equal(read_huggingface_folder(write_folder(tmp_path, TINY, tensors | derived))[1], tiny_params)


def another_classifier(tensors):
    value = tensors["transformer.wte.weight"].copy()
    value[5, 7] += 0.5
    return {"lm_head.weight": value}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (another_classifier, r"expected lm_head.weight to be the token table wte.weight, found .* at \(5, 7\)"),
        (
            lambda tensors: {"lm_head.weight": tensors["transformer.wte.weight"][:-1]},
            r"expected lm_head.weight of shape \(203, 32\), found \(202, 32\)",
        ),
        (
            lambda tensors: {"transformer.h.2.ln_1.weight": np.ones(32, np.float32)},
            "expected only tensors of a GPT-2 of 2 layers, found h.2.ln_1.weight",
        ),
        (lambda tensors: {"transformer.h.2.attn.bias": MASK.astype(bool)}, "found h.2.attn.bias"),
        (lambda tensors: {"transformer.h.0.crossattention.c_attn.weight": np.ones((32, 64), np.float32)}, "found h.0.cross"),
        (lambda tensors: {"score.weight": np.ones((2, 32), np.float32)}, "of 2 layers, found score.weight"),
        (lambda tensors: {"lm_head.bias": np.ones(203, np.float32)}, "found lm_head.bias"),
        (lambda tensors: {"transformer.h.0.attn.bias": np.ones((1, 1, T, T), bool)}, "h.0.attn.bias to be the causal mask"),
        (lambda tensors: {"transformer.h.0.attn.bias": np.tri(T - 1).reshape(1, 1, T - 1, T - 1)}, "attn.bias of shape"),
        (
            lambda tensors: {"transformer.h.1.attn.masked_bias": np.array(-1, np.float32)},
            "masked_bias = -10000 or less, found -1",
        ),
        (lambda tensors: {"transformer.h.1.attn.masked_bias": np.array(np.nan, np.float32)}, "-10000 or less, found nan"),
        (
            lambda tensors: {"transformer.wpe.weight": tensors["transformer.wpe.weight"].T.copy()},
            r"expected wpe.weight of shape \(16, 32\), found \(32, 16\)",
        ),
        (
            lambda tensors: {"transformer.wpe.weight": np.ones((16, 32), np.int8)},
            "expected wpe.weight in float32 or float16 or bfloat16, found I8",
        ),
        (lambda tensors: {"transformer.ln_f.bias": np.ones(32)}, "expected ln_f.bias in float32 .* found F64"),
    ],
)
def test_other_tensors_are_refused_by_name(tmp_path, tensors, change, message):
    with pytest.raises(Gpt2JaxError, match=rf"model.safetensors: {'.*' + message}") as caught:
        read_huggingface_folder(write_folder(tmp_path, TINY, tensors | change(tensors)))
    assert len(str(caught.value).splitlines()) == 2


def test_every_tensor_is_missed(tmp_path, tensors):
    for name in tensors:
        folder = write_folder(tmp_path, TINY, {other: value for other, value in tensors.items() if other != name})
        with pytest.raises(Gpt2JaxError, match=f"expected the tensor {name.removeprefix('transformer.')}, found none"):
            read_huggingface_folder(folder)


@pytest.mark.parametrize("changes", [{"n_layer": 2**40}, {"n_embd": 2**40}, {"vocab_size": 2**62}])
def test_sizes_that_the_weights_do_not_have_are_refused_without_a_buffer_for_them(tmp_path, tensors, changes):
    folder = write_folder(tmp_path, TINY, tensors)
    write_config(folder, TINY, **changes)
    with no_hang(), pytest.raises(Gpt2JaxError, match="safetensors: expected "):
        read_huggingface_folder(folder)


def test_settings_of_no_gpt2_are_said_once(tmp_path, tensors, capsys):
    folder = write_folder(tmp_path, TINY, tensors)
    write_config(folder, TINY, my_note="hello")
    said = []
    read_huggingface_folder(folder, say=said.append)
    assert len(said) == 1
    assert said[0].endswith("does not have either: my_note = 'hello'")
    read_huggingface_folder(folder)
    assert "my_note = 'hello'" in capsys.readouterr().err


def test_an_adapter_beside_the_weights_is_refused(tmp_path, tensors):
    (write_folder(tmp_path, TINY, tensors) / "adapter_config.json").write_text("{}")
    with pytest.raises(Gpt2JaxError, match="json: expected weights without an adapter"):
        read_huggingface_folder(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/passwd", "sub/shard.safetensors", "..", ".", "", "..\\x", "C:x", "a\0b", None, 5, ["a"]],
)
def test_an_index_that_reaches_out_of_its_folder_is_refused(tmp_path, tensors, name):
    index = write_shards(tmp_path / "folder", tensors)
    save_file(tensors, tmp_path / "secret.safetensors")
    index["weight_map"]["transformer.wpe.weight"] = name
    (tmp_path / "folder" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(Gpt2JaxError, match="json: expected the names of files beside it, found "):
        read_huggingface_folder(tmp_path / "folder")


def test_shards_that_are_not_as_the_index_says_are_refused(tmp_path, tensors):
    folder = tmp_path / "folder"
    index = write_shards(folder, tensors)
    path, first = folder / "model.safetensors.index.json", next(iter(tensors))
    shards = sorted(set(index["weight_map"].values()))

    def refused(weight_map, message):
        path.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(Gpt2JaxError, match=message):
            read_huggingface_folder(folder)

    of = index["weight_map"]
    refused({name: shard for name, shard in of.items() if name != first}, f"{shards[0]}: expected {first} in no shard")
    refused(of | {first: shards[1]}, f"{shards[0]}: expected {first} in {shards[1]}, as .* says, found it here")
    refused(of | {"transformer.more": shards[2]}, f"{shards[2]}: expected transformer.more, as .* found no such tensor")
    refused({}, "with a weight_map from tensors to files, found none")
    refused({name: shard for name, shard in of.items() if shard != shards[2]}, "expected the tensor .*, found none")
    # A tensor in two shards.
    part = {name: value for name, value in tensors.items() if of[name] == shards[1]}
    save_file(part | {first: tensors[first]}, folder / shards[1])
    refused(of, f"{shards[1]}: expected {first} in {shards[0]}, as .* says, found it here")
    (folder / shards[1]).unlink()
    refused(of, f"{shards[1]}: expected GPT-2 weights in safetensors, found no such file")
    os.mkfifo(folder / shards[1])
    refused(of, f"{shards[1]}: .* found something that is not a regular file")


@pytest.mark.parametrize("content", ["", "[]", "null", '{"weight_map": 3}', '{"weight_map": []}', "[" * 50_000, "\0" * 100])
def test_an_index_that_is_none_is_refused(tmp_path, tensors, content):
    write_shards(tmp_path, tensors)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(Gpt2JaxError, match="json: expected an index of shards"):
        read_huggingface_folder(tmp_path)


def test_one_file_goes_before_shards(tmp_path, tensors, tiny_params):
    """As in transformers."""
    write_folder(tmp_path, TINY, tensors)
    (tmp_path / "model.safetensors.index.json").write_text("damaged")
    np.testing.assert_array_equal(read_huggingface_folder(tmp_path)[1], tiny_params)


@given(kept=st.integers(0, 2**32), junk=st.binary(max_size=30), removed=st.integers(0, 30))
def test_damaged_weights_are_read_or_refused(tmp_path_factory, tiny_params, kept, junk, removed):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    path = write_folder(folder, TINY, state_dict(TINY, tiny_params)) / "model.safetensors"
    content = path.read_bytes()
    # Mostly within the header.
    kept %= 3000 if kept % 4 else len(content)
    path.write_bytes(content[:kept] + junk + content[kept + removed :])
    with no_hang(), suppress(Gpt2JaxError):
        read_huggingface_folder(folder)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_folder_is_read_without_jax(tmp_path, tiny_params, dtype):
    write_folder(tmp_path, TINY, state_dict(TINY, tiny_params, dtype=dtype))
    program = (
        "import sys; from gpt2_jax.interop.huggingface import read_huggingface_folder as read; params = read(sys.argv[1])[1]; "
        "print(float(abs(params).sum()), [name for name in sys.modules if name.startswith(('jax', 'torch'))])"
    )
    output = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True).stdout
    expected = float(abs(tiny_params.astype(DTYPES[dtype]).astype(np.float32)).sum())
    assert output == f"{expected} []\n"


def gpt2s_tokens() -> dict[str, int]:
    """GPT-2's vocab.json: the 256 bytes as printable characters, merges and the end of text."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    shown = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokens = token_bytes(gpt2_tokenizer())
    return {"".join(shown[byte] for byte in token): i for i, token in enumerate(tokens[:-1])} | {"<|endoftext|>": 50256}


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("vocab.json", lambda: gpt2s_tokens(), False),
        ("vocab.json", lambda: gpt2s_tokens() | {"<pad>": 50257}, False),
        ("tokenizer.json", lambda: {"model": {"type": "BPE", "vocab": gpt2s_tokens(), "merges": []}}, False),
        ("vocab.json", lambda: gpt2s_tokens() | {"!": 1, '"': 0}, True),
        ("vocab.json", lambda: {"a": 0, "b": 1}, True),
        ("tokenizer.json", lambda: {"model": {"type": "BPE", "vocab": {"a": 0}}}, True),
        ("tokenizer.json", lambda: {"model": {"type": "Unigram", "vocab": [["a", 0.5]]}}, True),
        ("vocab.json", list, True),
        ("vocab.json", lambda: {"a": [3]}, True),
        ("vocab.json", lambda: {"\ud800": 0}, True),
    ],
)
def test_a_tokenizer_that_is_not_gpt2s_is_said(tmp_path, tensors, name, content, told):
    folder, said = write_folder(tmp_path, TINY, tensors), []
    (folder / name).write_text(json.dumps(content()), encoding="utf-8")
    read_huggingface_folder(folder, say=said.append)
    assert [f"{folder / name}: these are not GPT-2's tokens" in line for line in said] == [True] * told


def test_a_file_of_weights_stands_for_its_folder(tmp_path, tensors, tiny_params):
    path = write_folder(tmp_path, TINY, tensors) / "model.safetensors"
    settings = ModelSettings(init=str(path))
    assert read_sizes(settings) == TINY
    np.testing.assert_array_equal(load_weights(settings)[1], tiny_params)


def test_a_file_without_tensors_is_refused(tmp_path):
    with pytest.raises(Gpt2JaxError, match="expected GPT-2 weights in safetensors, found no tensor"):
        read_huggingface_folder(write_folder(tmp_path, TINY, {}))
