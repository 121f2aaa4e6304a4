"""llm.c's ten golden losses: ten steps on the batch of a debug state, from the model file beside it.

With GPT2_JAX_GOLDEN_DIR naming a folder that holds llm.c's gpt2_124M.bin and gpt2_124M_debug_state.bin, the losses must
be llm.c's published ones (test_gpt2.cu). The same code runs always on files that this project wrote itself.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from gpt2_jax.compute.step import create_state, make_step
from gpt2_jax.config import OptimizerSettings
from gpt2_jax.llmc.debug_state import read_debug_state
from gpt2_jax.llmc.model_file import read_model_file
from gpt2_jax.starter_pack import debug_state, write_starter_pack
from tests.conftest import TINY, plan_of

STEPS = 10
LLMC_LOSSES = [5.270009, 4.060681, 3.320085, 2.717550, 2.181066, 1.653923, 1.168050, 0.736873, 0.401021, 0.187493]


def check_debug_state_and_train(model_path, debug_state_path):
    """Check logits, loss and gradients against the debug state; the losses of ten steps of llm.c's test."""
    config, params = read_model_file(model_path)
    plan = plan_of(config)
    expected = read_debug_state(debug_state_path, config)
    found = debug_state(plan, params, expected.x_BT, expected.y_BT)
    # llm.c's tolerances in float32.
    assert np.abs(found.logits_BTV - expected.logits_BTV).max() < 1e-3
    assert abs(found.loss - expected.loss) < 1e-5
    np.testing.assert_array_less(np.abs(found.grads - expected.grads), 1e-6 + 0.079 * np.abs(expected.grads))

    settings = OptimizerSettings(schedule="constant", learning_rate=1e-4, weight_decay=0.0)
    step = make_step(plan, settings, STEPS)
    state, losses = create_state(plan, params), []
    for _ in range(STEPS):
        state, metrics = step(state, expected.x_BT[None], expected.y_BT[None])
        losses.append(float(metrics.loss))
    return expected, losses


@pytest.mark.skipif("GPT2_JAX_GOLDEN_DIR" not in os.environ, reason="GPT2_JAX_GOLDEN_DIR names no folder with llm.c's files")
def test_llmcs_ten_losses():
    folder = Path(os.environ["GPT2_JAX_GOLDEN_DIR"])
    _, losses = check_debug_state_and_train(folder / "gpt2_124M.bin", folder / "gpt2_124M_debug_state.bin")
    np.testing.assert_allclose(losses, LLMC_LOSSES, rtol=0, atol=1e-5)


@pytest.mark.torch
def test_files_of_our_own(tmp_path, tiny_params, tiny_batch):
    from gpt2_jax.gradient_check import pytorch_training_losses
    from gpt2_jax.interop.pytorch import make_pytorch_model

    paths = write_starter_pack(tmp_path, "tiny", plan_of(), tiny_params, *tiny_batch)
    expected, losses = check_debug_state_and_train(paths[0], paths[2])
    np.testing.assert_array_equal(expected.x_BT, tiny_batch[0])
    reference = make_pytorch_model(TINY, tiny_params)
    reference_losses = pytorch_training_losses(reference, *tiny_batch, steps=STEPS, learning_rate=1e-4, weight_decay=0.0)
    np.testing.assert_allclose(losses, reference_losses, rtol=0, atol=1e-5)
    assert losses[-1] < losses[0]
