"""Which family a descriptor, file or folder belongs to."""

from __future__ import annotations

import pytest

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.family import FAMILIES, family_of_descriptor, family_of_magic, family_of_model_type, is_descriptor


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_is_found_by_its_descriptors_files_and_folders(family):
    for descriptor in family.descriptors:
        assert is_descriptor(descriptor)
        assert family_of_descriptor(descriptor) is family
        assert family.config_from_descriptor(descriptor).layout.num_parameters > 0
    assert family_of_magic(family.file_magic) is family
    assert family_of_model_type(family.huggingface_model_type) is family


def test_what_no_family_knows_is_nobodys():
    assert not is_descriptor("model.bin")
    assert family_of_magic(0) is None
    assert family_of_model_type("bert") is None
    with pytest.raises(Gpt2JaxError, match=r"expected one of d6.*found 'e12'"):
        family_of_descriptor("e12")
