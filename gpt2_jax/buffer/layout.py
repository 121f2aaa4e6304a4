"""Where each tensor of a model lies in the flat buffer. NumPy only.

Parameters, gradients and both AdamW moments are each ONE float32 array of `num_parameters` elements: the tensors that the
model's family declares, back to back in file order, row-major, every layer stacked on the leading axis, weights as
(out, in). Offsets are computed here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.names import nearest


@dataclass(frozen=True)
class Normal:
    """Random initialization: normally distributed around 0 with this standard deviation."""

    std: float


@dataclass(frozen=True)
class Tensor:
    """The declaration of one tensor of a model family."""

    name: str
    shape: tuple[int, ...]  # of one layer
    layers: int | None = None  # number of layers that are stacked; None: the model has the tensor once
    decays: bool = False  # whether weight decay applies
    multiplies: bool = False  # whether it is the weight (out, in) of a matrix product
    init: Normal | float = 0.0  # a float fills the tensor
    valid_rows: int | None = None  # rows from here on are padding and hold zeros in every buffer; None: there is no padding
    huggingface_name: str = ""  # of transformers' parameter; '{layer}' stands for the layer's number
    huggingface_transposed: bool = False  # transformers stores (in, out)
    trains: bool = True  # False: it is frozen, and no step changes it or its moments


@dataclass(frozen=True)
class PlacedTensor(Tensor):
    """A declared tensor at its place in the buffer; sizes and offsets are in elements."""

    offset: int = 0

    @property
    def stacked(self) -> bool:
        return self.layers is not None

    @property
    def num_layers(self) -> int:
        """Layers that are stacked in the tensor; 1 for a tensor that the model has once."""
        return 1 if self.layers is None else self.layers

    @property
    def full_shape(self) -> tuple[int, ...]:
        """The shape with all layers."""
        return self.shape if self.layers is None else (self.layers, *self.shape)

    @property
    def layer_size(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        return self.num_layers * self.layer_size  # exact: a damaged header may ask for more than 64 bits hold

    @property
    def stop(self) -> int:
        return self.offset + self.size

    def layer_offset(self, layer: int) -> int:
        """Offset of one layer's part in the buffer."""
        return self.offset + layer * self.layer_size

    def of_layer(self, layer: int) -> PlacedTensor:
        """One layer's part as a tensor of its own."""
        return dataclasses.replace(self, layers=None, offset=self.layer_offset(layer))

    @property
    def padding_span(self) -> tuple[int, int]:
        """[start, stop) of the padding rows; empty without padding."""
        rows = self.shape[0] if self.valid_rows is None else self.valid_rows
        return self.offset + rows * math.prod(self.shape[1:]), self.stop


