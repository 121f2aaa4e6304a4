"""GPT-2 folders as transformers writes them."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from gpt2_jax.config import ModelSettings
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.interop.huggingface import read_huggingface_folder
from gpt2_jax.interop.pytorch import make_pytorch_model
from gpt2_jax.models.weights import read_sizes
from tests.conftest import TINY

pytestmark = pytest.mark.torch


@pytest.fixture
def folder(tmp_path, tiny_params):
    make_pytorch_model(TINY, tiny_params).save_pretrained(tmp_path)
    return tmp_path


def test_a_saved_model_reads_back(folder, tiny_params):
    config, params = read_huggingface_folder(folder)
    assert config == TINY == read_sizes(ModelSettings(init=str(folder)))
    np.testing.assert_array_equal(params, tiny_params)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_weights_are_widened(tmp_path, tiny_params, dtype):
    import torch

    make_pytorch_model(TINY, tiny_params).to(getattr(torch, dtype)).save_pretrained(tmp_path)
    _, params = read_huggingface_folder(tmp_path)
    assert params.dtype == np.float32
    expected = torch.tensor(tiny_params).to(getattr(torch, dtype)).to(torch.float32).numpy()
    np.testing.assert_array_equal(params, expected)


def test_names_without_the_prefix_are_read_too(folder, tiny_params):
    """The published gpt2 folders hold the bare transformer."""
    from safetensors.numpy import load_file, save_file

    path = folder / "model.safetensors"
    save_file({name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}, path)
    np.testing.assert_array_equal(read_huggingface_folder(folder)[1], tiny_params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "gelu"}, r"expected activation_function = 'gelu_new', found 'gelu'"),
        ({"layer_norm_epsilon": 1e-6}, r"expected layer_norm_epsilon"),
        ({"n_inner": 7}, r"expected n_inner = 128"),
        ({"n_head": 5}, r"multiple of num_heads"),
        ({"n_embd": "wide"}, r"with its five sizes"),
        ({"model_type": "llama"}, r"expected model_type gpt2, found 'llama'"),
        ({"n_layer": 3}, r"expected the tensor transformer.h.2.ln_1.weight, found none"),
        ({"vocab_size": 204}, r"expected transformer.wte.weight of shape \(204, 32\), found \(203, 32\)"),
    ],
)
def test_another_model_is_refused(folder, change, message):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(Gpt2JaxError, match=message):
        read_huggingface_folder(folder)


def test_sizes_that_the_weights_do_not_have_are_refused_without_a_buffer_for_them(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_layer": 2**40}))
    with pytest.raises(Gpt2JaxError, match=r"safetensors: expected GPT-2 weights in safetensors of \d+ parameters"):
        read_huggingface_folder(folder)


def test_incomplete_folders_are_refused(folder):
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(Gpt2JaxError, match="expected GPT-2 weights in safetensors"):
        read_huggingface_folder(folder)
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(Gpt2JaxError, match="found something that is not a regular file"):
        read_huggingface_folder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(Gpt2JaxError, match="expected GPT-2 weights in safetensors"):
        read_huggingface_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(Gpt2JaxError, match="expected a GPT-2 config"):
        read_huggingface_folder(folder)
