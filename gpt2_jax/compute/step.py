"""The one recipe of a training step: pure functions of a plan."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from gpt2_jax.buffer.adamw import AdamWState, adamw
from gpt2_jax.buffer.rounding import stochastically_rounded
from gpt2_jax.buffer.schedules import Schedule, learning_rate_schedule
from gpt2_jax.buffer.weights import Weights
from gpt2_jax.compute import parallel
from gpt2_jax.compute.plan import Plan
from gpt2_jax.compute.stability import Verdict, empty_windows, judge
from gpt2_jax.config import OptimizerSettings
from gpt2_jax.models import gpt2 as model
from gpt2_jax.ops.classifier import classifier_of
from gpt2_jax.ops.dropout import noise_of, noise_of_step
from gpt2_jax.ops.sharded import at_hand
from gpt2_jax.ops.threaded import Site
from gpt2_jax.ops.writer import empty_slots, writer_of


@struct.dataclass
class TrainState:
    """Three flat float32 buffers of num_parameters each (parameters and both moments), the number of updates done (the
    refused ones included), and the windows of the outlier detector. From --zero 1 on the three are rows (D, N/D)."""

    params: jax.Array
    optimizer: AdamWState
    windows: jax.Array  # (2, 128) float32, of stability.py
    # Where gradients are written in place: the last step's, (num_parameters,), whose memory the next step overwrites; of D
    # devices each has its own, (D * num_parameters,): without a second axis, whose removal XLA would make a copy of.
    grads: jax.Array | None = None


# What each of several processes sends along with a step, so that all hear of it after the same one.
NUM_WISHES = 2


@struct.dataclass
class Metrics:
    """Of one step, on the device until somebody looks: float32 scalars."""

    loss: jax.Array  # mean cross-entropy before the update, nats per token
    gradient_norm: jax.Array  # before clipping
    learning_rate: jax.Array
    squared_norms: jax.Array  # (S,), of every tensor's gradient
    verdict: Verdict  # whether the update was applied, and why not
    wishes: jax.Array | None = None  # (NUM_WISHES,) int32, of several processes: the highest that one of them has sent along


def create_state(plan: Plan, params_N: np.ndarray | jax.Array) -> TrainState:
    """A fresh state on the plan's devices from a buffer on the host, which is copied: (N,), or already what `rows_of` makes
    of it."""
    if plan.devices == 1:
        return _fresh_state(plan, jnp.array(params_N))
    params = rows_of(plan, np.asarray(params_N))
    return parallel.place(plan, _fresh_state(plan, params.copy(), np), state_specs(plan))


def _fresh_state(plan: Plan, params: Any, numpy: Any = jnp) -> TrainState:
    # Two arrays, not one twice: the state's buffers are donated to the step.
    moments = AdamWState(numpy.zeros((), numpy.int32), numpy.zeros_like(params), numpy.zeros_like(params))
    # On the host of several devices those of this process, else all.
    number = plan.devices if numpy is jnp else len(parallel.own_ranks(plan))
    grads = numpy.zeros(number * plan.layout.num_parameters, numpy.float32) if plan.writes_in_place else None
    return TrainState(params=params, optimizer=moments, windows=numpy.array(empty_windows()), grads=grads)


def resumed_state(plan: Plan, fresh: TrainState, step: int, m: np.ndarray, v: np.ndarray, windows: np.ndarray) -> TrainState:
    """A fresh state with these moments, updates done, and windows, which are on the host and copied; moments as the
    parameters of `create_state`."""
    if plan.devices == 1:
        moments = AdamWState(jnp.array(step, jnp.int32), jnp.array(m), jnp.array(v))
        return dataclasses.replace(fresh, optimizer=moments, windows=jnp.array(windows))
    specs = state_specs(plan)
    on_host = (np.array(step, np.int32), rows_of(plan, m), rows_of(plan, v)), windows
    placed = parallel.place(plan, on_host, (tuple(specs.optimizer), specs.windows))
    return dataclasses.replace(fresh, optimizer=AdamWState(*placed[0]), windows=placed[1])


def rows_of(plan: Plan, buffer: np.ndarray) -> np.ndarray:
    """A whole buffer on the host as a state keeps it, of several processes the rows of this one's ranks; these as they are."""
    if not plan.zero or buffer.ndim == 2:
        return buffer
    return parallel.own_part(plan, plan.layout.rows(buffer, plan.devices))


