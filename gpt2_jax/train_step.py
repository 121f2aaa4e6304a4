"""The state of a training run and the one compiled function that advances it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from gpt2_jax import in_place, jax_compat, model
from gpt2_jax.layout import ParameterLayout
from gpt2_jax.optimizer import AdamWState, Optimizer, Schedule, global_norm


@struct.dataclass
class TrainState:
    """Three flat float32 buffers of num_parameters each (parameters and both moments) and the number of updates done."""

    params: jax.Array
    optimizer: AdamWState


@struct.dataclass
class Metrics:
    """Of one step, on the device until somebody looks: float32 scalars."""

    loss: jax.Array  # mean cross-entropy before the update, nats per token
    gradient_norm: jax.Array  # before clipping
    learning_rate: jax.Array


def create_state(params_N: np.ndarray, optimizer: Optimizer) -> TrainState:
    """A fresh state on the default device from a buffer on the host, which is copied."""
    params = jnp.array(params_N)
    return TrainState(params=params, optimizer=optimizer.init(params))


def loss_and_gradient(
    params_N: jax.Array,
    x_ABT: jax.Array,
    y_ABT: jax.Array,
    layout: ParameterLayout,
    *,
    dtype: jnp.dtype,
    matmul: str,
    loops: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Mean loss and its gradient (num_parameters,) float32 over A micro-batches, summed in float32 in their order.

    With XLA's products (or a jax that cannot alias, before 0.4.38) by differentiating model.loss, with the custom calls'
    by in_place, its equal. Without `loops` XLA's holds the micro-batches one after another.
    """
    num_micro_batches = x_ABT.shape[0]
    if matmul != "xla" and jax_compat.ffi_call_can_alias():
        return _loss_and_gradient_in_place(params_N, x_ABT, y_ABT, layout, dtype=dtype, matmul=matmul)

    def micro_batch_loss(params_N: jax.Array, x_BT: jax.Array, y_BT: jax.Array) -> jax.Array:
        return model.loss(params_N, x_BT, y_BT, layout, dtype=dtype, matmul=matmul) / num_micro_batches

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


def _loss_and_gradient_in_place(
    params_N: jax.Array, x_ABT: jax.Array, y_ABT: jax.Array, layout: ParameterLayout, *, dtype: jnp.dtype, matmul: str
) -> tuple[jax.Array, jax.Array]:
    grads_N = jnp.zeros_like(params_N)
    num_micro_batches = x_ABT.shape[0]
    if num_micro_batches == 1:
        return in_place.loss_and_gradient(params_N, grads_N, x_ABT[0], y_ABT[0], layout, dtype=dtype, matmul=matmul)

    def add(total: tuple[jax.Array, jax.Array], batch: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, jax.Array], None]:
        loss, grads_N = in_place.loss_and_gradient(
            params_N, total[1], *batch, layout, dtype=dtype, matmul=matmul, scale=1.0 / num_micro_batches, accumulate=True
        )
        return (total[0] + loss, grads_N), None

    return lax.scan(add, (jnp.zeros((), jnp.float32), grads_N), (x_ABT, y_ABT))[0]


def make_train_step(
    layout: ParameterLayout,
    optimizer: Optimizer,
    schedule: Schedule,
    *,
    dtype: jnp.dtype,
    matmul: str,
    donate: bool = True,
    loops: bool = True,
) -> jax.stages.Wrapped:
    """The compiled step: (state, x, y) -> (new state, metrics), x and y (A, B, T) int32; the old state is donated.

    `donate` and `loops` are what the backend's record says.
    """

    def step(state: TrainState, x_ABT: jax.Array, y_ABT: jax.Array) -> tuple[TrainState, Metrics]:
        loss, grads_N = loss_and_gradient(state.params, x_ABT, y_ABT, layout, dtype=dtype, matmul=matmul, loops=loops)
        # Keeps XLA from pulling the making of the gradient into the optimizer's passes over the buffer.
        grads_N = lax.optimization_barrier(grads_N)
        norm = global_norm(grads_N, custom_call=matmul != "xla")
        params_N, optimizer_state = optimizer.apply(grads_N, norm, state.optimizer, state.params)
        metrics = Metrics(loss=loss, gradient_norm=norm, learning_rate=schedule(state.optimizer.step))
        return TrainState(params=params_N, optimizer=optimizer_state), metrics

    return jax.jit(step, donate_argnums=(0,) if donate else ())
