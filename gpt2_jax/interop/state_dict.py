"""From a state dict, tensors by PyTorch's names, to the flat buffer: every tensor is used, checked or refused by name."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np

from gpt2_jax.buffer.layout import ParameterLayout
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.interop.stored_tensors import StoredTensor

# Components that torch.compile, DataParallel and FSDP put into the names of what they wrap.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_BODY = "transformer."  # before all but the classifier; the published gpt2 folders, of the body alone, lack it
_CLASSIFIER = "lm_head.weight"
_MASK = re.compile(r"h\.(?P<layer>\d{1,9})\.attn\.(?:masked_)?bias")
_FLOATS = ("float32", "float16", "bfloat16")
_ROWS_AT_ONCE = 4096
# -10000 as bfloat16 has it; after such a score softmax is 0.
_LARGEST_MASKED_SCORE = -9984.0


def state_dict_names(layout: ParameterLayout) -> Iterator[tuple[str, int, str]]:
    """(our tensor, layer, its parameter's name without the prefix 'transformer.'); layer 0 where there is none."""
    for tensor in layout.tensors:
        for layer in range(tensor.num_layers):
            yield tensor.name, layer, tensor.huggingface_name.format(layer=layer)


def parameters_from(
    config: GPT2Config, stored: Mapping[str, StoredTensor], *, linear_as: str, biases: bool = True
) -> np.ndarray:
    """The flat buffer (num_parameters,) float32 of a state dict, not an empty one; float16 and bfloat16 are widened.

    `linear_as` and `biases` as for `parameter_parts`, which this joins.
    """
    parts = parameter_parts(config, stored, linear_as=linear_as, biases=biases)
    # The first part comes when all has been checked that needs no buffer, whose size may be a damaged config's.
    first = next(parts)
    params = np.zeros(config.layout.num_parameters, dtype=np.float32)
    offset = 0
    for part in itertools.chain([first], parts):
        params[offset : offset + part.size] = part.reshape(-1)
        offset += part.size
    return params


def parameter_parts(
    config: GPT2Config, stored: Mapping[str, StoredTensor], *, linear_as: str, biases: bool = True
) -> Iterator[np.ndarray]:
    """The flat buffer of a state dict in parts, in its order: of each tensor one layer after another, as the file has them
    (float32, float16 or bfloat16), and zeros for padding rows. Only one part need be held at a time.

    `linear_as` says how linear layers hold their weights: 'conv1d' (in, out), as transformers' GPT-2, or 'linear'
    (out, in), as torch.nn.Linear. Without `biases` the model has none, and zeros stand for them.

    Names may have the prefixes of torch.compile, DataParallel and FSDP. Gpt2JaxError before the first part, naming the
    tensor, for one that is missing, doubled, of another shape or dtype, or of no GPT-2; with the last part for a
    classifier that is not the token table, and for a mask that is not causal.
    """
    others, layout = _by_plain_name(stored), config.layout
    parts: list[StoredTensor | tuple[int, ...]] = []  # a shape stands for a tensor of zeros
    for name, _, theirs in state_dict_names(layout):
        declared = layout[name]
        if not biases and theirs.endswith(".bias"):
            parts.append(declared.shape)
            continue
        if theirs not in others:
            raise next(iter(stored.values())).refused(f"the tensor {theirs}", "none")
        tensor = others.pop(theirs)
        shape = (declared.valid_rows or declared.shape[0], *declared.shape[1:])
        transposed = declared.huggingface_transposed and linear_as == "conv1d"
        _check(tensor, theirs, shape[::-1] if transposed else shape, _FLOATS)
        parts.append(dataclasses.replace(tensor, read=partial(_transposed, tensor)) if transposed else tensor)
        if shape[0] < declared.shape[0]:
            parts.append((declared.shape[0] - shape[0], *shape[1:]))
    for theirs, tensor in others.items():
        mask = _MASK.fullmatch(theirs)
        if theirs != _CLASSIFIER and not (mask and int(mask["layer"]) < config.num_layers):
            kind = f"a GPT-2 of {config.num_layers} layers{'' if biases else ' without biases'}"
            raise tensor.refused(f"only tensors of {kind}", theirs)
    table = parts[0]
    assert isinstance(table, StoredTensor)
    for part in parts:
        yield np.zeros(part, np.float32) if isinstance(part, tuple) else part.read()
    for theirs, tensor in others.items():
        if theirs == _CLASSIFIER:
            _check_classifier(tensor, table.read())
        else:
            _check_mask(tensor, theirs, config.max_sequence_length)


def _transposed(tensor: StoredTensor) -> np.ndarray:
    return tensor.read().T


def _by_plain_name(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors by their names without wrappers and the body's prefix."""
    original: dict[str, str] = {}
    for name, tensor in stored.items():
        plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS).removeprefix(_BODY)
        if plain in original:
            raise tensor.refused(f"{plain} once", f"{original[plain]} and {name}")
        original[plain] = name
    return {plain: stored[name] for plain, name in original.items()}


def _check(tensor: StoredTensor, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    if tensor.shape != shape:
        raise tensor.refused(f"{name} of shape {shape}", tensor.shape)
    if tensor.dtype not in dtypes:
        raise tensor.refused(f"{name} in {' or '.join(dtypes)}", tensor.dtype)


def _check_classifier(tensor: StoredTensor, wte_VC: np.ndarray) -> None:
    """A GPT-2's classifier is its token table, which a file may hold twice."""
    _check(tensor, _CLASSIFIER, wte_VC.shape, _FLOATS)
    value_VC = tensor.read()
    for start in range(0, len(wte_VC), _ROWS_AT_ONCE):  # each widened to float32
        mine, theirs = (rows[start : start + _ROWS_AT_ONCE].astype(np.float32, order="C") for rows in (wte_VC, value_VC))
        equal = theirs.view(np.uint32) == mine.view(np.uint32)  # bits, since NaN is not equal to itself
        if not equal.all():
            row, column = map(int, np.unravel_index(np.argmin(equal), equal.shape))
            found = f"{theirs[row, column]:g} for {mine[row, column]:g} at {(start + row, column)}"
            raise tensor.refused(f"{_CLASSIFIER} to be the token table wte.weight", found)


def _check_mask(tensor: StoredTensor, name: str, max_sequence_length: int) -> None:
    """Old files hold the causal mask, and the score of what it hides."""
    dtypes = ("bool", "uint8", *_FLOATS)
    if name.endswith(".masked_bias"):
        _check(tensor, name, (), dtypes)
        if not float(tensor.read()) <= _LARGEST_MASKED_SCORE:
            raise tensor.refused(f"{name} = -10000 or less", f"{float(tensor.read()):g}")
        return
    _check(tensor, name, (1, 1, max_sequence_length, max_sequence_length), dtypes)
    if not np.array_equal(tensor.read()[0, 0].astype(np.float32), np.tri(max_sequence_length, dtype=np.float32)):
        raise tensor.refused(f"{name} to be the causal mask", "another")
