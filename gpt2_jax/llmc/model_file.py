"""llm.c's model files: a header of sizes, then the 16 tensors of the flat buffer.

Version 3 is float32 and version 5 bfloat16, both with the padded vocabulary; these are written. The old versions 1
(float32, unpadded wte) and 4 (bfloat16 with float32 LayerNorms) are read too. Version 2 is refused: its tensor
order changed within one day and cannot be told from the file.
"""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from gpt2_jax.buffer.layout import ParameterLayout
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.files import Writer, atomic_write
from gpt2_jax.llmc.header import (
    HEADER_BYTES,
    MAGIC_MODEL,
    check_size,
    header_words,
    kind_of_file,
    read_array,
    read_header,
)
from gpt2_jax.llmc.rows import Source, read_rows
from gpt2_jax.names import nearest, nearest_path

_PUBLISHED = ("gpt2_124M.bin", "gpt2_124M_bf16.bin", "gpt2_124M_debug_state.bin", "gpt2_tokenizer.bin")
_PUBLISHED_URL = "https://huggingface.co/datasets/chrisdryden/llmcDatasets/resolve/main/"  # llm.c's starter pack
_HUB_NAMES = {"355m": "gpt2-medium", "350m": "gpt2-medium", "774m": "gpt2-large", "1558m": "gpt2-xl"}
_VERSION_OF_DTYPE = {"float32": 3, "bfloat16": 5}
_LAYERNORM_TENSORS = ("ln1w", "ln1b", "ln2w", "ln2b", "lnfw", "lnfb")


def hint_for(path: str | os.PathLike) -> str:
    """The hint for a model file that cannot be read: another model file that is there, of the same run or of a name like
    it; else the command that downloads the GPT-2 of this name."""
    name, meant = os.path.basename(path), nearest_path(path) or Path(path)
    of_the_run = {other.name: other for other in sorted(meant.parent.glob("model_????????.bin")) if other != Path(path)}
    if of_the_run and re.match(r"(model|state|run|DONE)_\d|config\.toml", meant.name):
        other = of_the_run[(nearest(meant.name, of_the_run) or list(of_the_run)[-1:])[0]]
        return f"{shlex.quote(str(other))}   (another model file of the run)"
    if name in _PUBLISHED:
        return f"curl -fL -o {shlex.quote(str(path))} {_PUBLISHED_URL}{name}"
    if meant != Path(path) and (kind_of_file(meant) or "").startswith("a model file"):
        return f"{shlex.quote(str(meant))}   (the nearest name of a model file)"
    hub = next((hub for size, hub in _HUB_NAMES.items() if size in name.lower() or hub == name), "gpt2")
    url = f"https://huggingface.co/openai-community/{hub}/resolve/main/"
    return f"curl -fL --create-dirs -o '{hub}/#1' '{url}{{config.json,model.safetensors}}'   (GPT-2's weights: --init {hub})"


def read_model_config(path: str | os.PathLike) -> GPT2Config:
    """The sizes in a model file's header; the whole header and the file's size are checked, the body is not read."""
    return _read_checked_header(path)[0]


def read_model_dtype(path: str | os.PathLike) -> str:
    """The dtype of a model file by its version, 'float32' or 'bfloat16'; checked as by `read_model_config`."""
    return "float32" if _read_checked_header(path)[1] in (1, 3) else "bfloat16"


def read_model_version(path: str | os.PathLike) -> int:
    """The version of a model file; checked as by `read_model_config`."""
    return _read_checked_header(path)[1]


def read_model_file(path: str | os.PathLike) -> tuple[GPT2Config, np.ndarray]:
    """The sizes and the parameters (num_parameters,) float32 of a model file, in one read for version 3.

    Raises Gpt2JaxError for a wrong magic, version, size in the header, or length of the file, before allocating,
    and for padding rows of wte that are not zero.
    """
    config, version = _read_checked_header(path)
    layout = config.layout
    if version == 3:
        params = read_array(path, "<f4", layout.num_parameters, HEADER_BYTES).astype(np.float32, copy=False)
    elif version == 5:
        params = read_array(path, ml_dtypes.bfloat16, layout.num_parameters, HEADER_BYTES).astype(np.float32)
    else:
        params = _read_old_body(path, version, layout)
    padding_start, padding_stop = layout["wte"].padding_span
    if np.count_nonzero(params[padding_start:padding_stop]):  # np.any warns about signalling NaNs
        raise Gpt2JaxError(
            f"{path}: expected zeros in the padding rows {config.vocab_size} to {config.padded_vocab_size - 1} of wte, "
            f"found other values",
            hint_for(path),
        )
    return config, params


def read_model_rows(path: str | os.PathLike, ranks: Sequence[int], num_ranks: int) -> np.ndarray:
    """The ZeRO-1 parts (len(ranks), num_parameters / num_ranks) float32 of the parameters; nothing else is read."""
    config, version = _read_checked_header(path)
    if version not in (3, 5):
        return config.layout.rows(_read_old_body(path, version, config.layout), num_ranks)[list(ranks)]
    kind = "<f4" if version == 3 else ml_dtypes.bfloat16
    return read_rows([Source(path, HEADER_BYTES)], config.layout, ranks, num_ranks, kind)


