"""Weights that torch.save wrote: read with weights_only alone, and by no torch in which that is not safe."""

from __future__ import annotations

import json
import sys
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.interop.huggingface import read_huggingface_folder
from gpt2_jax.interop.torch_file import read_torch_file
from tests.conftest import TINY
from tests.contract.guard import no_hang
from tests.interop.folders import DTYPES, cut, state_dict, write_config

with_torch = pytest.mark.torch


def torch_state(params, dtype="float32"):
    import torch

    tensors = {name: torch.from_numpy(value) for name, value in state_dict(TINY, params).items()}
    tensors = {name: value.to(getattr(torch, dtype)) for name, value in tensors.items()}
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}


def write_bin(folder, state, *, zipped=True):
    import torch

    folder.mkdir(exist_ok=True)
    write_config(folder, TINY)
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    return folder


@with_torch
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_torch_is_read_in_every_dtype(tmp_path, tiny_params, dtype, zipped):
    folder = write_bin(tmp_path, torch_state(tiny_params, dtype), zipped=zipped)
    expected = tiny_params.astype(DTYPES[dtype]).astype(np.float32)
    np.testing.assert_array_equal(read_huggingface_folder(folder)[1], expected)


@with_torch
def test_shards_of_torch_are_read(tmp_path, tiny_params):
    import torch

    write_config(tmp_path, TINY)
    shards, index = cut(torch_state(tiny_params), 3, "bin")
    for name, part in shards.items():
        torch.save(part, tmp_path / name)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    np.testing.assert_array_equal(read_huggingface_folder(tmp_path)[1], tiny_params)


@with_torch
def test_parameters_that_are_transposed_views_or_want_gradients_are_read(tmp_path, tiny_params):
    import torch

    state = torch_state(tiny_params)
    for name, value in state.items():
        if value.ndim == 2:
            state[name] = torch.nn.Parameter(value.T.contiguous().T)
    np.testing.assert_array_equal(read_huggingface_folder(write_bin(tmp_path, state))[1], tiny_params)


class Program:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@with_torch
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_with_a_program_is_refused_and_the_program_does_not_run(tmp_path, tiny_params, zipped, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # holds only where a call leaves it open
    state = torch_state(tiny_params) | {"more": Program(tmp_path / "ran")}
    with pytest.raises(Gpt2JaxError, match=r"pytorch_model.bin: .* the object \w+.open, whose loading could run a program"):
        read_huggingface_folder(write_bin(tmp_path, state, zipped=zipped))
    assert not (tmp_path / "ran").exists()


def sparse(state):
    state["transformer.wpe.weight"] = state["transformer.wpe.weight"].to_sparse()


def claims_more_than_it_holds(state):
    state["transformer.wpe.weight"] = state["transformer.wpe.weight"][:1].clone().expand(16, 32)


def holds_a_number(state):
    state["epoch"] = 3


def is_nested(state):
    state["model"] = dict(state)


@with_torch
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (sparse, "expected transformer.wpe.weight with all its elements"),
        (claims_more_than_it_holds, "expected transformer.wpe.weight with all its elements"),
        (holds_a_number, "expected only tensors in the state dict, found int 'epoch'"),
        (is_nested, "expected only tensors in the state dict, found dict 'model'"),
    ],
)
def test_a_state_dict_of_other_things_is_refused(tmp_path, tiny_params, damage, message):
    state = torch_state(tiny_params)
    damage(state)
    with pytest.raises(Gpt2JaxError, match=rf"bin: {message}"):
        read_huggingface_folder(write_bin(tmp_path, state))


@with_torch
@pytest.mark.parametrize("content", [[1, 2], "text", None, {}])
def test_a_file_of_another_object_is_refused(tmp_path, content):
    with pytest.raises(Gpt2JaxError, match="expected a state dict, tensors by name, found"):
        read_huggingface_folder(write_bin(tmp_path, content))


@with_torch
@settings(max_examples=30)
@given(zipped=st.booleans(), kept=st.integers(0, 2**32), junk=st.binary(max_size=30), removed=st.integers(0, 30))
def test_damaged_files_are_read_or_refused(tmp_path_factory, tiny_params, zipped, kept, junk, removed):
    folder = write_bin(tmp_path_factory.getbasetemp() / "bin", torch_state(tiny_params), zipped=zipped)
    path = folder / "pytorch_model.bin"
    content = path.read_bytes()
    kept %= 3000 if kept % 2 else len(content)
    path.write_bytes(content[:kept] + junk + content[kept + removed :])
    with no_hang(), suppress(Gpt2JaxError):
        read_huggingface_folder(folder)


@pytest.mark.parametrize("version", ["2.5.1", "2.5.1+cu124", "1.13.0"])
def test_a_torch_in_which_files_can_run_programs_is_refused_unimported(tmp_path, monkeypatch, version):
    monkeypatch.setattr("gpt2_jax.jax_compat.version_text", {"torch": version}.get)
    monkeypatch.setitem(sys.modules, "torch", None)  # an import would fail
    (tmp_path / "x.bin").write_bytes(b"PK")
    with pytest.raises(Gpt2JaxError) as caught:
        read_torch_file(tmp_path / "x.bin", "weights", "a right file", without_torch="another way")
    assert f"found {version.partition('+')[0]}, in which a file can run programs (CVE-2025-32434)" in caught.value.problem
    assert caught.value.hint == "pip install --upgrade 'torch>=2.6'   (or another way)"


def test_without_torch_the_hint_installs_it_or_converts(tmp_path, monkeypatch):
    monkeypatch.setattr("gpt2_jax.jax_compat.version_text", {}.get)
    monkeypatch.setitem(sys.modules, "torch", None)
    write_config(tmp_path, TINY)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(Gpt2JaxError, match=r"expected torch 2.6 or newer, to read .*, found none") as caught:
        read_huggingface_folder(tmp_path)
    assert caught.value.hint.startswith(
        "pip install --upgrade 'torch>=2.6'   (or where transformers is installed, to get safetensors: python -c "
    )
    assert len(str(caught.value).splitlines()) == 2


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(Gpt2JaxError, match="expected weights, found no such file"):
        read_torch_file(tmp_path / "x.bin", "weights", "another way")
