"""llm.c's random initialization, on the host: the same stream in the same order as its CUDA trainer and as torch."""

from __future__ import annotations

import numpy as np

from gpt2_jax.buffer.layout import Normal, ParameterLayout, PlacedTensor
from gpt2_jax.families.family import FamilyConfig
from gpt2_jax.llmc.random import Mt19937

SEED = 42  # llm.c's


def initialize_parameters(config: FamilyConfig, seed: int = SEED) -> np.ndarray:
    """The flat buffer (num_parameters,) float32 of a fresh model, as its family declares the initialization.

    Normals are drawn in module order: the tensors that the model has once, then layer by layer those of a layer (for
    GPT-2 as in llm.c's train_gpt2.cu, gpt_build_from_descriptor). Padding rows are zero, and no normal is drawn for them.
    """
    layout = config.layout
    params = np.zeros(layout.num_parameters, dtype=np.float32)
    for tensor in layout.tensors:
        if not isinstance(tensor.init, Normal):
            params[tensor.offset : tensor.stop] = tensor.init
    generator = Mt19937(seed)
    for tensor, layer in _in_module_order(layout):
        if isinstance(tensor.init, Normal):
            start = tensor.layer_offset(layer)
            stop = start + tensor.layer_size if tensor.valid_rows is None else tensor.padding_span[0]
            generator.fill_normal(params[start:stop], tensor.init.std)
    return params


def _in_module_order(layout: ParameterLayout) -> list[tuple[PlacedTensor, int]]:
    once = [(tensor, 0) for tensor in layout.tensors if not tensor.stacked]
    stacked = [tensor for tensor in layout.tensors if tensor.stacked]
    num_layers = max((tensor.num_layers for tensor in stacked), default=0)
    return once + [(tensor, layer) for layer in range(num_layers) for tensor in stacked]
