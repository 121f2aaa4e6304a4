"""GPT-2 in declarations: its sizes, and its 16 tensors in the order of llm.c's checkpoint files. NumPy only."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property

from gpt2_jax.buffer.layout import Normal, ParameterLayout, Tensor
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.names import nearest

FILE_MAGIC = 20240326  # of llm.c's model files
VOCAB_PADDING_MULTIPLE = 128
GPT2_VOCAB_SIZE = 50257
INIT_STD = 0.02
NUM_TENSORS = 16

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
class GPT2Config:
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

    @cached_property
    def layout(self) -> ParameterLayout:
        """Where the 16 tensors lie in the flat buffer."""
        return ParameterLayout(_declarations(self))


def _declarations(config: GPT2Config) -> tuple[Tensor, ...]:
    """The 16 tensors in file order, initialized as llm.c does (train_gpt2.cu, gpt_build_from_descriptor)."""
    V, T, L, C = config.padded_vocab_size, config.max_sequence_length, config.num_layers, config.channels
    normal, residual = Normal(INIT_STD), Normal(INIT_STD / math.sqrt(2 * L))

    def matrix(name: str, rows: int, columns: int, init: Normal, theirs: str) -> Tensor:
        return Tensor(
            *(name, (rows, columns), L),
            decays=True,
            multiplies=True,
            init=init,
            huggingface_name=f"h.{{layer}}.{theirs}.weight",
            huggingface_transposed=True,
        )

    def vector(name: str, size: int, theirs: str, init: float = 0.0) -> Tensor:
        return Tensor(name, (size,), L, init=init, huggingface_name=f"h.{{layer}}.{theirs}")

    return (
        Tensor(
            *("wte", (V, C)),
            decays=True,
            multiplies=True,
            init=normal,
            valid_rows=config.vocab_size,
            huggingface_name="wte.weight",
        ),
        Tensor("wpe", (T, C), decays=True, init=normal, huggingface_name="wpe.weight"),
        vector("ln1w", C, "ln_1.weight", init=1.0),
        vector("ln1b", C, "ln_1.bias"),
        matrix("qkvw", 3 * C, C, normal, "attn.c_attn"),
        vector("qkvb", 3 * C, "attn.c_attn.bias"),
        matrix("attprojw", C, C, residual, "attn.c_proj"),
        vector("attprojb", C, "attn.c_proj.bias"),
        vector("ln2w", C, "ln_2.weight", init=1.0),
        vector("ln2b", C, "ln_2.bias"),
        matrix("fcw", 4 * C, C, normal, "mlp.c_fc"),
        vector("fcb", 4 * C, "mlp.c_fc.bias"),
        matrix("fcprojw", C, 4 * C, residual, "mlp.c_proj"),
        vector("fcprojb", C, "mlp.c_proj.bias"),
        Tensor("lnfw", (C,), init=1.0, huggingface_name="ln_f.weight"),
        Tensor("lnfb", (C,), huggingface_name="ln_f.bias"),
    )


def known_descriptors() -> tuple[str, ...]:
    """Every model descriptor that `config_from_descriptor` accepts in its short form."""
    return tuple([f"d{depth}" for depth in _GPT2_DEPTHS] + [f"gpt3:c{channels}" for channels in _GPT3_CHANNELS])


_DESCRIPTOR = re.compile(r"(?:gpt2:)?d(?P<depth>\d{1,6})|gpt3:c(?P<channels>\d{1,6})")


def is_descriptor(text: str) -> bool:
    """True for text that has the form of a descriptor ('d12', 'gpt2:d48', 'gpt3:c768'), known or not."""
    return _DESCRIPTOR.fullmatch(text) is not None


def config_from_descriptor(descriptor: str) -> GPT2Config:
    """Sizes of llm.c's descriptors: 'dN' or 'gpt2:dN' (N layers), 'gpt3:cN' (N channels).

    Raises Gpt2JaxError, listing what is known, for anything else.
    """
    match = _DESCRIPTOR.fullmatch(descriptor)
    if match and match["depth"] and (depth := int(match["depth"])) in _GPT2_DEPTHS:
        channels, heads = _GPT2_DEPTHS[depth]
        return GPT2Config(1024, GPT2_VOCAB_SIZE, depth, heads, channels)
    if match and match["channels"] and (channels := int(match["channels"])) in _GPT3_CHANNELS:
        layers, head_size = _GPT3_CHANNELS[channels]
        return GPT2Config(2048, GPT2_VOCAB_SIZE, layers, channels // head_size, channels)
    known = known_descriptors()
    raise Gpt2JaxError(
        f"model descriptor: expected one of {', '.join(known)}, found {descriptor!r}",
        next(iter(nearest(descriptor, known)), "d12"),
    )
