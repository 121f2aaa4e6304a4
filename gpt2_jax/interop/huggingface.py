"""GPT-2 checkpoints of Hugging Face transformers: config.json and model.safetensors to the flat buffer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from gpt2_jax.buffer.layout import ParameterLayout
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.family import FAMILIES, family_of_model_type
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.files import file_size, read_text_file

_MAX_CONFIG_BYTES = 1_000_000
_HINT = "a folder that transformers' save_pretrained wrote for GPT2LMHeadModel"


def huggingface_names(layout: ParameterLayout) -> dict[tuple[str, int], str]:
    """(our tensor, layer) -> their parameter's name without the prefix 'transformer.'; layer 0 where there is none."""
    return {
        (tensor.name, layer): tensor.huggingface_name.format(layer=layer)
        for tensor in layout.tensors
        for layer in range(tensor.num_layers)
    }


def read_huggingface_folder(folder: str | os.PathLike) -> tuple[GPT2Config, np.ndarray]:
    """Sizes and flat buffer (num_parameters,) float32; float16 and bfloat16 weights are widened.

    Raises Gpt2JaxError for a folder without the two files, for a model that is not a GPT-2 that this project can
    compute (another activation, a missing tensor, a wrong shape).
    """
    folder = Path(folder)
    config = read_huggingface_config(folder / "config.json")
    layout = config.layout
    path = folder / "model.safetensors"
    what = "GPT-2 weights in safetensors"
    size = file_size(path, what, _HINT)
    # Before there is a buffer of what may be a damaged config's sizes: no kind of weights takes less than a byte each.
    if size < layout.num_true_parameters:
        raise Gpt2JaxError(f"{path}: expected {what} of {layout.num_true_parameters} parameters, found {size} bytes", _HINT)
    params = np.zeros(layout.num_parameters, dtype=np.float32)
    tensors = layout.views(params)
    try:
        with safe_open(path, framework="numpy") as file:
            stored = set(file.keys())
            prefix = "transformer." if "transformer.wte.weight" in stored else ""
            for (tensor, layer), name in huggingface_names(layout).items():
                if prefix + name not in stored:
                    raise Gpt2JaxError(f"{path}: expected the tensor {prefix + name}, found none", _HINT)
                value = file.get_tensor(prefix + name)
                out = tensors[tensor][layer] if layout[tensor].stacked else tensors[tensor]
                out = out[: layout[tensor].valid_rows]
                value = value.T if layout[tensor].huggingface_transposed else value
                if value.shape != out.shape:
                    raise Gpt2JaxError(f"{path}: expected {prefix + name} of shape {out.shape}, found {value.shape}", _HINT)
                out[...] = value
    except (OSError, SafetensorError) as error:
        raise Gpt2JaxError(f"{path}: expected {what}, found: {error}", _HINT) from None
    return config, params


def read_huggingface_config(path: str | os.PathLike) -> GPT2Config:
    """The sizes in a config.json; Gpt2JaxError as `read_huggingface_folder`."""
    text = read_text_file(path, "a GPT-2 config", _HINT, max_bytes=_MAX_CONFIG_BYTES)
    try:
        config: dict[str, Any] = json.loads(text)
        # transformers writes its own name of the family; a key left out says nothing.
        if family_of_model_type(model_type := config.get("model_type", "gpt2")) is None:
            known = " or ".join(family.huggingface_model_type for family in FAMILIES)
            raise Gpt2JaxError(f"{path}: expected model_type {known}, found {model_type!r}", _HINT)
        sizes = GPT2Config(
            max_sequence_length=int(config["n_positions"]),
            vocab_size=int(config["vocab_size"]),
            num_layers=int(config["n_layer"]),
            num_heads=int(config["n_head"]),
            channels=int(config["n_embd"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise Gpt2JaxError(f"{path}: expected a GPT-2 config with its five sizes, found: {error!r}", _HINT) from None
    # What our forward pass has fixed; a key left out has transformers' default, which is ours.
    for key, expected in (("activation_function", "gelu_new"), ("layer_norm_epsilon", 1e-5), ("tie_word_embeddings", True)):
        if config.get(key, expected) != expected:
            raise Gpt2JaxError(f"{path}: expected {key} = {expected!r}, found {config[key]!r}", _HINT)
    if config.get("n_inner") not in (None, 4 * sizes.channels):
        raise Gpt2JaxError(f"{path}: expected n_inner = {4 * sizes.channels}, found {config['n_inner']!r}", _HINT)
    return sizes
