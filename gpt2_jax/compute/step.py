"""The one recipe of a training step: pure functions of a plan."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from gpt2_jax.buffer.adamw import AdamWState, adamw
from gpt2_jax.buffer.rounding import stochastically_rounded
from gpt2_jax.buffer.schedules import learning_rate_schedule
from gpt2_jax.buffer.weights import Weights
from gpt2_jax.compute.plan import Plan
from gpt2_jax.compute.stability import Verdict, empty_windows, judge
from gpt2_jax.config import OptimizerSettings
from gpt2_jax.models import gpt2 as model
from gpt2_jax.ops.classifier import classifier_of
from gpt2_jax.ops.threaded import Site
from gpt2_jax.ops.writer import empty_slots, writer_of


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
    squared_norms: jax.Array  # (S,), of every tensor's gradient
    verdict: Verdict  # whether the update was applied, and why not


def create_state(plan: Plan, params_N: np.ndarray | jax.Array) -> TrainState:
    """A fresh state on the default device from a buffer on the host, which is copied."""
    params = jnp.array(params_N)
    # Two arrays, not one twice: the state's buffers are donated to the step.
    moments = AdamWState(jnp.zeros((), jnp.int32), jnp.zeros_like(params), jnp.zeros_like(params))
    grads = jnp.zeros_like(params) if plan.writes_in_place else None
    return TrainState(params=params, optimizer=moments, windows=jnp.array(empty_windows()), grads=grads)


def state_shapes(plan: Plan) -> TrainState:
    """The shapes of a state, from which a step can be compiled before there are weights."""
    params = jax.ShapeDtypeStruct((plan.layout.num_parameters,), jnp.float32)
    return jax.eval_shape(lambda params_N: create_state(plan, params_N), params)


def accumulated_gradient(
    plan: Plan, params_N: jax.Array, grads_N: jax.Array | None, x_ABT: jax.Array, y_ABT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """loss_and_gradient of the mean over A micro-batches, summed in float32 in their order.

    Where the backend has no loops the function holds the micro-batches one after another.
    """
    num_micro_batches = x_ABT.shape[0]
    if num_micro_batches == 1:
        return loss_and_gradient(plan, params_N, grads_N, x_ABT[0], y_ABT[0])

    def add(total: _Sums, batch: _Batch) -> tuple[_Sums, None]:
        loss, grads_N, known = micro_batch_gradient(plan, params_N, total[1], batch, 1.0 / num_micro_batches, accumulate=True)
        return (total[0] + loss, grads_N, known), None

    shapes = jax.eval_shape(lambda: micro_batch_gradient(plan, params_N, None, (x_ABT[0], y_ABT[0]), 1.0, accumulate=True))
    total: _Sums = jax.tree_util.tree_map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    if plan.backend.loops:
        total = lax.scan(add, total, (x_ABT, y_ABT))[0]
    else:
        add_once = jax.jit(add)  # traced once, called A times
        for index in range(num_micro_batches):
            total, _ = add_once(total, (x_ABT[index], y_ABT[index]))
    return with_squares(plan, *total)


def loss_and_gradient(
    plan: Plan, params_N: jax.Array, grads_N: jax.Array | None, x_BT: jax.Array, y_BT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean loss, float32; its gradient (num_parameters,) float32; and each tensor's sum of squares (S,).

    Where the plan's writer works in place the gradient is written over `grads_N`, if there is one. x and y are (B, T)
    int32, ids below the true vocabulary.
    """
    return with_squares(plan, *micro_batch_gradient(plan, params_N, grads_N, (x_BT, y_BT), 1.0, accumulate=False))


def with_squares(plan: Plan, loss: jax.Array, grads_N: jax.Array, known: jax.Array) -> _Sums:
    """Loss, gradient and each tensor's sum of squares (S,) of a whole step, from the sums over its micro-batches."""
    with jax.named_scope("gradient"):
        return loss, *writer_of(plan).squares(plan, grads_N, known)


_Batch = tuple[jax.Array, jax.Array]  # x_BT, y_BT
_Sums = tuple[jax.Array, jax.Array, jax.Array]  # loss, gradient, and those squares that the writer has summed


