"""What a step needs of memory: the estimate by hand, the compiler's count, the measured peak."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax import jax_compat
from gpt2_jax.buffer.adamw import adamw, learning_rate_schedule
from gpt2_jax.compute import memory
from gpt2_jax.compute.step import create_state, make_train_step
from gpt2_jax.families.gpt2 import config_from_descriptor
from gpt2_jax.machine import process_peak
from gpt2_jax.models.gpt2 import RECOMPUTED
from tests.conftest import TINY


def test_the_estimate_counts_every_tensor():
    layout = TINY.layout  # 2 layers, 4 heads, 32 channels, vocabulary padded to 256
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


def test_what_is_computed_anew_is_kept_of_one_layer_only():
    layout, B, T, s = TINY.layout, 3, 16, 4
    kept = {level: memory.estimate(layout, B, T, "float32", recompute=level).activations for level in RECOMPUTED}
    assert kept["none"] - kept["gelu"] == B * T * 4 * 32 * s
    assert kept["none"] - kept["layernorm"] == B * T * 6 * 32 * s
    assert kept["none"] - kept["block"] == B * T * (15 * 32 * s + 4 * T * s)


@pytest.mark.skipif(not jax_compat.ffi_call_can_alias(), reason="this jax cannot alias a custom call's argument and result")
@pytest.mark.parametrize("recompute", RECOMPUTED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [256, 4096])
def test_the_step_in_place_needs_what_is_estimated(tokens, dtype, recompute):
    """Of GPT-2 124M, by the compiler's count."""
    layout = config_from_descriptor("d12").layout
    schedule = learning_rate_schedule("constant", 1e-4, steps=1)
    optimizer = adamw(schedule, layout, weight_decay=0.1, custom_call=True)
    step = make_train_step(layout, optimizer, schedule, dtype=jnp.dtype(dtype), matmul="threaded", recompute=recompute)
    params = np.broadcast_to(np.float32(0), layout.num_parameters)
    state = jax.eval_shape(lambda: create_state(params, optimizer, matmul="threaded"))
    batch = jax.ShapeDtypeStruct((1, tokens // 256, 256), jnp.int32)
    needed = memory.compiled_bytes(step.lower(state, batch, batch).compile())
    estimate = memory.estimate(layout, tokens // 256, 256, dtype, recompute=recompute, in_place=True)
    assert needed <= 1.15 * estimate.total
    assert needed >= 0.9 * estimate.total


def test_without_donation_a_step_holds_the_old_state_and_the_new_one():
    layout = TINY.layout
    reused, kept = (memory.estimate(layout, 1, 16, "float32", donates=donates) for donates in (True, False))
    assert kept.total - reused.total == 3 * 4 * layout.num_parameters
    assert (kept.gradients, kept.activations) == (reused.gradients, reused.activations)


def test_bfloat16_halves_the_activations_but_not_the_logits():
    layout = TINY.layout
    wide, narrow = (memory.estimate(layout, 1, 16, dtype) for dtype in ("float32", "bfloat16"))
    logits = 16 * 256 * 4
    assert wide.activations - logits == 2 * (narrow.activations - logits)
    assert wide.parameters == narrow.parameters


def test_the_estimate_of_gpt2_124m_in_words():
    layout = config_from_descriptor("d12").layout
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


def test_the_measured_peak_of_a_cpu_run_is_the_processs():
    peak, of = memory.measured_peak()
    assert of == "of the process"
    assert peak == process_peak() > 10_000_000
