"""nanoGPT's checkpoints, ckpt.pt: its model's weights to the flat buffer and back; the optimizer's state stays where it is."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.errors import Gpt2JaxError, announce
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.files import atomic_write
from gpt2_jax.interop.state_dict import parameters_from, state_dict_names
from gpt2_jax.interop.stored_tensors import StoredTensor, tensors_of_state
from gpt2_jax.interop.torch_file import read_torch_file, require_torch
from gpt2_jax.llmc.header import HEADER_BYTES
from gpt2_jax.llmc.model_file import read_model_config, read_model_dtype

_WHAT = "a nanoGPT checkpoint"
_HINT = "--init out/ckpt.pt   (the file that nanoGPT's train.py writes)"
# Of nanoGPT's GPTConfig. Dropout acts in training only, and this project trains without.
_DEFAULTS = {
    "block_size": 1024,
    "vocab_size": 50304,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "dropout": 0.0,
    "bias": True,
}
_SUFFIXES = (".pt", ".pth")


def is_nanogpt_checkpoint(path: str | os.PathLike) -> bool:
    """Whether a path has the name of a checkpoint of PyTorch."""
    return Path(path).suffix in _SUFFIXES


def read_nanogpt_sizes(path: str | os.PathLike) -> GPT2Config:
    """The sizes of a checkpoint's model; Gpt2JaxError as `read_nanogpt_checkpoint`."""
    return _read(path)[0]


def read_nanogpt_checkpoint(path: str | os.PathLike, *, say: Callable[[str], None] = announce) -> tuple[GPT2Config, np.ndarray]:
    """Sizes and flat buffer (num_parameters,) float32 of a checkpoint; float16 and bfloat16 weights are widened.

    `say` gets the differences between nanoGPT's model and a GPT-2. Raises Gpt2JaxError without torch 2.6 or newer, for a
    file that holds more than tensors and plain containers, for arguments that nanoGPT's own model does not have, and for
    other tensors than such a model's.
    """
    with open_nanogpt_checkpoint(path, say=say) as (config, tensors, biases):
        return config, parameters_from(config, tensors, linear_as="linear", biases=biases)


@contextmanager
def open_nanogpt_checkpoint(
    path: str | os.PathLike, *, say: Callable[[str], None] = announce
) -> Iterator[tuple[GPT2Config, dict[str, StoredTensor], bool]]:
    """The sizes, the tensors by name, not read, and whether the model has biases; `say` and errors as
    `read_nanogpt_checkpoint`."""
    path = Path(path)
    config, biases, state = _read(path)
    yield config, tensors_of_state(state, path, _HINT), biases
    say(f"{path}: nanoGPT computes GELU exactly; this project uses GPT-2's approximation, which differs by at most 0.0005")
    if not biases:
        say(f"{path}: the model has no biases; this project adds biases of zero, which training will change")


def _read(path: str | os.PathLike) -> tuple[GPT2Config, bool, Any]:
    """The sizes, whether the model has biases, and its state dict."""
    checkpoint = read_torch_file(path, _WHAT, _HINT)
    arguments = checkpoint.get("model_args") if isinstance(checkpoint, dict) else None
    if not isinstance(checkpoint, dict) or not isinstance(arguments, dict) or "model" not in checkpoint:
        found = f"{', '.join(map(repr, list(checkpoint)[:5]))}" if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise Gpt2JaxError(f"{path}: expected {_WHAT}, with 'model' and 'model_args', found {found}", _HINT)
    for name, value in arguments.items():
        if name not in _DEFAULTS:
            known = ", ".join(_DEFAULTS)
            raise Gpt2JaxError(f"{path}: expected of the model_args only {known}, found {name} = {value!r}", _HINT)
        if name != "dropout" and type(value) is not type(_DEFAULTS[name]):
            expected = type(_DEFAULTS[name]).__name__
            raise Gpt2JaxError(f"{path}: expected model_args' {name} to be of type {expected}, found {value!r}", _HINT)
    sizes: dict[str, Any] = _DEFAULTS | arguments
    try:
        config = GPT2Config(
            max_sequence_length=sizes["block_size"],
            vocab_size=sizes["vocab_size"],
            num_layers=sizes["n_layer"],
            num_heads=sizes["n_head"],
            channels=sizes["n_embd"],
        )
    except Gpt2JaxError as error:
        raise Gpt2JaxError(f"{path}: {error}", _HINT) from None
    return config, sizes["bias"], checkpoint["model"]


def write_nanogpt_checkpoint(path: str | os.PathLike, model_file: str | os.PathLike) -> None:
    """Write the weights of a llm.c model file (version 3 or 5) in its dtype as nanoGPT's ckpt.pt, without an optimizer's state:
    nanoGPT's sample.py takes it with --out_dir, its train.py begins anew from such weights alone.

    Gpt2JaxError without torch 2.6 or newer. The file is mapped, not read into memory.
    """
    require_torch(Path(path), f"to write {_WHAT}")
    import torch

    config, dtype = read_model_config(model_file), read_model_dtype(model_file)
    # PyTorch takes bfloat16 from NumPy only as what has its size.
    words = np.memmap(model_file, dtype="<f4" if dtype == "float32" else "<i2", mode="c", offset=HEADER_BYTES)
    state: dict[str, Any] = {}
    for name, layer, theirs in state_dict_names(config.layout):
        tensor = config.layout[name]
        size = math.prod(tensor.shape)
        start = tensor.offset + layer * size
        values = torch.from_numpy(words[start : start + size].reshape(tensor.shape)[: tensor.valid_rows])
        state[f"transformer.{theirs}"] = values if dtype == "float32" else values.view(torch.bfloat16)
    state["lm_head.weight"] = state["transformer.wte.weight"]  # one tensor: torch.save writes it once
    arguments = {
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_embd": config.channels,
        "block_size": config.max_sequence_length,
        "bias": True,
        "vocab_size": config.vocab_size,
        "dropout": 0.0,
    }
    checkpoint = {"model": state, "model_args": arguments, "iter_num": 0, "best_val_loss": 1e9, "config": dict(arguments)}
    with atomic_write(path) as file:
        torch.save(checkpoint, file)
