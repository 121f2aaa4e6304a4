"""nanoGPT's ckpt.pt against a NumPy model of its own names and shapes, and its refusals."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import pytest

from gpt2_jax.compute.forward import all_logits
from gpt2_jax.config import ModelSettings
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.interop.nanogpt import read_nanogpt_checkpoint
from gpt2_jax.models.initialize import initialize_parameters
from gpt2_jax.models.weights import load_weights, read_sizes
from tests.conftest import TINY, plan_of
from tests.interop.folders import DTYPES, state_dict
from tests.interop.test_torch_file import Program

pytestmark = pytest.mark.torch


def checkpoint_of(config, params, *, dtype="float32", bias=True, wrapper="_orig_mod."):
    """What nanoGPT's train.py saves."""
    import torch

    tensors = {name: torch.from_numpy(value) for name, value in state_dict(config, params, linear=True).items()}
    tensors = {name: value.to(getattr(torch, dtype)) for name, value in tensors.items() if bias or not name.endswith(".bias")}
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    arguments = {
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_embd": config.channels,
        "block_size": config.max_sequence_length,
        "bias": bias,
        "vocab_size": config.vocab_size,
        "dropout": 0.2,
    }
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    return {
        "model": {wrapper + name: value for name, value in tensors.items()},
        "optimizer": optimizer.state_dict(),
        "model_args": arguments,
        "iter_num": 2000,
        "best_val_loss": torch.tensor(3.2),
        "config": {"out_dir": "out", "dtype": "bfloat16", "compile": True, "beta1": 0.9},
    }


def write(path, checkpoint):
    import torch

    torch.save(checkpoint, path)
    return path


def quiet(text):
    pass


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrapper", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_a_checkpoint_is_read(tmp_path, tiny_params, dtype, wrapper):
    path = write(tmp_path / "ckpt.pt", checkpoint_of(TINY, tiny_params, dtype=dtype, wrapper=wrapper))
    config, params = load_weights(ModelSettings(init=str(path)), say=quiet)
    assert config == TINY == read_sizes(ModelSettings(init=str(path)))
    np.testing.assert_array_equal(params, tiny_params.astype(DTYPES[dtype]).astype(np.float32))


def test_a_table_that_is_padded_keeps_its_rows(tmp_path):
    """nanoGPT trains all 50304 rows, so that those beyond GPT-2's tokens are in its softmax."""
    config = GPT2Config(max_sequence_length=4, vocab_size=50304, num_layers=1, num_heads=1, channels=4)
    params = initialize_parameters(config)
    found, read = read_nanogpt_checkpoint(write(tmp_path / "ckpt.pt", checkpoint_of(config, params)), say=quiet)
    assert found == config
    np.testing.assert_array_equal(read, params)


def tanh_gelu(x):
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def test_the_two_forms_of_gelu_differ_by_what_is_said():
    x = np.linspace(-20, 20, 100_001)
    exact = x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
    assert 0.0004 < np.abs(exact - tanh_gelu(x)).max() < 0.0005