class ParameterLayout:
    """The places of declared tensors, in the order of their declaration. Two layouts of equal declarations are equal."""

    def __init__(self, declarations: tuple[Tensor, ...]):
        self._declarations = declarations
        placed, offset = [], 0
        for declaration in declarations:
            fields = {field.name: getattr(declaration, field.name) for field in dataclasses.fields(Tensor)}
            placed.append(PlacedTensor(**fields, offset=offset))
            offset = placed[-1].stop
        self.tensors: tuple[PlacedTensor, ...] = tuple(placed)
        self.num_parameters: int = offset
        self._hash = hash(declarations)

    @cached_property
    def _by_name(self) -> dict[str, PlacedTensor]:
        return {tensor.name: tensor for tensor in self.tensors}

    def __getitem__(self, name: str) -> PlacedTensor:
        return self._by_name[name]

    # A layout can be part of a static argument of a compiled function.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, ParameterLayout) and self._declarations == other._declarations

    def __hash__(self) -> int:
        return self._hash

    @property
    def num_true_parameters(self) -> int:
        """Parameters without padding rows: the number usually quoted (124,439,808 for GPT-2 d12)."""
        return self.num_parameters - sum(stop - start for start, stop in self.padding_spans)

    @property
    def padding_spans(self) -> tuple[tuple[int, int], ...]:
        """[start, stop) of all padding rows, which hold exact zeros in every buffer."""
        return tuple(tensor.padding_span for tensor in self.tensors if tensor.valid_rows is not None)

    @property
    def update_spans(self) -> tuple[tuple[int, int, bool], ...]:
        """(start, stop, whether weight decay applies) of every maximal run of elements that steps update, in order."""
        spans: list[tuple[int, int, bool]] = []
        for tensor in self.tensors:
            if not tensor.trains:
                continue
            if spans and spans[-1][1:] == (tensor.offset, tensor.decays):
                spans[-1] = (spans[-1][0], tensor.stop, tensor.decays)
            else:
                spans.append((tensor.offset, tensor.stop, tensor.decays))
        return tuple(spans)

    @property
    def decay_spans(self) -> tuple[tuple[int, int], ...]:
        """[start, stop) of every maximal run of elements that weight decay applies to, in order."""
        return tuple((start, stop) for start, stop, decays in self.update_spans if decays)

    @property
    def frozen_names(self) -> tuple[str, ...]:
        """The tensors that no step changes."""
        return tuple(tensor.name for tensor in self.tensors if not tensor.trains)

    def frozen(self, patterns: Sequence[str]) -> ParameterLayout:
        """The same places, where the tensors that one of the shell patterns matches do not train.

        Gpt2JaxError for a pattern that matches none, and where nothing would be left to train.
        """
        names = [tensor.name for tensor in self.tensors]
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                close = nearest(pattern, names)
                raise Gpt2JaxError(
                    f"--freeze: expected names of tensors ({', '.join(names)}) or patterns such as ln*, found {pattern!r}",
                    f"--freeze {close[0] if close else 'wte,wpe'}",
                )
        frozen = {name for pattern in patterns for name in fnmatch.filter(names, pattern)}
        if len(frozen) == len(names):
            raise Gpt2JaxError("--freeze: expected a tensor that is left to train, found none", "--freeze wte,wpe")
        return ParameterLayout(
            tuple(dataclasses.replace(each, trains=each.trains and each.name not in frozen) for each in self._declarations)
        )

    def views(self, buffer: np.ndarray) -> dict[str, np.ndarray]:
        """The tensors as NumPy views into `buffer` (num_parameters,): writing to a view writes to the buffer."""
        if buffer.shape != (self.num_parameters,):
            raise Gpt2JaxError(f"flat buffer: expected shape ({self.num_parameters},), found {buffer.shape}")
        return {tensor.name: buffer[tensor.offset : tensor.stop].reshape(tensor.full_shape) for tensor in self.tensors}

    def rows(self, buffer: np.ndarray, num_parts: int) -> np.ndarray:
        """The parts of a buffer (num_parameters,), by rank: a copy (num_parts, num_parameters / num_parts)."""
        parts = self.part(num_parts).tensors  # refuses a number that does not divide every layer
        rows = np.empty((num_parts, self.num_parameters // num_parts), buffer.dtype)
        for tensor, part in zip(self.tensors, parts, strict=True):
            piece = buffer[tensor.offset : tensor.stop].reshape(tensor.num_layers, num_parts, -1)
            rows[:, part.offset : part.stop] = piece.swapaxes(0, 1).reshape(num_parts, -1)
        return rows

    def part(self, num_parts: int) -> ParameterLayout:
        """The layout of one of `num_parts` equal parts of the buffer: llm.c's ZeRO-1 part.

        Part r holds of every layer of every tensor the elements [r * s, (r + 1) * s), s being the layer's size over the
        number of parts; so it is a flat buffer of the same tensors, each layer of s elements. Gpt2JaxError if a layer
        cannot be divided so.
        """
        for tensor in self.tensors:
            if tensor.layer_size % num_parts:
                raise Gpt2JaxError(
                    f"ZeRO-1: expected a number of parts that divides the {tensor.layer_size} elements of each layer of "
                    f"{tensor.name}, found {num_parts}"
                )
        return ParameterLayout(
            tuple(
                dataclasses.replace(declaration, shape=(placed.layer_size // num_parts,), valid_rows=None)
                for declaration, placed in zip(self._declarations, self.tensors, strict=True)
            )
        )
