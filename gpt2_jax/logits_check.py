"""A Hugging Face folder in transformers against this project's forward pass: the logits of one batch, in float32."""

from __future__ import annotations

import importlib.util

import jax
import numpy as np

from gpt2_jax.compute.backend import Backend, open_device
from gpt2_jax.compute.forward import all_logits
from gpt2_jax.compute.plan import make_plan
from gpt2_jax.config import ComputeSettings, ModelSettings
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.models.weights import load_weights

# Largest difference of logits, in units of the largest logit or 1: products are summed in another order in each layer.
TOLERANCE = 1e-4
_BATCH = (2, 64)


def compare_with_transformers(model: str, folder: str, backend: Backend) -> str:
    """Compare the logits that this project computes from `model` with those of transformers from `folder`; returns what was
    found, or why nothing was compared. Gpt2JaxError for logits that differ by more than 1e-4."""
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        return f"no logits, as {' and '.join(missing)} {'are' if missing[1:] else 'is'} not installed"
    open_device(backend)
    config, params = load_weights(ModelSettings(init=model), say=lambda text: None)
    B, T = _BATCH
    x_BT = np.random.default_rng(0).integers(0, config.vocab_size, (B, min(T, config.max_sequence_length)), np.int32)
    plan = make_plan(ComputeSettings(matmul_precision="highest"), backend, config)
    ours = np.asarray(jax.jit(all_logits, static_argnums=0)(plan, params, x_BT))
    theirs = _of_transformers(folder, x_BT)
    difference = float(np.max(np.abs(ours - theirs)) / max(1.0, float(np.max(np.abs(theirs)))))
    if not difference <= TOLERANCE:
        found = f"found a difference of {difference:.2g}"
        raise Gpt2JaxError(f"{folder}: expected transformers' logits within {TOLERANCE} of this project's, {found}")
    return f"transformers loads it, and its logits differ from this project's by {difference:.1e} at most"


def _of_transformers(folder: str, x_BT: np.ndarray) -> np.ndarray:
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.from_numpy(x_BT.astype(np.int64))).logits.numpy()
