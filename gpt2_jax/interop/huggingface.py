"""GPT-2 folders of Hugging Face transformers: config.json and weights to the flat buffer."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gpt2_jax.errors import Gpt2JaxError, announce
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.interop.huggingface_config import read_huggingface_config
from gpt2_jax.interop.state_dict import parameters_from
from gpt2_jax.interop.stored_tensors import open_tensors


def read_huggingface_folder(
    folder: str | os.PathLike, *, say: Callable[[str], None] = announce
) -> tuple[GPT2Config, np.ndarray]:
    """Sizes and flat buffer (num_parameters,) float32; float16 and bfloat16 weights are widened.

    The weights are model.safetensors or pytorch_model.bin, in one file or in shards with an index. Raises Gpt2JaxError
    for a folder without them, and for a model that is not a GPT-2 that this project can compute: a setting of
    config.json, a tensor too many or too few, a wrong shape. Settings that no GPT-2 has are ignored, as by
    transformers, and listed to `say`.
    """
    folder = Path(folder)
    config_path = folder / "config.json"
    config, unknown = read_huggingface_config(config_path)
    if os.path.lexists(adapter := folder / "adapter_config.json"):
        raise Gpt2JaxError(
            f"{adapter}: expected weights without an adapter, found one, which transformers adds to the model",
            "model.merge_and_unload().save_pretrained(FOLDER)   (in Python, with peft)",
        )
    with open_tensors(folder) as tensors:
        params = parameters_from(config, tensors, linear_as="conv1d")
    if unknown:
        listed = ", ".join(f"{name} = {value!r:.40}" for name, value in unknown.items())
        say(f"{config_path}: ignored, as transformers' GPT-2 does, what is no setting of it: {listed}")
    return config, params
