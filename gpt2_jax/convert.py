"""A model from one format to another: llm.c's file, a Hugging Face folder, nanoGPT's ckpt.pt; one tensor in memory at a time.

Every way leads over a llm.c model file: the source itself, the result itself, or one beside the result that goes again.
"""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2_jax.data.tokenizer import gpt2_tokenizer, huggingface_files, tokenizer_beside, tokenizer_from_file
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.interop.huggingface import open_huggingface_folder
from gpt2_jax.interop.huggingface_config import read_end_of_text
from gpt2_jax.interop.huggingface_writer import SHARD_BYTES, write_huggingface_folder
from gpt2_jax.interop.nanogpt import is_nanogpt_checkpoint, open_nanogpt_checkpoint, write_nanogpt_checkpoint
from gpt2_jax.interop.state_dict import parameter_parts, state_dict_names
from gpt2_jax.interop.stored_tensors import WEIGHTS_FILES, StoredTensor
from gpt2_jax.llmc.model_file import (
    read_layer,
    read_model_config,
    read_model_dtype,
    read_model_file,
    read_model_version,
    write_model_file,
    write_model_parts,
)

LLMC, HUGGINGFACE, NANOGPT = "llmc", "huggingface", "nanogpt"
_TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class Converted(NamedTuple):
    """What a conversion has written."""

    paths: list[Path]
    config: GPT2Config
    dtype: str
    num_parameters: int


def kind_of_target(target: str) -> str:
    """The format that a name stands for: NAME.bin, NAME.pt, else a folder."""
    if is_nanogpt_checkpoint(target):
        return NANOGPT
    return LLMC if Path(target).suffix == ".bin" else HUGGINGFACE


def convert(
    source: str,
    target: str,
    kind: str,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    say: Callable[[str], None] = print,
) -> Converted:
    """Write the model of `source` (a model file, a Hugging Face folder or nanoGPT's ckpt.pt) to `target`, in the source's
    dtype unless `dtype` says 'float32' or 'bfloat16' (rounded to the nearest); float16 becomes float32.

    Gpt2JaxError for a target that exists (but for an empty folder), and whatever the readers refuse.
    """
    path = Path(target)
    _refuse_used(path, kind)
    where = path.parent if kind != HUGGINGFACE else path
    is_new = not where.exists()
    try:
        where.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Gpt2JaxError(f"{where}: expected a folder to write to, found: {error.strerror}") from None
    try:
        if kind == LLMC:
            written = _to_model_file(source, path, dtype, say)
            return Converted([path], *written, num_parameters=read_model_config(path).layout.num_true_parameters)
        with _as_model_file(source, where, dtype, say) as model_file:
            config, found = read_model_config(model_file), read_model_dtype(model_file)
            if kind == NANOGPT:
                write_nanogpt_checkpoint(path, model_file)
                paths = [path]
            else:
                paths = write_huggingface_folder(path, model_file, *_tokenizer(source, config, say), shard_bytes=shard_bytes)
            return Converted(paths, config, found, config.layout.num_true_parameters)
    except BaseException:
        if is_new:
            shutil.rmtree(where, ignore_errors=True)
        raise


def differing_tensor(source: str, target: str, dtype: str) -> str | None:
    """Read both models, in the dtype of the target one tensor at a time: the name of the first that differs in a bit, or
    None."""
    with _parts(source) as (config, parts), _parts(target) as (other, others):
        if config != other:
            return "the sizes"
        kind = np.dtype(np.float32) if dtype == "float32" else _bfloat16()
        names = _names_of_parts(config)
        for name, part, twin in zip(names, parts, others, strict=False):
            mine, theirs = (np.ascontiguousarray(array, dtype=kind).view(np.uint8) for array in (part, twin))
            if not np.array_equal(mine, theirs):
                return name
    return None


def _bfloat16() -> np.dtype:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def _refuse_used(path: Path, kind: str) -> None:
    if not os.path.lexists(path) or (kind == HUGGINGFACE and path.is_dir() and not any(path.iterdir())):
        return
    other = path.with_name(f"{path.stem}-2{path.suffix}")
    what = "folder" if kind == HUGGINGFACE else "file"
    raise Gpt2JaxError(f"{path}: expected a new {what}, found that it exists", shlex.quote(str(other)))


def _to_model_file(source: str, path: Path, dtype: str | None, say: Callable[[str], None]) -> tuple[GPT2Config, str]:
    """Write the source as a model file of version 3 or 5; the sizes and the dtype."""
    if _is_model_file(source) and read_model_version(source) in (1, 4):
        config, params = read_model_file(source)  # old versions are read whole
        found = dtype or read_model_dtype(source)
        write_model_file(path, config, params, found)
        return config, found
    with _parts(source, say) as (config, parts):
        found = dtype or _dtype(source)
        write_model_parts(path, config, parts, found)
        return config, found


