"""nanoGPT's checkpoints, ckpt.pt: its model's weights to the flat buffer; the optimizer's state stays where it is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.errors import Gpt2JaxError, announce
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.interop.state_dict import parameters_from
from gpt2_jax.interop.stored_tensors import tensors_of_state
from gpt2_jax.interop.torch_file import read_torch_file

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
    path = Path(path)
    config, biases, state = _read(path)
    params = parameters_from(config, tensors_of_state(state, path, _HINT), linear_as="linear", biases=biases)
    say(f"{path}: nanoGPT computes GELU exactly; this project uses GPT-2's approximation, which differs by at most 0.0005")
    if not biases:
        say(f"{path}: the model has no biases; this project adds biases of zero, which training will change")
    return config, params


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
