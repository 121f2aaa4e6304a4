"""llm.c's random initialization, on the host: the same stream in the same order as its CUDA trainer and as torch."""

from __future__ import annotations

import math

import numpy as np

from gpt2_jax.buffer.layout import ModelConfig, ParameterLayout
from gpt2_jax.llmc.random import Mt19937

_SEED = 42
_STD = 0.02


def initialize_parameters(config: ModelConfig, seed: int = _SEED) -> np.ndarray:
    """The flat buffer (num_parameters,) float32 of a fresh model.

    Normal(0, 0.02) for wte (without its padding rows), wpe, qkvw and fcw; Normal(0, 0.02 / sqrt(2 L)) for the two
    residual projections; LayerNorm gains 1; everything else 0. Drawn in module order: wte, wpe, then layer by layer
    qkvw, attprojw, fcw, fcprojw (llm.c train_gpt2.cu, gpt_build_from_descriptor).
    """
    layout = ParameterLayout(config)
    params = np.zeros(layout.num_parameters, dtype=np.float32)
    tensors = layout.views(params)
    for name in ("ln1w", "ln2w", "lnfw"):
        tensors[name][:] = 1.0
    generator = Mt19937(seed)
    generator.fill_normal(params[: layout.padding_span[0]], _STD)
    generator.fill_normal(tensors["wpe"].reshape(-1), _STD)
    residual_std = _STD / math.sqrt(2 * config.num_layers)
    for layer in range(config.num_layers):
        for name, std in (("qkvw", _STD), ("attprojw", residual_std), ("fcw", _STD), ("fcprojw", residual_std)):
            generator.fill_normal(tensors[name][layer].reshape(-1), std)
    return params