def write_model_file(
    path: str | os.PathLike,
    config: GPT2Config,
    params: np.ndarray,
    dtype: str = "float32",
    *,
    write: Writer = atomic_write,
) -> None:
    """Write `params` (num_parameters,) float32 as version 3 ('float32') or 5 ('bfloat16', rounded to nearest even)."""
    layout = config.layout
    if params.shape != (layout.num_parameters,) or params.dtype != np.float32:
        raise Gpt2JaxError(
            f"{path}: expected parameters of shape ({layout.num_parameters},) float32, found {params.shape} {params.dtype}"
        )
    body = params if dtype == "float32" else params.astype(ml_dtypes.bfloat16)
    with write(path) as file:
        file.write(_header(config, dtype))
        file.write(np.ascontiguousarray(body).view(np.uint8).data)  # no copy: the whole buffer in one write


def write_model_parts(
    path: str | os.PathLike, config: GPT2Config, parts: Iterable[np.ndarray], dtype: str, *, write: Writer = atomic_write
) -> None:
    """Write the same file of the parameters in parts, in the buffer's order, of which one is held at a time."""
    count = 0
    with write(path) as file:
        file.write(_header(config, dtype))
        for part in parts:
            body = np.ascontiguousarray(part, dtype=np.float32 if dtype == "float32" else ml_dtypes.bfloat16)
            file.write(body.reshape(-1).view(np.uint8).data)
            count += body.size
        if count != config.layout.num_parameters:
            raise Gpt2JaxError(f"{path}: expected {config.layout.num_parameters} parameters, found {count}")


def read_layer(path: str | os.PathLike, layout: ParameterLayout, name: str, layer: int, dtype: str) -> np.ndarray:
    """One layer of a tensor of a file of version 3 or 5, without padding rows, in the file's dtype; the rest is not read."""
    tensor = layout[name]
    size = math.prod(tensor.shape)
    kind = np.dtype("<f4" if dtype == "float32" else ml_dtypes.bfloat16)
    offset = HEADER_BYTES + kind.itemsize * (tensor.offset + layer * size)
    return read_array(path, kind, size, offset).reshape(tensor.shape)[: tensor.valid_rows]


def _header(config: GPT2Config, dtype: str) -> bytes:
    return header_words(
        {
            0: MAGIC_MODEL,
            1: _VERSION_OF_DTYPE[dtype],
            2: config.max_sequence_length,
            3: config.vocab_size,
            4: config.num_layers,
            5: config.num_heads,
            6: config.channels,
            7: config.padded_vocab_size,
        }
    ).tobytes()


def _read_checked_header(path: str | os.PathLike) -> tuple[GPT2Config, int]:
    """Sizes and version, after every check that needs no body."""
    what = "a model file"
    header, size = read_header(path, what=what, magic=MAGIC_MODEL, versions=(3, 5, 1, 4), hint=hint_for(path))
    version, max_sequence_length, vocab_size, num_layers, num_heads, channels, padded_vocab_size = map(int, header[1:8])
    try:
        config = GPT2Config(max_sequence_length, vocab_size, num_layers, num_heads, channels)
    except Gpt2JaxError as error:
        raise Gpt2JaxError(f"{path}: {error}", hint_for(path)) from None
    if version != 1 and padded_vocab_size != config.padded_vocab_size:
        raise Gpt2JaxError(
            f"{path}: expected a padded vocabulary of {config.padded_vocab_size} rows for {vocab_size} tokens, "
            f"found {padded_vocab_size}",
            hint_for(path),
        )
    layout = config.layout
    if version == 1:
        expected = HEADER_BYTES + 4 * layout.num_true_parameters
    elif version == 3:
        expected = HEADER_BYTES + 4 * layout.num_parameters
    else:
        float32_elements = sum(layout[name].size for name in _LAYERNORM_TENSORS) if version == 4 else 0
        expected = HEADER_BYTES + 2 * layout.num_parameters + 2 * float32_elements
    check_size(path, what=f"{what} of version {version}", size=size, expected=expected, hint=hint_for(path))
    return config, version


def _read_old_body(path: str | os.PathLike, version: int, layout: ParameterLayout) -> np.ndarray:
    """Version 1 lacks wte's padding rows; version 4 mixes float32 LayerNorms into bfloat16."""
    params = np.zeros(layout.num_parameters, dtype=np.float32)
    offset = HEADER_BYTES
    for tensor in layout.tensors:
        stop = layout["wte"].padding_span[0] if version == 1 and tensor.name == "wte" else tensor.stop
        dtype = np.dtype("<f4" if version == 1 or tensor.name in _LAYERNORM_TENSORS else ml_dtypes.bfloat16)
        params[tensor.offset : stop] = read_array(path, dtype, stop - tensor.offset, offset)
        offset += (stop - tensor.offset) * dtype.itemsize
    return params
