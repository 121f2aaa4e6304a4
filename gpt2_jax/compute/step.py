"""The state of a training run and the one compiled function that advances it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from gpt2_jax.buffer.adamw import AdamWState, Optimizer, Schedule
from gpt2_jax.buffer.layout import ParameterLayout
from gpt2_jax.buffer.rounding import stochastically_rounded
from gpt2_jax.compute.stability import Verdict, empty_windows, judge, squared_norms
from gpt2_jax.families.gpt2 import NUM_TENSORS
from gpt2_jax.models import gpt2 as model
from gpt2_jax.ops import in_place
from gpt2_jax.ops.cpu import library as custom_calls
from gpt2_jax.ops.in_place import writes_in_place


@struct.dataclass
class TrainState:
    """Three flat float32 buffers of num_parameters each (parameters and both moments), the number of updates done (the
    refused ones included), and the windows of the outlier detector."""

    params: jax.Array
    optimizer: AdamWState
    windows: jax.Array  # (2, 128) float32, of stability.py
    # Where gradients are written in place: the last step's, (num_parameters,), whose memory the next step overwrites.
    grads: jax.Array | None = None


@struct.dataclass
class Metrics:
    """Of one step, on the device until somebody looks: float32 scalars."""

    loss: jax.Array  # mean cross-entropy before the update, nats per token
    gradient_norm: jax.Array  # before clipping
    learning_rate: jax.Array
    squared_norms: jax.Array  # (16,), of every tensor's gradient
    verdict: Verdict  # whether the update was applied, and why not


def create_state(params_N: np.ndarray, optimizer: Optimizer, *, matmul: str = "xla") -> TrainState:
    """A fresh state on the default device from a buffer on the host, which is copied."""
    params = jnp.array(params_N)
    grads = jnp.zeros_like(params) if writes_in_place(matmul) else None
    return TrainState(params=params, optimizer=optimizer.init(params), windows=jnp.array(empty_windows()), grads=grads)


def loss_and_gradient(
    params_N: jax.Array,
    x_ABT: jax.Array,
    y_ABT: jax.Array,
    layout: ParameterLayout,
    *,
    dtype: jnp.dtype,
    matmul: str,
    recompute: str = "none",
    grads_N: jax.Array | None = None,
    loops: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean loss, its gradient (num_parameters,) float32 over A micro-batches, summed in float32 in their order, and
    squared_norms of the gradient.

    By differentiating model.loss, or in place: into the memory of `grads_N`, where the caller has one to give. Without
    `loops` the function holds the micro-batches one after another.
    """
    options: dict[str, Any] = {"layout": layout, "dtype": dtype, "matmul": matmul, "recompute": recompute}
    if writes_in_place(matmul):
        return _accumulated_in_place(partial(in_place.loss_and_gradient, **options), params_N, grads_N, x_ABT, y_ABT)
    loss, grads_N = _differentiated(partial(model.loss, **options), params_N, x_ABT, y_ABT, loops=loops)
    # Keeps XLA from pulling the making of the gradient into the optimizer's passes over the buffer.
    grads_N = lax.optimization_barrier(grads_N)
    return loss, grads_N, squared_norms(grads_N, layout.tensors, custom_call=custom_calls.serve(matmul))


def _differentiated(
    model_loss: Callable[..., jax.Array], params_N: jax.Array, x_ABT: jax.Array, y_ABT: jax.Array, *, loops: bool
) -> tuple[jax.Array, jax.Array]:
    num_micro_batches = x_ABT.shape[0]

    def micro_batch_loss(params_N: jax.Array, x_BT: jax.Array, y_BT: jax.Array) -> jax.Array:
        return model_loss(params_N, x_BT, y_BT) / num_micro_batches

    value_and_grad = jax.value_and_grad(micro_batch_loss)
    if num_micro_batches == 1:
        return value_and_grad(params_N, x_ABT[0], y_ABT[0])

    def accumulate(
        total: tuple[jax.Array, jax.Array], batch: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        loss, grads_N = value_and_grad(params_N, *batch)
        return (total[0] + loss, total[1] + grads_N), None

    total = (jnp.zeros((), jnp.float32), jnp.zeros_like(params_N))
    if loops:
        return lax.scan(accumulate, total, (x_ABT, y_ABT))[0]
    accumulate_once = jax.jit(accumulate)  # traced once, called A times
    for index in range(num_micro_batches):
        total, _ = accumulate_once(total, (x_ABT[index], y_ABT[index]))
    return total


def _accumulated_in_place(
    one_micro_batch: Callable[..., tuple[jax.Array, jax.Array, jax.Array]],
    params_N: jax.Array,
    grads_N: jax.Array | None,
    x_ABT: jax.Array,
    y_ABT: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    num_micro_batches = x_ABT.shape[0]
    if grads_N is None or num_micro_batches > 1:
        grads_N = jnp.zeros_like(params_N)
    if num_micro_batches == 1:
        return one_micro_batch(params_N, grads_N, x_ABT[0], y_ABT[0])

    def add(
        total: tuple[jax.Array, jax.Array, jax.Array], batch: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
        loss, grads_N, squared_norms_S = one_micro_batch(
            params_N, total[1], *batch, scale=1.0 / num_micro_batches, accumulate=True
        )
        return (total[0] + loss, grads_N, squared_norms_S), None

    nothing = (jnp.zeros((), jnp.float32), grads_N, jnp.zeros((NUM_TENSORS,), jnp.float32))
    return lax.scan(add, nothing, (x_ABT, y_ABT))[0]


def make_train_step(
    layout: ParameterLayout,
    optimizer: Optimizer,
    schedule: Schedule,
    *,
    dtype: jnp.dtype,
    matmul: str,
    recompute: str = "none",
    donate: bool = True,
    loops: bool = True,
    max_loss_z: float = 0.0,
    max_gradient_z: float = 0.0,
) -> jax.stages.Wrapped:
    """The compiled step: (state, x, y) -> (new state, metrics), x and y (A, B, T) int32; the old state is donated.

    `donate` and `loops` are what the backend's record says. An update that is not finite, or an outlier by these
    z-scores, leaves parameters and moments as they were. Called with a fourth argument, tensor seeds (16,) uint32, the
    step rounds the new parameters to bfloat16's values.
    """

    def step(
        state: TrainState, x_ABT: jax.Array, y_ABT: jax.Array, tensor_seeds: jax.Array | None = None
    ) -> tuple[TrainState, Metrics]:
        loss, grads_N, squared_norms_S = loss_and_gradient(
            state.params,
            x_ABT,
            y_ABT,
            layout,
            dtype=dtype,
            matmul=matmul,
            recompute=recompute,
            grads_N=state.grads,
            loops=loops,
        )
        norm = jnp.sqrt(jnp.sum(squared_norms_S))
        verdict, windows = judge(loss, norm, state.windows, max_loss_z=max_loss_z, max_gradient_z=max_gradient_z)
        params_N, optimizer_state = optimizer.apply(grads_N, norm, verdict.applies, state.optimizer, state.params)
        if tensor_seeds is not None:  # parameters that were not updated are rounded already, and stay
            params_N = stochastically_rounded(params_N, layout, tensor_seeds)
        metrics = Metrics(
            loss=loss,
            gradient_norm=norm,
            learning_rate=schedule(state.optimizer.step),
            squared_norms=squared_norms_S,
            verdict=verdict,
        )
        kept_N = None if state.grads is None else grads_N
        return TrainState(params=params_N, optimizer=optimizer_state, windows=windows, grads=kept_N), metrics

    return jax.jit(step, donate_argnums=(0,) if donate else ())
