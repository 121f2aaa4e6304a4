"""GPT-2 folders of Hugging Face transformers, written from a llm.c model file one tensor at a time.

safetensors is a length (8 bytes), a JSON header with every tensor's dtype, shape and place, and the tensors. It is written
here, since the library's writer wants all tensors in memory. transformers' linear layers are (in, out): the weights are
transposed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.files import Writer, write_together
from gpt2_jax.interop.state_dict import state_dict_names
from gpt2_jax.llmc.model_file import read_layer, read_model_config, read_model_dtype

SHARD_BYTES = 5_000_000_000  # transformers' own limit of a file
_DTYPES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}


def write_huggingface_folder(
    folder: str | os.PathLike,
    model_file: str | os.PathLike,
    tokenizer_files: Mapping[str, bytes],
    end_of_text: int | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write config.json, generation_config.json, the weights of a model file (version 3 or 5) in its dtype, and a tokenizer's
    files, whose token `end_of_text` ends a text; returns the paths. Weights of more than `shard_bytes` are several files
    with an index.

    The folder must exist. All files get their names together, or on an error none.
    """
    folder = Path(folder)
    config, dtype = read_model_config(model_file), read_model_dtype(model_file)
    tensors = _tensors(config)
    shards = _shards(tensors, _DTYPES[dtype][1], shard_bytes)
    names = [
        "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        for i in range(len(shards))
    ]
    files = {
        "config.json": _json(_config(config, dtype, end_of_text)),
        "generation_config.json": _json(_generation_config(end_of_text)),
    }
    if len(shards) > 1:
        size = sum(math.prod(shape) for _, _, shape in tensors.values()) * _DTYPES[dtype][1]
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        files["model.safetensors.index.json"] = _json({"metadata": {"total_size": size}, "weight_map": weight_map})
    with write_together() as write:
        for name, content in {**files, **tokenizer_files}.items():
            with write(folder / name) as file:
                file.write(content)
        for name, shard in zip(names, shards, strict=True):
            _write_shard(folder / name, model_file, config, {key: tensors[key] for key in shard}, dtype, write)
    return [folder / name for name in (*files, *tokenizer_files, *names)]


_Tensors = dict[str, tuple[str, int, tuple[int, ...]]]  # by transformers' name: ours, layer, transformers' shape


def _tensors(config: GPT2Config) -> _Tensors:
    found: _Tensors = {}
    for name, layer, theirs in state_dict_names(config.layout):
        declared = config.layout[name]
        shape = (declared.valid_rows or declared.shape[0], *declared.shape[1:])
        found[f"transformer.{theirs}"] = (name, layer, shape[::-1] if declared.huggingface_transposed else shape)
    return found


def _shards(tensors: _Tensors, itemsize: int, shard_bytes: int) -> list[list[str]]:
    """The tensors of each file, in order, as many as fit; one that is larger than a file has one of its own."""
    shards: list[list[str]] = []
    room = 0
    for name, (_, _, shape) in tensors.items():
        size = math.prod(shape) * itemsize
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _write_shard(
    path: Path, model_file: str | os.PathLike, config: GPT2Config, tensors: _Tensors, dtype: str, write: Writer
) -> None:
    kind, itemsize = _DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (_, _, shape) in tensors.items():
        size = math.prod(shape) * itemsize
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    with write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, layer, shape in tensors.values():
            values = read_layer(model_file, config.layout, name, layer, dtype)
            values = np.ascontiguousarray(values.T if config.layout[name].huggingface_transposed else values)
            assert values.shape == shape
            file.write(values.reshape(-1).view(np.uint8).data)


def _config(config: GPT2Config, dtype: str, end_of_text: int | None) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "attn_pdrop": 0.0,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": dtype,
        "embd_pdrop": 0.0,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "n_embd": config.channels,
        "n_head": config.num_heads,
        "n_inner": None,
        "n_layer": config.num_layers,
        "n_positions": config.max_sequence_length,
        "resid_pdrop": 0.0,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def _generation_config(end_of_text: int | None) -> dict[str, Any]:
    """How transformers' generate begins and ends a text."""
    ends = {} if end_of_text is None else dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end_of_text)
    return {"_from_model_config": True, **ends}


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
