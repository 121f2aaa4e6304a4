"""What a step needs of memory: the estimate by hand, the compiler's count, the measured peak."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax import memory
from gpt2_jax.layout import ParameterLayout, model_config_from_descriptor
from tests.conftest import TINY


def test_the_estimate_counts_every_tensor():
    layout = ParameterLayout(TINY)  # 2 layers, 4 heads, 32 channels, vocabulary padded to 256
    B, T, s = 3, 16, 4
    a_layer = (
        2 * 32 * s  # residuals, before attention and before the MLP
        + 2 * 32 * s  # LayerNorms' outputs
        + 3 * 32 * s  # q, k, v
        + 4 * T * s  # the softmax of four heads
        + 32 * s  # attention's output
        + 2 * 4 * 32 * s  # before and after GELU
    )
    estimate = memory.estimate(layout, B, T, "float32")
    assert estimate.activations == B * T * (2 * a_layer + 2 * 32 * s + 256 * (4 + s))
    assert estimate.parameters == estimate.gradients == estimate.moments // 2 == 4 * layout.num_parameters
    assert estimate.total == estimate.activations + 4 * 4 * layout.num_parameters


def test_without_donation_a_step_holds_the_old_state_and_the_new_one():
    layout = ParameterLayout(TINY)
    reused, kept = (memory.estimate(layout, 1, 16, "float32", donates=donates) for donates in (True, False))
    assert kept.total - reused.total == 3 * 4 * layout.num_parameters
    assert (kept.gradients, kept.activations) == (reused.gradients, reused.activations)


def test_bfloat16_halves_the_activations_but_not_the_logits():
    layout = ParameterLayout(TINY)
    wide, narrow = (memory.estimate(layout, 1, 16, dtype) for dtype in ("float32", "bfloat16"))
    logits = 16 * 256 * 4
    assert wide.activations - logits == 2 * (narrow.activations - logits)
    assert wide.parameters == narrow.parameters


def test_the_estimate_of_gpt2_124m_in_words():
    layout = ParameterLayout(model_config_from_descriptor("d12"))
    expected = "2.26 GB (0.50 parameters, 0.50 gradients, 1.00 moments, 0.27 activations)"
    assert str(memory.estimate(layout, 4, 64, "float32")) == expected


@pytest.mark.parametrize(("donated", "buffers"), [((), 2), ((0,), 1)])
def test_a_compiled_functions_bytes_count_reused_memory_once(donated, buffers):
    a = jnp.zeros(1000, jnp.float32)
    compiled = jax.jit(lambda a: a + 1.0, donate_argnums=donated).lower(a).compile()
    assert memory.compiled_bytes(compiled) == buffers * 4000


def test_a_backend_that_does_not_tell_gives_none():
    class Silent:
        def __init__(self, answer):
            self.answer = answer

        def memory_analysis(self):
            if self.answer is not None:
                raise self.answer

    for answer in (None, NotImplementedError(), RuntimeError()):
        assert memory.compiled_bytes(Silent(answer)) is None


def test_the_peak_of_the_process_rises_with_what_it_holds():
    before = memory.process_peak()
    held = np.ones(before // 8 + 25_000_000)
    assert memory.process_peak() >= before + 100_000_000 > 100_000_000
    assert held[-1] == 1.0
    peak, of = memory.measured_peak()
    assert of == "of the process"
    assert peak >= held.nbytes
