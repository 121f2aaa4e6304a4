"""The layout against llm.c's published numbers, and its invariants for any sizes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2Config, config_from_descriptor, is_descriptor, known_descriptors

D12_OFFSETS = {
    "wte": 0,
    "wpe": 38_633_472,
    "ln1w": 39_419_904,
    "ln1b": 39_429_120,
    "qkvw": 39_438_336,
    "qkvb": 60_672_000,
    "attprojw": 60_699_648,
    "attprojb": 67_777_536,
    "ln2w": 67_786_752,
    "ln2b": 67_795_968,
    "fcw": 67_805_184,
    "fcb": 96_116_736,
    "fcprojw": 96_153_600,
    "fcprojb": 124_465_152,
    "lnfw": 124_474_368,
    "lnfb": 124_475_136,
}


def sizes() -> st.SearchStrategy[GPT2Config]:
    return st.builds(
        lambda positions, vocab, layers, heads, head_size: GPT2Config(positions, vocab, layers, heads, heads * head_size),
        *(st.integers(1, 300), st.integers(1, 500), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5)),
    )


def test_d12_has_llmc_offsets_in_llmc_order():
    layout = config_from_descriptor("d12").layout
    assert {tensor.name: tensor.offset for tensor in layout.tensors} == D12_OFFSETS
    assert [tensor.name for tensor in layout.tensors] == list(D12_OFFSETS)
    assert layout.num_parameters == 124_475_904


@pytest.mark.parametrize(
    ("descriptor", "padded", "true"),
    [
        ("d6", 30_357_504, 30_339_456),
        ("d12", 124_475_904, 124_439_808),
        ("d24", 354_871_296, 354_823_168),
        ("d36", 774_090_240, 774_030_080),
        ("gpt2:d48", 1_557_686_400, 1_557_611_200),
        ("gpt3:c768", 125_262_336, 125_226_240),
    ],
)
def test_number_of_parameters(descriptor, padded, true):
    layout = config_from_descriptor(descriptor).layout
    assert (layout.num_parameters, layout.num_true_parameters) == (padded, true)


def test_d12_decay_goes_by_tensor_not_by_dimensions():
    layout = config_from_descriptor("d12").layout
    decayed = sum(stop - start for start, stop in layout.decay_spans)
    padding = layout["wte"].padding_span[1] - layout["wte"].padding_span[0]
    assert decayed - padding == 124_318_464
    assert layout.num_parameters - decayed == 121_344
    assert [i for i, tensor in enumerate(layout.tensors) if tensor.decays] == [0, 1, 4, 6, 10, 12]


@given(sizes())
def test_tensors_fill_the_buffer_without_gaps(config):
    layout = config.layout
    position = 0
    for tensor in layout.tensors:
        assert tensor.offset == position
        position = tensor.stop
    assert position == layout.num_parameters
    assert config.padded_vocab_size % 128 == 0
    assert 0 <= config.padded_vocab_size - config.vocab_size < 128


@given(sizes())
def test_decay_spans_cover_just_the_decayed_tensors(config):
    layout = config.layout
    covered = np.zeros(layout.num_parameters, dtype=bool)
    for start, stop in layout.decay_spans:
        assert not covered[start:stop].any()
        covered[start:stop] = True
    for tensor in layout.tensors:
        assert covered[tensor.offset : tensor.stop].all() == tensor.decays
        assert covered[tensor.offset : tensor.stop].any() == tensor.decays


@given(sizes())
def test_views_are_views_and_layers_lie_where_layer_offset_says(config):
    layout = config.layout
    buffer = np.arange(layout.num_parameters, dtype=np.float32)
    for name, view in layout.views(buffer).items():
        assert np.shares_memory(view, buffer)
        tensor = layout[name]
        for layer in range(config.num_layers if tensor.stacked else 1):
            part = view[layer] if tensor.stacked else view
            assert part.shape == tensor.shape
            assert part.reshape(-1)[0] == tensor.layer_offset(layer)


def test_views_refuse_a_buffer_of_another_size(tiny_layout):
    with pytest.raises(Gpt2JaxError, match=r"expected shape .* found \(7,\)"):
        tiny_layout.views(np.zeros(7, np.float32))


@pytest.mark.parametrize("text", ["d13", "gpt3:c769", "gpt3:d12", "model.bin", "d12x", "d"])
def test_unknown_descriptors_are_refused_with_the_known_ones(text):
    with pytest.raises(Gpt2JaxError, match=r"d12.*found"):
        config_from_descriptor(text)


def test_every_known_descriptor_is_one_and_a_file_name_is_none():
    for descriptor in known_descriptors():
        assert is_descriptor(descriptor)
        assert config_from_descriptor(descriptor).head_size > 0
    assert not is_descriptor("d12.bin")
    assert not is_descriptor("runs/d12")


@pytest.mark.parametrize("change", [{"num_heads": 5}, {"channels": 0}, {"vocab_size": -1}, {"num_layers": 0}])
def test_impossible_sizes_are_refused(change):
    with pytest.raises(Gpt2JaxError, match="found"):
        GPT2Config(**{"max_sequence_length": 8, "vocab_size": 9, "num_layers": 1, "num_heads": 2, "channels": 8, **change})


@given(sizes(), st.integers(1, 4))
def test_a_part_is_a_layout_of_the_same_tensors_divided(config, num_parts):
    layout = config.layout
    if any(tensor.layer_size % num_parts for tensor in layout.tensors):
        with pytest.raises(Gpt2JaxError, match="divides"):
            layout.part(num_parts)
        return
    part = layout.part(num_parts)
    assert part.num_parameters * num_parts == layout.num_parameters
    for whole, divided in zip(layout.tensors, part.tensors, strict=True):
        assert (divided.name, divided.decays, divided.layers) == (whole.name, whole.decays, whole.layers)
        assert divided.offset * num_parts == whole.offset
        assert divided.layer_size * num_parts == whole.layer_size
