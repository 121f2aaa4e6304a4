"""Which tensors a GPT-2 has and where each one lies in the flat buffer. NumPy only.

Parameters, gradients and both AdamW moments are each ONE float32 array of `num_parameters` elements, in the
order of llm.c's checkpoint files: 16 tensors back to back, row-major, every layer stacked on the leading axis,
weights as (out, in). Nobody else in the project knows an offset.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gpt2_jax.errors import Gpt2JaxError

VOCAB_PADDING_MULTIPLE = 128
GPT2_VOCAB_SIZE = 50257

# depth -> (channels, heads); position table of 1024. llm.c train_gpt2.cu gpt2_set_hyperparameters.
_GPT2_DEPTHS = {
    6: (384, 6),
    12: (768, 12),
    24: (1024, 16),
    36: (1280, 20),
    48: (1600, 25),
    60: (1920, 30),
    72: (2880, 30),
    84: (3456, 36),
}
# channels -> (layers, head size); position table of 2048. llm.c train_gpt2.cu gpt3_set_hyperparameters. llm.c's own
# entry for 5140 channels (40 layers, head size 128) is left out: 128 does not divide 5140, so it always fails there.
_GPT3_CHANNELS = {
    384: (6, 64),
    768: (12, 64),
    1024: (24, 64),
    1536: (24, 96),
    2048: (24, 128),
    2560: (32, 80),
    4096: (32, 128),
    12288: (96, 128),
}


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a GPT-2; all that a model file's header holds.

    Raises Gpt2JaxError when a size is not positive or the heads do not divide the channels.
    """

    max_sequence_length: int
    vocab_size: int
    num_layers: int
    num_heads: int
    channels: int

    def __post_init__(self) -> None:
        for name in ("max_sequence_length", "vocab_size", "num_layers", "num_heads", "channels"):
            if getattr(self, name) < 1:
                raise Gpt2JaxError(f"model size {name}: expected at least 1, found {getattr(self, name)}")
        if self.channels % self.num_heads:
            raise Gpt2JaxError(
                f"model sizes: expected channels to be a multiple of num_heads, "
                f"found {self.channels} channels and {self.num_heads} heads"
            )

    @property
    def head_size(self) -> int:
        return self.channels // self.num_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of wte: the vocabulary rounded up to a multiple of 128; the rows beyond it are always zero."""
        return -(-self.vocab_size // VOCAB_PADDING_MULTIPLE) * VOCAB_PADDING_MULTIPLE


def known_descriptors() -> list[str]:
    """Every model descriptor that `model_config_from_descriptor` accepts in its short form."""
    return [f"d{depth}" for depth in _GPT2_DEPTHS] + [f"gpt3:c{channels}" for channels in _GPT3_CHANNELS]


_DESCRIPTOR = re.compile(r"(?:gpt2:)?d(?P<depth>\d{1,6})|gpt3:c(?P<channels>\d{1,6})")


def is_descriptor(text: str) -> bool:
    """True for text that has the form of a descriptor ('d12', 'gpt2:d48', 'gpt3:c768'), known or not."""
    return _DESCRIPTOR.fullmatch(text) is not None


def model_config_from_descriptor(descriptor: str) -> ModelConfig:
    """Sizes of llm.c's descriptors: 'dN' or 'gpt2:dN' (N layers), 'gpt3:cN' (N channels).

    Raises Gpt2JaxError, listing what is known, for anything else.
    """
    match = _DESCRIPTOR.fullmatch(descriptor)
    if match and match["depth"] and (depth := int(match["depth"])) in _GPT2_DEPTHS:
        channels, heads = _GPT2_DEPTHS[depth]
        return ModelConfig(1024, GPT2_VOCAB_SIZE, depth, heads, channels)
    if match and match["channels"] and (channels := int(match["channels"])) in _GPT3_CHANNELS:
        layers, head_size = _GPT3_CHANNELS[channels]
        return ModelConfig(2048, GPT2_VOCAB_SIZE, layers, channels // head_size, channels)
    raise Gpt2JaxError(
        f"model descriptor: expected one of {', '.join(known_descriptors())}, found {descriptor!r}",
        "python scripts/train.py --init d12",
    )


@dataclass(frozen=True)
class TensorSpec:
    """One of the 16 tensors: its full shape (stacked over layers), its place in the buffer, whether it decays."""

    name: str
    shape: tuple[int, ...]
    offset: int
    decays: bool
    stacked: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)  # exact: a damaged header may ask for more than 64 bits hold

    @property
    def stop(self) -> int:
        return self.offset + self.size

    @property
    def num_layers(self) -> int:
        """Layers that are stacked in the tensor; 1 for a tensor that is not stacked."""
        return self.shape[0] if self.stacked else 1

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Shape of one layer's part; the whole shape for a tensor that is not stacked."""
        return self.shape[1:] if self.stacked else self.shape

    @property
    def layer_size(self) -> int:
        """Elements of one layer's part."""
        return math.prod(self.layer_shape)

    def layer_offset(self, layer: int) -> int:
        """Offset of one layer's part in the buffer."""
        return self.offset + layer * self.layer_size if self.stacked else self.offset


class ParameterLayout:
    """Names, shapes, offsets and decay of the 16 tensors of one model, in llm.c's checkpoint order."""

    NUM_TENSORS = 16

    def __init__(self, config: ModelConfig):
        self.config = config
        V, T, L, C = config.padded_vocab_size, config.max_sequence_length, config.num_layers, config.channels
        # name, shape, decays; the tensors from ln1w to fcprojb are stacked over the L layers.
        declarations: list[tuple[str, tuple[int, ...], bool]] = [
            ("wte", (V, C), True),
            ("wpe", (T, C), True),
            ("ln1w", (L, C), False),
            ("ln1b", (L, C), False),
            ("qkvw", (L, 3 * C, C), True),
            ("qkvb", (L, 3 * C), False),
            ("attprojw", (L, C, C), True),
            ("attprojb", (L, C), False),
            ("ln2w", (L, C), False),
            ("ln2b", (L, C), False),
            ("fcw", (L, 4 * C, C), True),
            ("fcb", (L, 4 * C), False),
            ("fcprojw", (L, C, 4 * C), True),
            ("fcprojb", (L, C), False),
            ("lnfw", (C,), False),
            ("lnfb", (C,), False),
        ]
        tensors = []
        offset = 0
        for name, shape, decays in declarations:
            tensor = TensorSpec(name, shape, offset, decays, stacked=name not in ("wte", "wpe", "lnfw", "lnfb"))
            tensors.append(tensor)
            offset = tensor.stop
        self.tensors: tuple[TensorSpec, ...] = tuple(tensors)
        self.num_parameters: int = offset

    @cached_property
    def _by_name(self) -> dict[str, TensorSpec]:
        return {tensor.name: tensor for tensor in self.tensors}

    def __getitem__(self, name: str) -> TensorSpec:
        return self._by_name[name]

    # A layout is determined by its sizes, so it can be a static argument of a compiled function.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, ParameterLayout) and self.config == other.config

    def __hash__(self) -> int:
        return hash(self.config)

    @property
    def num_true_parameters(self) -> int:
        """Parameters without the padding rows of wte: the number usually quoted (124,439,808 for d12)."""
        return self.num_parameters - (self.padding_span[1] - self.padding_span[0])

    @property
    def padding_span(self) -> tuple[int, int]:
        """[start, stop) of the padding rows of wte, which hold exact zeros in every buffer."""
        return self.config.vocab_size * self.config.channels, self["wte"].stop

    @property
    def decay_spans(self) -> tuple[tuple[int, int], ...]:
        """[start, stop) of every maximal run of elements that weight decay applies to, in order."""
        spans: list[tuple[int, int]] = []
        for tensor in self.tensors:
            if tensor.decays and spans and spans[-1][1] == tensor.offset:
                spans[-1] = (spans[-1][0], tensor.stop)
            elif tensor.decays:
                spans.append((tensor.offset, tensor.stop))
        return tuple(spans)

    def views(self, buffer: np.ndarray) -> dict[str, np.ndarray]:
        """The 16 tensors as NumPy views into `buffer` (num_parameters,): writing to a view writes to the buffer."""
        if buffer.shape != (self.num_parameters,):
            raise Gpt2JaxError(f"flat buffer: expected shape ({self.num_parameters},), found {buffer.shape}")
        return {tensor.name: buffer[tensor.offset : tensor.stop].reshape(tensor.shape) for tensor in self.tensors}