def nanogpt_logits(checkpoint, x_BT):
    """nanoGPT's forward pass in float64, but with GPT-2's GELU."""
    state = {name.removeprefix("_orig_mod."): value.double().numpy() for name, value in checkpoint["model"].items()}
    arguments = checkpoint["model_args"]
    B, T, C, H = *x_BT.shape, arguments["n_embd"], arguments["n_head"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * state[f"{name}.weight"] + state.get(f"{name}.bias", 0)

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)

    x = state["transformer.wte.weight"][x_BT] + state["transformer.wpe.weight"][:T]
    for layer in range(arguments["n_layer"]):
        block = f"transformer.h.{layer}"
        qkv = np.split(linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn"), 3, axis=-1)
        q, k, v = (part.reshape(B, T, H, C // H).transpose(0, 2, 1, 3) for part in qkv)
        scores = np.where(np.tri(T, dtype=bool), q @ k.transpose(0, 1, 3, 2) / math.sqrt(C // H), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        attended = (weights / weights.sum(-1, keepdims=True)) @ v
        x = x + linear(attended.transpose(0, 2, 1, 3).reshape(B, T, C), f"{block}.attn.c_proj")
        hidden = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        x = x + linear(tanh_gelu(hidden), f"{block}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ state["lm_head.weight"].T


@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_computes_what_nanogpt_computes(tmp_path, tiny_params, tiny_batch, bias):
    checkpoint = checkpoint_of(TINY, tiny_params, bias=bias)
    said = []
    config, params = read_nanogpt_checkpoint(write(tmp_path / "ckpt.pt", checkpoint), say=said.append)
    x_BT = tiny_batch[0]
    found = jax.jit(lambda params: all_logits(plan_of(config), params, x_BT))(params)
    np.testing.assert_allclose(found, nanogpt_logits(checkpoint, x_BT), rtol=0, atol=1e-5)
    assert len(said) == 1 + (not bias)
    assert "GPT-2's approximation, which differs by at most 0.0005" in said[0]
    if not bias:
        assert "this project adds biases of zero" in said[1]
        views = config.layout.views(params)
        assert all(not views[name].any() for name in ("ln1b", "qkvb", "attprojb", "ln2b", "fcb", "fcprojb", "lnfb"))


def test_missing_arguments_are_nanogpts_defaults(tmp_path, tiny_params):
    """Old checkpoints do not say whether there are biases: there were."""
    checkpoint = checkpoint_of(TINY, tiny_params)
    del checkpoint["model_args"]["bias"]
    assert read_nanogpt_checkpoint(write(tmp_path / "ckpt.pt", checkpoint), say=quiet)[0] == TINY
    checkpoint["model_args"] = {}
    sizes = read_sizes(ModelSettings(init=str(write(tmp_path / "ckpt.pt", checkpoint))))
    assert dataclasses.astuple(sizes) == (1024, 50304, 12, 12, 768)


def test_masks_beside_no_biases_are_checked(tmp_path, tiny_params):
    """nanoGPT keeps them where PyTorch has no flash attention; they are called bias too."""
    import torch

    checkpoint = checkpoint_of(TINY, tiny_params, bias=False)
    T = TINY.max_sequence_length
    checkpoint["model"]["_orig_mod.transformer.h.0.attn.bias"] = torch.tril(torch.ones(T, T)).view(1, 1, T, T)
    assert read_nanogpt_checkpoint(write(tmp_path / "ckpt.pt", checkpoint), say=quiet)[0] == TINY
    checkpoint["model"]["_orig_mod.transformer.h.0.attn.bias"][0, 0, 3, 5] = 1
    with pytest.raises(Gpt2JaxError, match=r"expected h.0.attn.bias to be the causal mask, found another"):
        read_nanogpt_checkpoint(write(tmp_path / "ckpt.pt", checkpoint), say=quiet)


def changed(**arguments):
    return lambda checkpoint, path: checkpoint["model_args"].update(arguments)


def more(**entries):
    return lambda checkpoint, path: checkpoint["model"].update({f"_orig_mod.{name}": value for name, value in entries.items()})


def program(checkpoint, path):
    checkpoint["config"] = Program(path / "ran")


def without(name):
    return lambda checkpoint, path: checkpoint.pop(name)


def other_classifier(checkpoint, path):
    checkpoint["model"]["_orig_mod.lm_head.weight"] = checkpoint["model"]["_orig_mod.lm_head.weight"] + 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (changed(n_kv_head=2), "expected of the model_args only block_size, .*, found n_kv_head = 2"),
        (changed(n_layer="2"), "expected model_args' n_layer to be of type int, found '2'"),
        (changed(vocab_size=None), "expected model_args' vocab_size to be of type int, found None"),
        (changed(bias=1), "expected model_args' bias to be of type bool, found 1"),
        (changed(n_head=5), "multiple of num_heads"),
        (changed(n_layer=3), r"expected the tensor h.2.ln_1.weight, found none"),
        (changed(n_layer=1), r"expected only tensors of a GPT-2 of 1 layers, found h.1.ln_1.weight"),
        (changed(bias=False), "expected only tensors of a GPT-2 of 2 layers without biases, found ln_f.bias"),
        (changed(vocab_size=204), r"expected wte.weight of shape \(204, 32\), found \(203, 32\)"),
        (changed(n_embd=2**40), r"expected wte.weight of shape \(203, 1099511627776\)"),
        (more(step=3), "expected only tensors in the state dict, found int"),
        (without("model_args"), "expected a nanoGPT checkpoint, with 'model' and 'model_args', found 'model', 'optimizer'"),
        (without("model"), "expected a nanoGPT checkpoint, with 'model' and 'model_args', found 'optimizer'"),
        (other_classifier, "expected lm_head.weight to be the token table"),
        (program, r"expected a nanoGPT checkpoint, found the object \w+.open, whose loading could run a program"),
    ],
)
def test_other_checkpoints_are_refused(tmp_path, tiny_params, damage, message):
    checkpoint = checkpoint_of(TINY, tiny_params)
    damage(checkpoint, tmp_path)
    with pytest.raises(Gpt2JaxError, match=f"ckpt.pt: .*{message}") as caught:
        read_nanogpt_checkpoint(write(tmp_path / "ckpt.pt", checkpoint), say=quiet)
    assert len(str(caught.value).splitlines()) == 2
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [[], 3, {"wte.weight": None}])
def test_another_object_is_refused(tmp_path, content):
    with pytest.raises(Gpt2JaxError, match="expected a nanoGPT checkpoint, with 'model' and 'model_args', found "):
        read_nanogpt_checkpoint(write(tmp_path / "ckpt.pt", content))


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"\x80\x02}", b"junk"])
def test_a_damaged_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "ckpt.pt").write_bytes(content)
    with pytest.raises(Gpt2JaxError, match=r"ckpt.pt: expected a nanoGPT checkpoint, found a file that torch cannot load"):
        read_nanogpt_checkpoint(tmp_path / "ckpt.pt")