def micro_batch_gradient(
    plan: Plan, params_N: jax.Array, grads_N: jax.Array | None, batch: _Batch, scale: float, *, accumulate: bool
) -> _Sums:
    """`scale` times the mean loss of one micro-batch, and its gradient, or with `accumulate` that added to `grads_N`."""
    x_BT, y_BT = batch
    grads_N = jnp.zeros_like(params_N) if grads_N is None else grads_N

    def forward(flat_N: jax.Array, slots: Any) -> tuple[jax.Array, jax.Array]:
        weights = Weights(plan, flat_N, slots, accumulate=accumulate)
        return model.hidden_states(weights, x_BT), weights.flat_N

    with plan.precision():
        (h_BTC, _), pull_back = jax.vjp(forward, params_N, empty_slots(plan))
        with jax.named_scope("classifier"):
            site = Site(plan, (model.CLASSIFIER,), accumulate=accumulate)
            classify = classifier_of(plan).loss_and_gradient
            loss, dh_BTC, grads_N, of_classifier = classify(site, h_BTC, y_BT, params_N, grads_N, scale)
        grads_N, slots = pull_back((dh_BTC, grads_N))
        with jax.named_scope("gradient"):
            # The token table has its gradient from both ends of the model.
            slots |= {name: (slots[name][0] + slot,) for name, slot in of_classifier.items()}
            return loss, *writer_of(plan).finish(plan, grads_N, slots, accumulate)


def make_step(plan: Plan, settings: OptimizerSettings, steps: int) -> jax.stages.Wrapped:
    """The step to compile: (state, x, y) -> (new state, metrics), x and y (A, B, T) int32, for a run of so many steps.

    The old state is donated where the backend can. An update that is not finite, or an outlier by the settings' z-scores,
    leaves parameters and moments as they were. Called with a fourth argument, tensor seeds (S,) uint32, the step rounds
    the new parameters to bfloat16's values.
    """
    warmup, end = settings.warmup_steps, settings.final_learning_rate_fraction
    schedule = learning_rate_schedule(
        settings.schedule, settings.learning_rate, steps=steps, warmup_steps=warmup, final_fraction=end
    )
    optimizer = adamw(
        schedule,
        plan.layout,
        weight_decay=settings.weight_decay,
        beta1=settings.beta1,
        beta2=settings.beta2,
        epsilon=settings.epsilon,
        max_norm=settings.gradient_clip or math.inf,
        custom_call=plan.adamw.name == "custom_call",
    )

    def step(
        state: TrainState, x_ABT: jax.Array, y_ABT: jax.Array, tensor_seeds: jax.Array | None = None
    ) -> tuple[TrainState, Metrics]:
        loss, grads_N, squared_norms_S = accumulated_gradient(plan, state.params, state.grads, x_ABT, y_ABT)
        norm = jnp.sqrt(jnp.sum(squared_norms_S))
        verdict, windows = judge(
            loss, norm, state.windows, max_loss_z=settings.skip_loss_z, max_gradient_z=settings.skip_gradient_z
        )
        with jax.named_scope("adamw"):
            params_N, moments = optimizer.apply(grads_N, norm, verdict.applies, state.optimizer, state.params)
        if tensor_seeds is not None:  # parameters that were not updated are rounded already, and stay
            params_N = stochastically_rounded(params_N, plan.layout, tensor_seeds)
        metrics = Metrics(loss, norm, schedule(state.optimizer.step), squared_norms_S, verdict)
        grads = None if state.grads is None else grads_N
        return TrainState(params_N, moments, windows, grads), metrics

    return jax.jit(step, donate_argnums=(0,) if plan.backend.donates else ())


def compile_step(
    plan: Plan, settings: OptimizerSettings, steps: int, shape: tuple[int, ...], *, rounds: bool = False
) -> jax.stages.Compiled:
    """make_step compiled for micro-batches of shape (A, B, T), from shapes alone; `rounds`: with tensor seeds."""
    batch = jax.ShapeDtypeStruct(shape, jnp.int32)
    seeds = (jax.ShapeDtypeStruct((len(plan.layout.tensors),), jnp.uint32),) if rounds else ()
    lowered = make_step(plan, settings, steps).lower(state_shapes(plan), batch, batch, *seeds)
    return lowered.compile(compiler_options=plan.compiler_options())