@contextmanager
def _as_model_file(source: str, where: Path, dtype: str | None, say: Callable[[str], None]) -> Iterator[Path]:
    """The source as a model file of version 3 or 5 and this dtype: itself, or one that is removed after the block."""
    if _is_model_file(source) and read_model_version(source) in (3, 5) and dtype in (None, read_model_dtype(source)):
        yield Path(source)
        return
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=where) as folder:
        path = Path(folder) / "model.bin"
        _to_model_file(source, path, dtype, say)
        yield path


def _is_model_file(source: str) -> bool:
    return not (os.path.isdir(source) or os.path.basename(source) in WEIGHTS_FILES or is_nanogpt_checkpoint(source))


def _folder_of(source: str) -> str:
    return source if os.path.isdir(source) else os.path.dirname(source) or "."


@contextmanager
def _tensors(source: str, say: Callable[[str], None]) -> Iterator[tuple[GPT2Config, Mapping[str, StoredTensor], str, bool]]:
    """Sizes, tensors by name, how linear layers are stored, and whether there are biases."""
    if is_nanogpt_checkpoint(source):
        with open_nanogpt_checkpoint(source, say=say) as (config, tensors, biases):
            yield config, tensors, "linear", biases
    else:
        with open_huggingface_folder(_folder_of(source), say=say) as (config, tensors):
            yield config, tensors, "conv1d", True


@contextmanager
def _parts(source: str, say: Callable[[str], None] = lambda text: None) -> Iterator[tuple[GPT2Config, Iterator[np.ndarray]]]:
    """The sizes and the parameters in parts, as `parameter_parts` gives them."""
    if not _is_model_file(source):
        with _tensors(source, say) as (config, tensors, linear_as, biases):
            yield config, parameter_parts(config, tensors, linear_as=linear_as, biases=biases)
        return
    config, dtype = read_model_config(source), read_model_dtype(source)
    if read_model_version(source) in (1, 4):
        params = read_model_file(source)[1]
        yield config, _parts_of_buffer(config, lambda name, layer: _layer(config, params, name, layer))
    else:
        yield config, _parts_of_buffer(config, lambda name, layer: read_layer(source, config.layout, name, layer, dtype))


def _layer(config: GPT2Config, params: np.ndarray, name: str, layer: int) -> np.ndarray:
    tensor, view = config.layout[name], config.layout.views(params)[name]
    return (view[layer] if tensor.stacked else view)[: tensor.valid_rows]


def _parts_of_buffer(config: GPT2Config, read: Callable[[str, int], np.ndarray]) -> Iterator[np.ndarray]:
    for name, layer, _ in state_dict_names(config.layout):
        values = read(name, layer)
        yield values
        if missing := config.layout[name].shape[0] - values.shape[0]:
            yield np.zeros((missing, *values.shape[1:]), np.float32)


def _names_of_parts(config: GPT2Config) -> Iterator[str]:
    """transformers' names of the parts, those of padding rows too."""
    for name, _, theirs in state_dict_names(config.layout):
        yield theirs
        if config.layout[name].valid_rows not in (None, config.layout[name].shape[0]):
            yield f"the padding rows of {theirs}"


def _dtype(source: str) -> str:
    """The dtype that holds all of a source's values: bfloat16 where all tensors have it, else float32."""
    if _is_model_file(source):
        return read_model_dtype(source)
    with _tensors(source, lambda text: None) as (_, tensors, _, _):
        return "bfloat16" if all(tensor.dtype == "bfloat16" for tensor in tensors.values()) else "float32"


def _tokenizer(source: str, config: GPT2Config, say: Callable[[str], None]) -> tuple[dict[str, bytes], int | None]:
    """The tokenizer's files and its end of text: those beside the source's weights, that of a run's own vocabulary, else
    GPT-2's where the model has as many ids."""
    tokenizer, name = gpt2_tokenizer(), "GPT-2's"
    if _is_model_file(source) and (path := tokenizer_beside(source)) is not None:
        tokenizer, name = tokenizer_from_file(path), str(path)
    elif not _is_model_file(source) and not is_nanogpt_checkpoint(source):
        folder = Path(_folder_of(source))
        found = {name: (folder / name).read_bytes() for name in _TOKENIZER_FILES if (folder / name).is_file()}
        if found:
            return found, read_end_of_text(folder / "config.json")
    if config.vocab_size < tokenizer.n_vocab:
        say(f"{source}: no tokenizer is written, as {name} has {tokenizer.n_vocab} tokens, the model {config.vocab_size}")
        return {}, None
    return huggingface_files(tokenizer, config.max_sequence_length), tokenizer.eot_token