def state_specs(plan: Plan) -> TrainState:
    """How a state lies on the devices: parallel.py's specs in place of its arrays."""
    buffers, everywhere = parallel.buffers_of(plan), parallel.EVERYWHERE
    grads = parallel.BY_RANK if plan.writes_in_place else None
    return TrainState(buffers, AdamWState(everywhere, buffers, buffers), everywhere, grads)  # type: ignore[arg-type]


def state_shapes(plan: Plan) -> TrainState:
    """The shapes of a state, from which a step can be compiled before there are weights."""
    shape = (plan.devices, plan.layout.num_parameters // plan.devices) if plan.zero else (plan.layout.num_parameters,)
    params = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(lambda params: _fresh_state(plan, params), params)


def accumulated_gradient(
    plan: Plan,
    params_N: jax.Array,
    grads_N: jax.Array | None,
    x_ABT: jax.Array,
    y_ABT: jax.Array,
    noise: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """loss_and_gradient of the mean over A micro-batches, summed in float32 in their order; `noise` (ops/dropout.py) is the
    step's.

    Where the backend has no loops the function holds the micro-batches one after another.
    """
    return with_squares(plan, *_sums_of_micro_batches(plan, params_N, grads_N, x_ABT, y_ABT, noise))


def _sums_of_micro_batches(
    plan: Plan,
    params_N: jax.Array,
    grads_N: jax.Array | None,
    x_ABT: jax.Array,
    y_ABT: jax.Array,
    noise: jax.Array | None,
) -> _Sums:
    num_micro_batches = x_ABT.shape[0]
    noises = None if noise is None else noise_of(noise, lax.iota(jnp.uint32, num_micro_batches))
    first = x_ABT[0], y_ABT[0], None if noises is None else noises[0]
    if num_micro_batches == 1:
        return micro_batch_gradient(plan, params_N, grads_N, first, 1.0, accumulate=False)

    def add(total: _Sums, batch: _Batch) -> tuple[_Sums, None]:
        loss, grads_N, known = micro_batch_gradient(plan, params_N, total[1], batch, 1.0 / num_micro_batches, accumulate=True)
        return (total[0] + loss, grads_N, known), None

    zeros = partial(jnp.zeros, dtype=jnp.float32)
    sizes = (parallel.gradient_layout(plan).num_parameters,), (writer_of(plan).num_known(plan),)
    total: _Sums = (zeros(()), zeros(sizes[0]), zeros(sizes[1]))
    if plan.backend.loops:
        total = lax.scan(add, total, (x_ABT, y_ABT, noises))[0]
    else:
        add_once = jax.jit(add)  # traced once, called A times
        for index in range(num_micro_batches):
            batch = x_ABT[index], y_ABT[index], None if noises is None else noises[index]
            total, _ = add_once(total, batch)
    return total


def _reduced_gradient(
    plan: Plan, state: TrainState, x_ABT: jax.Array, y_ABT: jax.Array, noise: jax.Array | None
) -> tuple[_Sums, jax.Array]:
    """Inside of `on_every_device`: the mean loss of all devices, the gradient of what this device updates, each tensor's
    sum of squares; and this device's own gradient, in whose memory the next is written."""
    params, own = parallel.row_of(plan, state.params), None if state.grads is None else parallel.row_of(plan, state.grads)
    if plan.devices == 1:
        loss, grads, squares_S = accumulated_gradient(plan, params, own, x_ABT, y_ABT, noise)
        return (loss, grads, squares_S), grads
    own_noise = None if noise is None else noise_of(noise, parallel.rank())
    with jax.named_scope("gather"):
        params_N = parallel.gathered_weights(plan, params)
    loss, own, _ = _sums_of_micro_batches(plan, params_N, own, x_ABT, y_ABT, own_noise)
    with jax.named_scope("scatter"):
        # Keeps XLA from pulling the making of the gradient into the passes over the buffer. From here on nobody needs it as
        # it was before, which would be a copy.
        own = lax.optimization_barrier(own)
        grads = parallel.mean_gradient(plan, own)
        # The next gradient may be written over any buffer of its size: that of the sum needs no other beside it.
        written_next = grads if grads.shape == own.shape else own
        return (parallel.mean(plan, loss), grads, parallel.squares(plan, grads)), written_next


def loss_and_gradient(
    plan: Plan,
    params_N: jax.Array,
    grads_N: jax.Array | None,
    x_BT: jax.Array,
    y_BT: jax.Array,
    noise: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean loss, float32; its gradient (num_parameters,) float32; and each tensor's sum of squares (S,).

    Where the plan's writer works in place the gradient is written over `grads_N`, if there is one; the part of a frozen
    tensor stays as it is. x and y are (B, T) int32, ids below the true vocabulary. Without `noise`, the uint32 scalar of
    ops/dropout.py, nothing is dropped.
    """
    return with_squares(plan, *micro_batch_gradient(plan, params_N, grads_N, (x_BT, y_BT, noise), 1.0, accumulate=False))


def with_squares(plan: Plan, loss: jax.Array, grads_N: jax.Array, known: jax.Array) -> _Sums:
    """Loss, gradient and each tensor's sum of squares (S,) of a whole step, from the sums over its micro-batches."""
    with jax.named_scope("gradient"):
        return loss, *writer_of(plan).squares(plan, grads_N, known)


_Batch = tuple[jax.Array, jax.Array, jax.Array | None]  # x_BT, y_BT, and the noise of its dropout
_Sums = tuple[jax.Array, jax.Array, jax.Array]  # loss, gradient, and those squares that the writer has summed


def micro_batch_gradient(
    plan: Plan, params_N: jax.Array, grads_N: jax.Array | None, batch: _Batch, scale: float, *, accumulate: bool
) -> _Sums:
    """`scale` times the mean loss of one micro-batch, and its gradient, or with `accumulate` that added to `grads_N`."""
    x_BT, y_BT, noise = batch
    if grads_N is None:
        grads_N = jnp.zeros((parallel.gradient_layout(plan).num_parameters,), jnp.float32)
    # A buffer that is not written in place is passed on untouched: any will do.
    buffer_N = grads_N if plan.writes_in_place else jnp.zeros_like(params_N)

    def forward(flat_N: jax.Array, slots: Any) -> tuple[jax.Array, jax.Array]:
        weights = Weights(plan, flat_N, slots, accumulate=accumulate, noise=noise)
        return model.hidden_states(weights, x_BT), weights.flat_N

    with plan.precision():
        (h_BTC, _), pull_back = jax.vjp(forward, params_N, empty_slots(plan))
        with jax.named_scope("classifier"):
            site, table = at_hand(Site(plan, (model.CLASSIFIER,), accumulate=accumulate), params_N, h_BTC)
            classify = classifier_of(plan).loss_and_gradient
            written = buffer_N if table is params_N else jnp.zeros_like(table)
            loss, dh_BTC, written, of_classifier = classify(site, h_BTC, y_BT, table, written, scale)
            buffer_N = written if table is params_N else buffer_N
        buffer_N, slots = pull_back((dh_BTC, buffer_N))
        with jax.named_scope("gradient"):
            grads_N = buffer_N if plan.writes_in_place else grads_N
            # The token table has its gradient from both ends of the model.
            slots |= {name: (slots[name][0] + slot,) for name, slot in of_classifier.items()}
            return loss, *writer_of(plan).finish(plan, grads_N, slots, accumulate)


def schedule_of(settings: OptimizerSettings, steps: int) -> Schedule:
    """The learning rate of each update of a run of so many steps."""
    warmup, end = settings.warmup_steps, settings.final_learning_rate_fraction
    return learning_rate_schedule(
        settings.schedule, settings.learning_rate, steps=steps, warmup_steps=warmup, final_fraction=end
    )


def make_step(
    plan: Plan, settings: OptimizerSettings, steps: int, *, rounds: bool = False, seed: int = 0
) -> jax.stages.Wrapped:
    """The step to compile: (state, x, y) -> (new state, metrics), x and y (A, B, T) int32, for a run of so many steps; of
    D devices (A, D * B, T), rank r's rows being [r * B, (r + 1) * B).

    The old state is donated where the backend can. An update that is not finite, or an outlier by the settings' z-scores,
    leaves parameters and moments as they were. Called with a fourth argument, tensor seeds (S,) uint32, the step rounds
    the new parameters to bfloat16's values; several devices need `rounds` for it, and from --zero 1 on seeds (D, S).
    Dropout's bits come from `seed` and the number of updates done.
    The step of several processes has wishes (D, NUM_WISHES) int32 before the seeds; `arguments` makes what it is called with.
    """
    schedule = schedule_of(settings, steps)
    optimizer = adamw(
        schedule,
        parallel.buffer_layout(plan),
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
        noise = noise_of_step(seed, state.optimizer.step) if plan.dropout else None
        (loss, grads_N, squared_norms_S), own = _reduced_gradient(plan, state, x_ABT, y_ABT, noise)
        norm = jnp.sqrt(jnp.sum(squared_norms_S))
        verdict, windows = judge(
            loss, norm, state.windows, max_loss_z=settings.skip_loss_z, max_gradient_z=settings.skip_gradient_z
        )
        with jax.named_scope("adamw"):
            before, moments = parallel.row_of(plan, state.params), state.optimizer
            rows = AdamWState(moments.step, parallel.row_of(plan, moments.m), parallel.row_of(plan, moments.v))
            params_N, rows = optimizer.apply(grads_N, norm, verdict.applies, rows, before)
        if tensor_seeds is not None:  # parameters that were not updated are rounded already, and stay
            seeds_S = parallel.row_of(plan, tensor_seeds)
            params_N = stochastically_rounded(params_N, parallel.buffer_layout(plan), seeds_S)
        metrics = Metrics(loss, norm, schedule(moments.step), squared_norms_S, verdict)

        def as_kept(buffer: jax.Array, kept: jax.Array) -> jax.Array:
            return buffer.reshape(kept.shape)

        moments = AdamWState(rows.step, as_kept(rows.m, moments.m), as_kept(rows.v, moments.v))
        grads = None if state.grads is None else as_kept(own, state.grads)
        return TrainState(as_kept(params_N, state.params), moments, windows, grads), metrics

    donated = (0,) if plan.backend.donates else ()
    if plan.devices == 1:
        return jax.jit(step, donate_argnums=donated)

    def step_with_wishes(
        state: TrainState, x_ABT: jax.Array, y_ABT: jax.Array, wishes: jax.Array, *seeds: jax.Array
    ) -> tuple[TrainState, Metrics]:
        state, metrics = step(state, x_ABT, y_ABT, *seeds)
        return state, dataclasses.replace(metrics, wishes=parallel.highest(plan, wishes))

    in_specs = (state_specs(plan), *argument_specs(plan, rounds=rounds))
    out_specs = (state_specs(plan), parallel.EVERYWHERE)
    placed = jax.tree_util.tree_map(lambda spec: parallel.sharding_of(plan, spec), (in_specs, out_specs))
    body = step if plan.processes == 1 else step_with_wishes
    whole = parallel.on_every_device(plan, body, in_specs, out_specs)
    return jax.jit(whole, donate_argnums=donated, in_shardings=placed[0], out_shardings=placed[1])


def argument_specs(plan: Plan, *, rounds: bool) -> tuple[Any, ...]:
    """How what a step of several devices is called with lies on them, the state apart."""
    wishes = (parallel.BY_RANK,) if plan.processes > 1 else ()
    return parallel.BATCHES, parallel.BATCHES, *wishes, *((parallel.buffers_of(plan),) if rounds else ())


def arguments(
    plan: Plan, x_ABT: np.ndarray, y_ABT: np.ndarray, wishes: tuple[int, ...], seeds: tuple[np.ndarray, ...]
) -> tuple[Any, ...]:
    """What a compiled step is called with behind the state. Of several processes each gives the batches of its own ranks,
    its wishes, and the seeds of all ranks."""
    if plan.processes == 1:
        return x_ABT, y_ABT, *seeds
    own_seeds = tuple(parallel.own_part(plan, of_all) for of_all in seeds) if plan.zero else seeds
    specs = argument_specs(plan, rounds=bool(seeds))
    x, y, *placed_seeds = parallel.place(plan, [x_ABT, y_ABT, *own_seeds], [*specs[:2], *specs[3:]])
    return x, y, own_wishes(plan, wishes), *placed_seeds


def own_wishes(plan: Plan, wishes: tuple[int, ...]) -> jax.Array:
    """This process's wishes on each of its devices, of (D, NUM_WISHES)."""
    own = np.tile(np.array(wishes, np.int32), (len(parallel.own_ranks(plan)), 1))
    return parallel.place(plan, own, parallel.BY_RANK)


def compile_step(
    plan: Plan, settings: OptimizerSettings, steps: int, shape: tuple[int, ...], *, rounds: bool = False, seed: int = 0
) -> jax.stages.Compiled:
    """make_step compiled for micro-batches of shape (A, D * B, T), from shapes alone; `rounds`: with tensor seeds."""
    batch = jax.ShapeDtypeStruct(shape, jnp.int32)
    num_tensors = len(plan.layout.tensors)
    seeds = (jax.ShapeDtypeStruct((plan.devices, num_tensors) if plan.zero else (num_tensors,), jnp.uint32),) if rounds else ()
    wishes = (jax.ShapeDtypeStruct((plan.devices, NUM_WISHES), jnp.int32),) if plan.processes > 1 else ()
    step = make_step(plan, settings, steps, rounds=rounds, seed=seed)
    lowered = step.lower(state_shapes(plan), batch, batch, *wishes, *seeds)
    return lowered.compile(compiler_options=plan.compiler_options())
