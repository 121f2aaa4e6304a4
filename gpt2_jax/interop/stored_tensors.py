"""The tensors of a Hugging Face folder by name, from one file or from shards, in safetensors or PyTorch's format.

Nothing is read before it is asked for but names, shapes and dtypes, so that a damaged file is refused before there is a
buffer for it.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes as ml_dtypes  # with it imported, safetensors can give NumPy arrays of bfloat16
import numpy as np
from safetensors import SafetensorError, safe_open

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.files import file_size, read_text_file
from gpt2_jax.interop.torch_file import read_torch_file

_MAX_INDEX_BYTES = 10_000_000
_HINT = "a folder that transformers' save_pretrained wrote, with all its files"
_SAFETENSORS = "GPT-2 weights in safetensors"
_PYTORCH = "GPT-2 weights of PyTorch"
# In the order in which transformers looks for them; of each the files that it has, and whether it is an index of shards.
WEIGHTS_FILES = {
    "model.safetensors": (_SAFETENSORS, False),
    "model.safetensors.index.json": (_SAFETENSORS, True),
    "pytorch_model.bin": (_PYTORCH, False),
    "pytorch_model.bin.index.json": (_PYTORCH, True),
}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool", "U8": "uint8"}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file, not yet read."""

    path: Path  # of its file
    hint: str  # how to come by such a file
    shape: tuple[int, ...]
    dtype: str  # NumPy's name, of dtypes that NumPy lacks the file's own
    read: Callable[[], np.ndarray]  # Gpt2JaxError where the file cannot be read

    def refused(self, expected: str, found: object) -> Gpt2JaxError:
        """The error for a file that holds something else than was expected."""
        return Gpt2JaxError(f"{self.path}: expected {expected}, found {found}", self.hint)


_Opener = Callable[[Path, ExitStack], dict[str, StoredTensor]]  # of one file, which the stack closes


@contextmanager
def open_tensors(folder: Path) -> Iterator[dict[str, StoredTensor]]:
    """Every tensor of the folder's weights by its name in the files, which stay open within the block.

    Gpt2JaxError for a folder without weights, a file that cannot be read as what its name says, an index that names
    files elsewhere, and shards that hold other tensors than the index says.
    """
    name = next((name for name in WEIGHTS_FILES if os.path.lexists(folder / name)), None)
    if name is None:
        raise Gpt2JaxError(f"{folder}: expected GPT-2 weights, one of {', '.join(WEIGHTS_FILES)}, found none of them", _HINT)
    what, is_index = WEIGHTS_FILES[name]
    open_file = _open_safetensors if what == _SAFETENSORS else _open_pytorch
    with ExitStack() as stack:
        yield _open_shards(folder / name, open_file, stack) if is_index else open_file(folder / name, stack)


def _open_shards(
    index: Path, open_file: Callable[[Path, ExitStack], dict[str, StoredTensor]], stack: ExitStack
) -> dict[str, StoredTensor]:
    """The tensors of all shards, which must be those of the index."""
    shard_of = _read_index(index)
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(shard_of.values())):
        path = index.with_name(shard)
        found = open_file(path, stack)
        for name in found:
            if shard_of.get(name) != shard:
                place = f"in {shard_of[name]}" if name in shard_of else "in no shard"
                raise Gpt2JaxError(f"{path}: expected {name} {place}, as {index.name} says, found it here", _HINT)
        tensors |= found
    for name, shard in shard_of.items():
        if name not in tensors:
            raise Gpt2JaxError(f"{index.with_name(shard)}: expected {name}, as {index.name} says, found no such tensor", _HINT)
    return tensors


def _read_index(path: Path) -> Mapping[str, str]:
    """The shard of every tensor: names of files that lie beside the index."""
    what = "an index of shards"
    text = read_text_file(path, what, _HINT, max_bytes=_MAX_INDEX_BYTES)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Gpt2JaxError(f"{path}: expected {what} in JSON, found: {error}", _HINT) from None
    shard_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shard_of, dict) or not shard_of:
        raise Gpt2JaxError(f"{path}: expected {what} with a weight_map from tensors to files, found none", _HINT)
    for shard in shard_of.values():
        # Both systems' separators: an index must not reach out of its folder on either.
        if not isinstance(shard, str) or not shard or set(shard) & set("/\\:\0") or shard in (".", ".."):
            raise Gpt2JaxError(f"{path}: expected the names of files beside it, found {shard!r}", _HINT)
    return shard_of


def _open_safetensors(path: Path, stack: ExitStack) -> dict[str, StoredTensor]:
    file_size(path, _SAFETENSORS, _HINT)
    with _reported(path):
        file = stack.enter_context(safe_open(path, framework="numpy"))
        names = list(file.keys())
    if not names:
        raise Gpt2JaxError(f"{path}: expected {_SAFETENSORS}, found no tensor", _HINT)

    def stored(name: str) -> StoredTensor:
        def read() -> np.ndarray:
            with _reported(path):
                return file.get_tensor(name)

        with _reported(path):
            part = file.get_slice(name)
            dtype = part.get_dtype()
            return StoredTensor(path, _HINT, tuple(part.get_shape()), _DTYPES.get(dtype, dtype), read)

    return {name: stored(name) for name in names}


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise Gpt2JaxError(f"{path}: expected {_SAFETENSORS}, found: {error}", _HINT) from None


def _open_pytorch(path: Path, stack: ExitStack) -> dict[str, StoredTensor]:
    folder = str(path.parent)
    convert = f"from transformers import GPT2LMHeadModel as M; M.from_pretrained({folder!r}).save_pretrained({folder!r})"
    without_torch = f"where transformers is installed, to get safetensors: python -c {shlex.quote(convert)}"
    return tensors_of_state(read_torch_file(path, _PYTORCH, _HINT, without_torch=without_torch), path, _HINT)


def tensors_of_state(state: object, path: Path, hint: str) -> dict[str, StoredTensor]:
    """The tensors of a state dict that PyTorch loaded from `path`; Gpt2JaxError, with this hint, for anything else."""
    import torch

    if not isinstance(state, dict) or not state:
        found = "none" if state == {} else type(state).__name__
        raise Gpt2JaxError(f"{path}: expected a state dict, tensors by name, found {found}", hint)

    def stored(name: str, value: torch.Tensor) -> StoredTensor:
        # PyTorch gives NumPy no bfloat16 but its bits; every other dtype is passed on as it is. Nothing is copied.
        def read() -> np.ndarray:
            if value.dtype == torch.bfloat16:
                return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            return value.numpy()

        return StoredTensor(path, hint, tuple(value.shape), str(value.dtype).removeprefix("torch."), read)

    tensors = {}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise Gpt2JaxError(f"{path}: expected only tensors in the state dict, found {type(value).__name__} {name!r}", hint)
        value = value.detach()
        # A damaged file can claim more elements than it holds.
        plain = value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized
        if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise Gpt2JaxError(f"{path}: expected {name} with all its elements, found a tensor of another kind", hint)
        tensors[str(name)] = stored(str(name), value)
    return tensors
