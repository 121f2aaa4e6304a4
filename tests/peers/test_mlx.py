"""The GPT-2 in MLX that bench-train measures beside this project: the same gradient, and the same steps.

MLX computes on Linux's CPU too. Its compiler would start a C++ compiler there for each kernel, and is switched off.
"""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest

from gpt2_jax.compute.step import compile_step, create_state, loss_and_gradient
from gpt2_jax.config import OptimizerSettings
from tests.conftest import TINY, plan_of
from tests.ops.seams import ROUNDING

mx = pytest.importorskip("mlx.core", reason="MLX is not installed: pip install 'mlx[cpu]'")
mlx_model = pytest.importorskip("gpt2_jax.benchmark.mlx_model")


@pytest.fixture(autouse=True)
def on_the_cpu():
    mx.set_default_device(mx.cpu)
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_its_gradient_is_ours(tiny_params, tiny_batch, dtype):
    x_BT, y_BT = tiny_batch
    model = mlx_model.model_from_buffer(tiny_params, TINY, true_vocabulary=True)
    loss_and_grads = mlx_model.make_loss_and_gradient(model, getattr(mx, dtype))
    found_loss, grads = loss_and_grads(model.trainable_parameters(), mx.array(x_BT), mx.array(y_BT))
    ours = jax.jit(partial(loss_and_gradient, plan_of(dtype=dtype)))(tiny_params, None, x_BT, y_BT)
    # In float32 as a device is held to the reference; in bfloat16 some 10 roundings a layer, in places of its own.
    bound = 1e-6 if dtype == "float32" else np.sqrt(2 * 10 * TINY.num_layers) * ROUNDING[dtype]
    assert float(found_loss) == pytest.approx(float(ours[0]), rel=bound)
    expected, found = TINY.layout.views(np.asarray(ours[1])), TINY.layout.views(mlx_model.buffer_from_tree(grads, TINY))
    largest = max(np.abs(tensor).max() for tensor in expected.values())
    for name, tensor in expected.items():
        assert np.abs(found[name] - tensor).max() <= bound * largest, name


def test_its_steps_are_ours(tiny_params):
    """Two micro-batches, clipping, and AdamW that leaves biases and norms alone: strong, so that it shows."""
    tokens = np.random.default_rng(1).integers(0, TINY.vocab_size, (2, 2, 9)).astype(np.int32)
    x_ABT, y_ABT = (np.ascontiguousarray(each) for each in (tokens[..., :-1], tokens[..., 1:]))
    plan = plan_of()
    settings = OptimizerSettings(schedule="constant", learning_rate=1e-3, warmup_steps=0, weight_decay=10.0)
    ours, state = compile_step(plan, settings, 10, x_ABT.shape), create_state(plan, tiny_params)
    model = mlx_model.model_from_buffer(tiny_params, TINY, true_vocabulary=True)
    step = mlx_model.make_train_step(model, 1e-3, 10.0, mx.float32)
    for _ in range(4):
        state, metrics = ours(state, x_ABT, y_ABT)
        assert float(step(mx.array(x_ABT), mx.array(y_ABT))) == pytest.approx(float(metrics.loss), rel=1e-5)
    for name, parameter in mlx_model.tree_flatten(model.parameters()):
        assert parameter.dtype == mx.float32, name
