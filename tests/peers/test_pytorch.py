"""The whole model, its gradients and ten optimizer steps against PyTorch's GPT-2, at a small size."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.buffer import adamw as optimizer
from gpt2_jax.gradient_check import check_gradients
from gpt2_jax.ops.matmul import IMPLEMENTATIONS
from tests.conftest import TINY, available

pytestmark = pytest.mark.torch


def check(tiny_params, tiny_batch, dtype, matmul):
    rows = check_gradients(TINY, tiny_params, *tiny_batch, dtype=dtype, matmul=matmul)
    assert len(rows) == 1 + 1 + 16 + 1
    assert [row.name for row in rows if not row.passed] == []
    assert all(np.isfinite(row.used_tolerance) for row in rows)


@pytest.mark.parametrize("matmul", available(IMPLEMENTATIONS))
def test_float32_is_within_tolerance(tiny_params, tiny_batch, matmul):
    check(tiny_params, tiny_batch, "float32", matmul)


@pytest.mark.parametrize("matmul", ["xla", "threaded"])
def test_bfloat16_is_within_tolerance(tiny_params, tiny_batch, matmul):
    check(tiny_params, tiny_batch, "bfloat16", matmul)


def test_a_wrong_gradient_is_found(tiny_params, tiny_batch, monkeypatch):
    from gpt2_jax.models import gpt2 as model

    monkeypatch.setattr(model, "LAYERNORM_EPSILON", 1e-3)
    failed = {row.name for row in check_gradients(TINY, tiny_params, *tiny_batch, dtype="float32") if not row.passed}
    assert "loss" in failed
    assert "grad qkvw" in failed


def test_a_wrong_decay_mask_is_found_in_the_ten_losses(tiny_params, tiny_batch, monkeypatch):
    """The tempting mistake: stacked biases and LayerNorm gains have two dimensions, but must not decay."""

    def decays_by_dimensions(layout):
        index = np.arange(layout.num_parameters)
        return jnp.asarray(sum((index >= t.offset) & (index < t.stop) for t in layout.tensors if len(t.full_shape) >= 2) > 0)

    monkeypatch.setattr(optimizer, "_decays", decays_by_dimensions)
    failed = [row.name for row in check_gradients(TINY, tiny_params, *tiny_batch, dtype="float32") if not row.passed]
    assert failed == ["10 steps' losses"]
