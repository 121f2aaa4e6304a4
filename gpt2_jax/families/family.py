"""Model families: their record, and the family that a descriptor, a file or a folder belongs to.

NumPy only. A family is declarations: its sizes, its tensors in file order, and the names by which others know it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from gpt2_jax.buffer.layout import ParameterLayout
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families import gpt2
from gpt2_jax.names import nearest


class FamilyConfig(Protocol):
    """The sizes of one model, hashable, so that a plan can hold them: the properties that every family's sizes have."""

    @property
    def max_sequence_length(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def padded_vocab_size(self) -> int: ...

    @property
    def num_layers(self) -> int: ...

    @property
    def num_heads(self) -> int: ...

    @property
    def channels(self) -> int: ...

    @property
    def layout(self) -> ParameterLayout: ...


@dataclass(frozen=True)
class Family:
    """One family: the names of its models, and the marks of its files."""

    name: str
    descriptors: tuple[str, ...]  # short names of sizes that the family publishes
    is_descriptor: Callable[[str], bool]  # whether a text has the form of one, known or not
    config_from_descriptor: Callable[[str], FamilyConfig]
    file_magic: int  # first word of its model files
    huggingface_model_type: str  # model_type in transformers' config.json


FAMILIES = (
    Family(
        name="gpt2",
        descriptors=gpt2.known_descriptors(),
        is_descriptor=gpt2.is_descriptor,
        config_from_descriptor=gpt2.config_from_descriptor,
        file_magic=gpt2.FILE_MAGIC,
        huggingface_model_type="gpt2",
    ),
)


def is_descriptor(text: str) -> bool:
    """Whether a text has the form of some family's descriptor."""
    return any(family.is_descriptor(text) for family in FAMILIES)


def family_of_descriptor(text: str) -> Family:
    """The family whose descriptors have this form; Gpt2JaxError, listing what is known, for a text of no such form."""
    for family in FAMILIES:
        if family.is_descriptor(text):
            return family
    known = [name for family in FAMILIES for name in family.descriptors]
    raise Gpt2JaxError(
        f"model descriptor: expected one of {', '.join(known)}, found {text!r}", next(iter(nearest(text, known)), "d12")
    )


def family_of_magic(magic: int) -> Family | None:
    """The family whose model files begin with this word; None for another kind of file."""
    return next((family for family in FAMILIES if family.file_magic == magic), None)


def family_of_model_type(model_type: str) -> Family | None:
    """The family that transformers calls by this model_type; None for one that this project does not have."""
    return next((family for family in FAMILIES if family.huggingface_model_type == model_type), None)
