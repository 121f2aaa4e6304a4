"""Folders as transformers writes them, written with NumPy alone; the names are written out, not taken from the layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from gpt2_jax.families.gpt2 import GPT2Config

OF_A_LAYER = {
    "ln_1.weight": "ln1w",
    "ln_1.bias": "ln1b",
    "attn.c_attn.weight": "qkvw",
    "attn.c_attn.bias": "qkvb",
    "attn.c_proj.weight": "attprojw",
    "attn.c_proj.bias": "attprojb",
    "ln_2.weight": "ln2w",
    "ln_2.bias": "ln2b",
    "mlp.c_fc.weight": "fcw",
    "mlp.c_fc.bias": "fcb",
    "mlp.c_proj.weight": "fcprojw",
    "mlp.c_proj.bias": "fcprojb",
}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def state_dict(
    config: GPT2Config, params: np.ndarray, *, dtype: str = "float32", linear: bool = False
) -> dict[str, np.ndarray]:
    """The state dict of a GPT2LMHeadModel without its classifier; `linear`: weights (out, in), as nanoGPT's."""
    views = config.layout.views(params)
    tensors = {
        "transformer.wte.weight": views["wte"][: config.vocab_size],
        "transformer.wpe.weight": views["wpe"],
        "transformer.ln_f.weight": views["lnfw"],
        "transformer.ln_f.bias": views["lnfb"],
    }
    for layer in range(config.num_layers):
        for theirs, ours in OF_A_LAYER.items():
            value = views[ours][layer]
            tensors[f"transformer.h.{layer}.{theirs}"] = value if linear or value.ndim == 1 else value.T
    return {name: np.ascontiguousarray(value.astype(DTYPES[dtype])) for name, value in tensors.items()}


def config_json(config: GPT2Config) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_positions": config.max_sequence_length,
        "vocab_size": config.vocab_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_embd": config.channels,
    }


def write_config(folder: Path, config: GPT2Config, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config_json(config) | changes), encoding="utf-8")


def write_folder(folder: Path, config: GPT2Config, tensors: dict[str, np.ndarray]) -> Path:
    """config.json and model.safetensors."""
    folder.mkdir(exist_ok=True)
    write_config(folder, config)
    save_file(tensors, folder / "model.safetensors")
    return folder


def cut(tensors: dict[str, Any], num_shards: int, suffix: str) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Shards by their file names, the tensors dealt in turn, and the content of their index."""
    names = [f"model-{i + 1:05}-of-{num_shards:05}.{suffix}" for i in range(num_shards)]
    shards = {name: dict(list(tensors.items())[i::num_shards]) for i, name in enumerate(names)}
    return shards, {"metadata": {}, "weight_map": {tensor: name for name, part in shards.items() for tensor in part}}
