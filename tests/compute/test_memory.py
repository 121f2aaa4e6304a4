"""What a step needs of memory: the estimate by hand, the compiler's count, the measured peak, and what would need less."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from gpt2_jax import jax_compat
from gpt2_jax.compute import memory
from gpt2_jax.compute.backend import select_backend
from gpt2_jax.compute.memory import MemoryEstimate
from gpt2_jax.compute.plan import make_plan
from gpt2_jax.compute.step import accumulated_gradient, compile_step
from gpt2_jax.config import ComputeSettings, OptimizerSettings
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2Config, config_from_descriptor
from gpt2_jax.machine import process_peak
from gpt2_jax.ops.classifier import CLASSIFIER_ROWS
from gpt2_jax.ops.recompute import RECOMPUTED
from tests.conftest import CPU, TINY, available, can_alias, plan_of
from tests.implementations import plan_of_kind

KEEPS_BARRIERS = dataclasses.replace(CPU, lacks=CPU.lacks - {"barriers"})
LOSES_BARRIERS = dataclasses.replace(CPU, lacks=CPU.lacks | {"barriers"})
WITHOUT_DONATION = dataclasses.replace(CPU, lacks=CPU.lacks | {"donation"})
by_custom_calls = pytest.mark.parametrize("matmul", available(["threaded"]))


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
    estimate = memory.estimate(plan_of(), B, T)
    assert estimate.activations == B * T * (2 * a_layer + 2 * 32 * s + 256 * (4 + s))
    assert estimate.parameters == estimate.gradients == estimate.moments // 2 == 4 * layout.num_parameters
    assert estimate.total == estimate.activations + 4 * 4 * layout.num_parameters


@by_custom_calls
def test_custom_calls_keep_no_scores_and_have_the_logits_of_one_chunk(matmul):
    B, s = 2 * CLASSIFIER_ROWS // 16, 4
    a_layer = 16 * 32 * s + 4 * 4  # and one float32 for each row of the softmax of four heads
    estimate = memory.estimate(plan_of(matmul=matmul), B, 16)
    assert estimate.activations == B * 16 * (2 * a_layer + 2 * 32 * s) + CLASSIFIER_ROWS * 256 * 4


def test_gpt2_124m_fits_with_jax_mps():
    """Old and new state, gradient, what the blocks keep (2.4 GB), the logits and their gradient: below 8 GB."""
    found = memory.estimate(plan_of_kind("apple", config=config_from_descriptor("d12")), 4, 1024)
    assert found.parameters == 2 * found.gradients
    assert found.moments == 4 * found.gradients
    kept_by_blocks = found.activations - 4 * 1024 * (2 * 768 * 4 + 50304 * 8)
    assert 2.416e9 <= kept_by_blocks <= 2.9e9
    assert found.total <= 8e9


@pytest.mark.skipif(not jax_compat.serves_several_devices(), reason="this jax does not serve several devices")
def test_several_devices_divide_what_their_stage_says():
    """By hand, in buffers of 4 N bytes, of four devices; gradients that are not written in place need a second buffer."""
    layout, D = TINY.layout, 4
    buffer = 4 * layout.num_parameters
    tables = 4 * sum(tensor.size for tensor in layout.tensors if tensor.layers is None)
    largest = 4 * layout["wte"].size
    expected = {  # stage: parameters and what is gathered of them, moments, gradients of one and of two micro-batches
        0: (buffer, 2 * buffer, buffer, 2 * buffer),
        1: (buffer // D + buffer, 2 * buffer // D, buffer, 2 * buffer),
        2: (buffer // D + buffer, 2 * buffer // D, buffer // D + tables, 2 * buffer // D + tables),
        3: (buffer // D + largest, 2 * buffer // D, buffer // D + tables, 2 * buffer // D + tables),
    }
    for zero, (parameters, moments, *gradients) in expected.items():
        plan = make_plan(ComputeSettings(matmul="xla"), CPU, TINY, devices=D, zero=zero)
        found = [memory.estimate(plan, 8, 16, num_micro_batches=number) for number in (1, 2)]
        assert [each.parameters for each in found] == [parameters] * 2
        assert [each.moments for each in found] == [moments] * 2
        assert [each.gradients for each in found] == gradients
        # Of many tokens the activations are those of one device, of few they are less than what the exchange needs.
        assert found[0].activations == memory.estimate(plan_of(), 8, 16).activations
    few = memory.estimate(make_plan(ComputeSettings(matmul="xla"), CPU, TINY, devices=D), 1, 1)
    assert few.activations == buffer


@can_alias
@by_custom_calls
def test_several_micro_batches_need_a_second_gradient_only_where_they_are_not_added_in_place(matmul):
    buffer = 4 * TINY.layout.num_parameters
    for plan, expected in ((plan_of(), 2 * buffer), (plan_of(matmul=matmul), buffer)):
        assert memory.estimate(plan, 1, 16, num_micro_batches=3).gradients == expected
        assert memory.estimate(plan, 1, 16).gradients == buffer


def test_what_is_computed_anew_is_kept_of_one_layer_only():
    B, T, s = 3, 16, 4
    kept = {level: memory.estimate(plan_of(backend=KEEPS_BARRIERS, recompute=level), B, T).activations for level in RECOMPUTED}
    assert kept["none"] - kept["gelu"] == B * T * 4 * 32 * s
    assert kept["none"] - kept["layernorm"] == B * T * 6 * 32 * s
    assert kept["none"] - kept["block"] == B * T * (15 * 32 * s + 4 * T * s)


@pytest.mark.parametrize(
    ("matmul", "backend", "saves"),
    [
        ("xla", LOSES_BARRIERS, False),
        ("xla", KEEPS_BARRIERS, True),
        *(pytest.param(*one.values, LOSES_BARRIERS, True, marks=one.marks) for one in available(["threaded"])),
    ],
)
def test_memory_is_expected_to_be_saved_where_recomputing_saves_it(matmul, backend, saves):
    none, block = (
        memory.estimate(plan_of(matmul=matmul, backend=backend, recompute=level), 2, 16).activations
        for level in ("none", "block")
    )
    assert (block < none) == (saves and (matmul == "xla" or jax_compat.ffi_call_can_alias()))


@pytest.mark.skipif(not jax_compat.ffi_call_can_alias(), reason="this jax cannot alias a custom call's argument and result")
@pytest.mark.parametrize("recompute", RECOMPUTED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [256, 4096])
@by_custom_calls
def test_the_step_in_place_needs_what_is_estimated(matmul, tokens, dtype, recompute):
    """Of GPT-2 124M, by the compiler's count."""
    plan = plan_of(config_from_descriptor("d12"), matmul=matmul, dtype=dtype, recompute=recompute)
    needed = memory.compiled_memory(plan, compile_step(plan, OptimizerSettings(), 1, (1, tokens // 256, 256)))
    estimate = memory.estimate(plan, tokens // 256, 256)
    assert needed.total <= 1.15 * estimate.total
    assert needed.total >= 0.9 * estimate.total


def test_without_donation_a_step_holds_the_old_state_and_the_new_one():
    reused, kept = (memory.estimate(plan_of(backend=backend), 1, 16) for backend in (CPU, WITHOUT_DONATION))
    assert kept.total - reused.total == 3 * 4 * TINY.layout.num_parameters
    assert (kept.gradients, kept.activations) == (reused.gradients, reused.activations)


def test_bfloat16_halves_the_activations_but_not_the_logits():
    wide, narrow = (memory.estimate(plan_of(dtype=dtype), 1, 16) for dtype in ("float32", "bfloat16"))
    logits = 16 * 256 * 4
    assert wide.activations - logits == 2 * (narrow.activations - logits)
    assert wide.parameters == narrow.parameters


def test_the_estimate_of_gpt2_124m_in_words():
    expected = "2.26 GB (0.50 parameters, 0.50 gradients, 1.00 moments, 0.27 activations)"
    assert str(memory.estimate(plan_of(config_from_descriptor("d12")), 4, 64)) == expected


@pytest.mark.parametrize(("donated", "buffers"), [((), 2), ((0,), 1)])
def test_a_compiled_functions_bytes_count_reused_memory_once(donated, buffers):
    a = jnp.zeros(TINY.layout.num_parameters, jnp.float32)
    compiled = jax.jit(lambda a: a + 1.0, donate_argnums=donated).lower(a).compile()
    assert memory.compiled_memory(plan_of(), compiled).total == buffers * 4 * TINY.layout.num_parameters


@pytest.mark.parametrize("backend", [CPU, WITHOUT_DONATION])
def test_the_compilers_count_is_split_as_the_estimate_is(backend):
    plan = plan_of(backend=backend)
    counted = memory.compiled_memory(plan, compile_step(plan, OptimizerSettings(), 1, (1, 2, 16)))
    estimated = memory.estimate(plan, 2, 16)
    for part in ("parameters", "gradients", "moments"):
        assert getattr(counted, part) == getattr(estimated, part)
    assert counted.activations > 0


def test_a_backend_that_does_not_tell_gives_none():
    class Silent:
        def __init__(self, answer):
            self.answer = answer

        def memory_analysis(self):
            if self.answer is not None:
                raise self.answer

    for answer in (None, NotImplementedError(), RuntimeError()):
        assert memory.compiled_memory(plan_of(), Silent(answer)) is None


def test_the_measured_peak_of_a_cpu_run_is_the_processs():
    peak, of = memory.measured_peak()
    assert of == "of the process"
    assert peak == process_peak() > 10_000_000


def test_the_limit_of_the_cpu_is_the_machines_memory():
    limit = memory.device_limit()
    assert limit is None or 10**8 < limit < 10**15


def test_more_than_the_device_has_is_refused_with_what_would_need_less():
    needed = MemoryEstimate(1_000_000_000, 2_000_000_000, 3_000_000_000, 4_000_000_000)
    for enough in (10_000_000_000, None):
        memory.check_memory(needed, enough, ["less"])
    with pytest.raises(Gpt2JaxError) as raised:
        memory.check_memory(needed, 9_999_999_999, ["--dtype bfloat16", "a smaller model"])
    assert raised.value.problem == f"memory: expected room for {needed} in a step, found 10.00 GB on the device"
    assert raised.value.hint == "--dtype bfloat16; or a smaller model"


@pytest.mark.parametrize(
    ("batch_size", "compute", "backend", "first"),
    [
        (5, {}, LOSES_BARRIERS, "--batch-size 1 --total-batch-size 240 "),
        (6, {}, LOSES_BARRIERS, "--batch-size 3 --total-batch-size 240 "),
        (1, {}, LOSES_BARRIERS, "--dtype bfloat16; or a shorter --sequence-length; or a smaller model"),
        (1, {}, KEEPS_BARRIERS, "--recompute block; or --dtype bfloat16; or a shorter"),
        (1, {"recompute": "block", "dtype": "bfloat16"}, KEEPS_BARRIERS, "a shorter "),
    ],
)
def test_what_would_need_less_memory_is_said_where_it_would(batch_size, compute, backend, first):
    hint = "; or ".join(memory.needing_less(plan_of(backend=backend, **compute), batch_size, 240))
    assert hint.startswith(first)


def test_the_cpus_record_is_right_about_barriers():
    """Were it otherwise, the CPU's record would be wrong."""
    config = GPT2Config(max_sequence_length=64, vocab_size=203, num_layers=2, num_heads=2, channels=64)
    shapes = jnp.zeros(config.layout.num_parameters), None, jnp.zeros((1, 8, 64), jnp.int32), jnp.zeros((1, 8, 64), jnp.int32)

    def temporaries(recompute: str) -> int:
        gradient = jax.jit(accumulated_gradient, static_argnums=0)
        compiled = gradient.lower(plan_of(config, recompute=recompute), *shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    saved = 1 - temporaries("block") / temporaries("none")
    assert (saved < 0.25) == ("barriers" in select_backend("cpu").lacks)
