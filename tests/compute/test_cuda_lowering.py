"""The training step lowered for NVIDIA GPUs, on any machine: what must be in it, and what as long as the buffer must not.

No GPU is at hand, so cuDNN's version is made up, and no kernel is compiled or loaded.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

from gpt2_jax import jax_compat
from gpt2_jax.compute.backend import Backend
from gpt2_jax.compute.plan import make_plan
from gpt2_jax.compute.step import make_step, state_shapes
from gpt2_jax.config import ComputeSettings, OptimizerSettings
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.ops.cuda import cublas, kernels, libraries
from tests.conftest import can_alias

CONFIG = GPT2Config(max_sequence_length=128, vocab_size=1000, num_layers=2, num_heads=2, channels=128)
CUDA = Backend("cuda", "cuda", "a test", frozenset({"custom_calls"}))


@pytest.fixture
def lowered(monkeypatch):
    """A function that gives the step's StableHLO for micro-batches of 2 x 128 tokens."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda *_: True, raising=False)
    monkeypatch.setattr(libraries, "device", lambda: libraries.Device((9, 0), 232448, 132))
    for module, name in ((kernels, "_nvrtc"), (kernels, "_load_function"), (cublas, "_load"), (cublas, "_tune")):
        monkeypatch.setattr(module, name, lambda *_: None)
    monkeypatch.setattr(kernels, "_loaded", lambda kernel, constants: kernel)

    def lower(micro_batches=1, devices=1, zero=1, **compute):
        settings = ComputeSettings(dtype="bfloat16", **compute)
        plan = make_plan(settings, CUDA, CONFIG, devices=devices, zero=zero)
        batch = jax.ShapeDtypeStruct((micro_batches, devices * 2, 128), jnp.int32)
        step = make_step(plan, OptimizerSettings(weight_decay=0.1), 10)
        return plan, step.trace(state_shapes(plan), batch, batch).lower(lowering_platforms=("cuda",)).as_text()

    return lower


@can_alias
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_libraries_and_kernels_compute_and_nothing_is_as_long_as_the_buffer(lowered, micro_batches):
    plan, text = lowered(micro_batches)
    chosen = {seam: choice.name for seam, choice in plan.choices()}
    assert chosen == {
        "linear": "cublas",
        "norm_linear": "folded_kernel",
        "attention": "cudnn",
        "activation": "cublas",
        "writer": "update_slice",
        "classifier": "kernel",
        "embedding": "gather",
        "adamw": "xla",
        "barrier": "xla",
    }
    calls = re.findall(r"custom_call @([\w$]+)", text)
    layers = CONFIG.num_layers
    assert calls.count("__cudnn$fmhaSoftmax") == calls.count("__cudnn$fmhaSoftmaxBackward") == layers
    assert calls.count("gpt2_jax_cublas_gelu_backward") == layers
    launched = re.findall(r'kernel = "(\w+)"', text)
    assert {name: launched.count(name) for name in launched} == {
        "softmax_cross_entropy": 1,
        "layer_norm": 2 * layers,
        "layer_norm_backward": 2 * layers,
    }
    whole = f"tensor<{plan.layout.num_parameters}x"
    made = set(re.findall(rf"stablehlo\.(\w+) .*{whole}f32>$", text, re.MULTILINE))
    assert "dynamic_update_slice" in made
    assert not made & {"concatenate", "pad"}
    assert f"{whole}bf16>" not in text  # the buffer is never cast whole


@can_alias
def test_deterministic_backward_passes_of_attention_differ(lowered):
    """XLA makes all but the first of several equal ones not deterministic, and then fails."""
    windows = {
        deterministic: re.findall(r"sliding_window_length\\22: (\d+)", lowered(deterministic=deterministic)[1])
        for deterministic in (False, True)
    }
    assert len(set(windows[False])) == 1
    assert len(set(windows[True])) == CONFIG.num_layers
    plan, text = lowered(deterministic=True)
    assert plan.compiler_options()["xla_gpu_autotune_level"] == "0"
    assert "tune = 0" in text


several = pytest.mark.skipif(not jax_compat.serves_several_devices(), reason="this jax does not serve several devices")


def travels(text):
    """Of every collective in StableHLO: its name, and the type of its operand."""
    pattern = r'"stablehlo\.(all_\w+|reduce_scatter|collective_\w+)"\(.*?\) (?:<\{.*?\}> )?(?:\(\{.*?\}\) )?: \(tensor<([^>]*)>'
    return sorted(re.findall(pattern, text, re.DOTALL))


@can_alias
@several
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_two_gpus_send_gradients_once_and_weights_as_two_bytes(lowered, micro_batches):
    plan, text = lowered(micro_batches, devices=2)
    N, S = plan.layout.num_parameters, len(plan.layout.tensors)
    small = [("all_reduce", f"{S}xf32"), ("all_reduce", "f32")]
    assert travels(text) == sorted([("all_gather", f"1x{N // 2}xui16"), ("reduce_scatter", f"2x{N // 2}xf32"), *small])
    plan, text = lowered(micro_batches, devices=2, deterministic=True)
    small = [("all_gather", f"1x{S}xf32"), ("all_gather", "1xf32")]
    assert travels(text) == sorted([("all_gather", f"1x{N // 2}xui16"), ("all_to_all", f"2x{N // 2}xf32"), *small])


@can_alias
@several
def test_two_gpus_gather_each_ops_weights_and_scatter_each_layers_gradients(lowered):
    plan, text = lowered(devices=2, zero=3)
    found = travels(text)
    gathers = [kind for name, kind in found if name == "all_gather"]
    # A layer has four ops, gathered forward and backward; the last norm's too; the embedding's and the classifier's once.
    assert len(gathers) == 8 * CONFIG.num_layers + 4
    assert {kind.partition("x")[2].partition("x")[2] for kind in gathers} == {"ui16"}
    assert [name for name, _ in found].count("reduce_scatter") == CONFIG.num_layers + 1
    assert f"tensor<{plan.layout.num_parameters}x" not in text
