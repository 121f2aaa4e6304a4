"""GPT-2 folders as transformers writes them."""

from __future__ import annotations

import dataclasses
import json
import os

import jax
import numpy as np
import pytest

from gpt2_jax.compute.forward import all_logits
from gpt2_jax.config import ModelSettings
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.interop.huggingface import read_huggingface_folder
from gpt2_jax.interop.huggingface_config import read_huggingface_config
from gpt2_jax.interop.pytorch import make_pytorch_model
from gpt2_jax.models.weights import read_sizes
from tests.conftest import TINY, plan_of

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


def logits_of(folder, x_BT):
    """What transformers computes."""
    import torch
    import transformers

    model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.from_numpy(x_BT.astype(np.int64))).logits.numpy()


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation_function": "gelu_pytorch_tanh"},
        {"activation_function": "gelu_python_tanh"},
        {"activation_function": "gelu_fast"},
        {"activation_function": "gelu_accurate"},
        {"n_inner": 4 * TINY.channels, "n_ctx": TINY.max_sequence_length, "reorder_and_upcast_attn": True},
        {"tie_encoder_decoder": True, "is_decoder": True, "use_cache": False, "chunk_size_feed_forward": 4, "my_note": "hello"},
        {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5, "initializer_range": 7.0},
    ],
)
def test_settings_that_are_accepted_do_not_change_the_function(folder, tiny_batch, changes):
    change_config(folder, **changes)
    config, params = read_huggingface_folder(folder, say=lambda text: None)
    x_BT = tiny_batch[0]
    found = jax.jit(lambda params: all_logits(plan_of(config), params, x_BT))(params)
    np.testing.assert_allclose(found, logits_of(folder, x_BT), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"activation_function": "gelu"},
        {"activation_function": "quick_gelu"},
        {"layer_norm_epsilon": 1e-3},
        {"n_head": 2},
    ],
)
def test_settings_that_change_the_function_are_refused_or_honoured(folder, tiny_batch, changes):
    x_BT = tiny_batch[0]
    before = logits_of(folder, x_BT)
    change_config(folder, **changes)
    assert np.abs(logits_of(folder, x_BT) - before).max() > 1e-5
    if "n_head" in changes:
        assert read_huggingface_folder(folder)[0].num_heads == 2
    else:
        with pytest.raises(Gpt2JaxError, match=f"expected {next(iter(changes))} = "):
            read_huggingface_folder(folder)


def test_every_setting_that_transformers_writes_is_known(folder):
    """Also those of a version to come: a new setting shows here."""
    assert read_huggingface_config(folder / "config.json").unknown == {}
    import transformers

    (folder / "config.json").write_text(json.dumps(transformers.GPT2Config().to_dict()))
    assert read_huggingface_config(folder / "config.json").unknown == {}


def test_sizes_that_are_left_out_are_transformers_defaults(folder):
    import transformers

    (folder / "config.json").write_text("{}")
    found, theirs = read_huggingface_config(folder / "config.json").sizes, transformers.GPT2Config()
    assert dataclasses.astuple(found) == (1024, theirs.vocab_size, theirs.n_layer, theirs.n_head, theirs.n_embd)
    assert theirs.n_positions == 1024


def test_shards_that_transformers_wrote_read_back(tmp_path, tiny_params):
    make_pytorch_model(TINY, tiny_params).save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    np.testing.assert_array_equal(read_huggingface_folder(tmp_path)[1], tiny_params)


def test_the_weights_of_a_compiled_model_read_back(tmp_path, tiny_params):
    import torch

    model = make_pytorch_model(TINY, tiny_params)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = torch.compile(model, backend="eager").state_dict()
    assert all(name.startswith("_orig_mod.") for name in state)
    torch.save(state, tmp_path / "pytorch_model.bin")
    np.testing.assert_array_equal(read_huggingface_folder(tmp_path)[1], tiny_params)


@pytest.mark.parametrize("head", ["GPT2DoubleHeadsModel", "GPT2ForSequenceClassification", "GPT2ForQuestionAnswering"])
def test_a_model_with_another_head_is_refused_by_its_tensors(folder, tmp_path, head):
    import transformers

    getattr(transformers, head).from_pretrained(folder).save_pretrained(tmp_path / "other")
    with pytest.raises(Gpt2JaxError, match="expected only tensors of a GPT-2 of 2 layers, found "):
        read_huggingface_folder(tmp_path / "other")


def test_a_classifier_of_its_own_is_refused(tmp_path, tiny_params):
    """A fine-tuned one that is no longer the token table."""
    import torch

    model = make_pytorch_model(TINY, tiny_params)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 0.1)
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path)
    with pytest.raises(Gpt2JaxError, match="expected tie_word_embeddings = True, found False"):
        read_huggingface_folder(tmp_path)
    change_config(tmp_path, tie_word_embeddings=True)
    with pytest.raises(Gpt2JaxError, match=r"expected lm_head.weight to be the token table"):
        read_huggingface_folder(tmp_path)


def test_incomplete_folders_are_refused(folder):
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(Gpt2JaxError, match="expected GPT-2 weights in safetensors"):
        read_huggingface_folder(folder)
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(Gpt2JaxError, match="found something that is not a regular file"):
        read_huggingface_folder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(Gpt2JaxError, match=r"expected GPT-2 weights, one of model.safetensors, .*, found none of them"):
        read_huggingface_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(Gpt2JaxError, match="expected a GPT-2 config"):
        read_huggingface_folder(folder)
