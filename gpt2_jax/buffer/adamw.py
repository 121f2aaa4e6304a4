"""AdamW over the flat buffer with llm.c's semantics, as an optax GradientTransformation, and as one pass over the
buffers by a custom call.

Both run inside the compiled step. Formulas: llm.c llmc/adamw.cuh, train_gpt2.cu.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gpt2_jax.buffer.layout import ParameterLayout
from gpt2_jax.buffer.schedules import Schedule
from gpt2_jax.ops.cpu import library
from gpt2_jax.ops.table import Implementation, always

BETA1, BETA2, EPSILON = 0.9, 0.95, 1e-8
GRADIENT_CLIP = 1.0


class AdamWState(NamedTuple):
    step: jax.Array  # int32 scalar: updates done, the index of the next one
    m: jax.Array  # (num_parameters,) float32, first moment
    v: jax.Array  # (num_parameters,) float32, second moment


class Optimizer(NamedTuple):
    """An optax.GradientTransformation that can also apply its own updates."""

    init: Callable[[jax.Array], AdamWState]
    update: Callable[..., tuple[jax.Array, AdamWState]]
    # (grads, norm of grads, whether to apply them at all, state, params) -> (new params, new state)
    apply: Callable[[jax.Array, jax.Array, jax.Array, AdamWState, jax.Array], tuple[jax.Array, AdamWState]]


def global_norm(grads_N: jax.Array) -> jax.Array:
    """L2 norm of the whole gradient buffer, a float32 scalar."""
    return jnp.sqrt(jnp.sum(jnp.square(grads_N)))


def clip_scale(norm: jax.Array, max_norm: float = GRADIENT_CLIP) -> jax.Array:
    """Factor that clips a gradient of this norm: max_norm / norm if it is above `max_norm`, else 1.

    Unlike torch's clip_grad_norm_ there is no epsilon in the denominator.
    """
    return jnp.where(norm > max_norm, max_norm / norm, 1.0)


def adamw(
    schedule: Schedule,
    layout: ParameterLayout,
    *,
    weight_decay: float,
    beta1: float = BETA1,
    beta2: float = BETA2,
    epsilon: float = EPSILON,
    max_norm: float = GRADIENT_CLIP,
    custom_call: bool = False,
) -> Optimizer:
    """AdamW on (num_parameters,) float32 buffers: clip by the global norm, moments, bias correction from step + 1,
    and decoupled decay of the layout's decayed tensors (1-D and stacked bias tensors never decay). Frozen tensors and their
    moments stay as they are.

    update(grads, state, params) returns -lr * (m_hat / (sqrt(v_hat) + epsilon) + weight_decay * params), to be added
    by optax.apply_updates. `params` is required. `apply` does both, or nothing but count the step; with `custom_call`
    (on the CPU) in one pass over the four buffers, written in place inside jit.
    """

    def init(params_N: jax.Array) -> AdamWState:
        # Two arrays, not one twice: the state's buffers are donated to the step.
        return AdamWState(jnp.zeros((), jnp.int32), jnp.zeros_like(params_N), jnp.zeros_like(params_N))

    def update(grads_N: jax.Array, state: AdamWState, params_N: jax.Array | None = None) -> tuple[jax.Array, AdamWState]:
        if params_N is None:
            raise ValueError("adamw: expected params in update(grads, state, params), found none")
        return clipped_update(grads_N, global_norm(grads_N), state, params_N)

    def clipped_update(
        grads_N: jax.Array, norm: jax.Array, state: AdamWState, params_N: jax.Array
    ) -> tuple[jax.Array, AdamWState]:
        grads_N = grads_N * clip_scale(norm, max_norm)
        m_N = beta1 * state.m + (1.0 - beta1) * grads_N
        v_N = beta2 * state.v + (1.0 - beta2) * jnp.square(grads_N)
        updates_done = (state.step + 1).astype(jnp.float32)
        m_hat_N = m_N / (1.0 - jnp.power(beta1, updates_done))
        v_hat_N = v_N / (1.0 - jnp.power(beta2, updates_done))
        direction_N = m_hat_N / (jnp.sqrt(v_hat_N) + epsilon)
        if weight_decay:
            direction_N += jnp.where(_within(layout, layout.decay_spans), weight_decay, 0.0) * params_N
        updates_N = -schedule(state.step) * direction_N
        if layout.frozen_names:
            trains_N = _within(layout, tuple((start, stop) for start, stop, _ in layout.update_spans))
            updates_N = jnp.where(trains_N, updates_N, 0.0)
            m_N, v_N = jnp.where(trains_N, m_N, state.m), jnp.where(trains_N, v_N, state.v)
        return updates_N, AdamWState(state.step + 1, m_N, v_N)

    def apply(
        grads_N: jax.Array, norm: jax.Array, applies: jax.Array, state: AdamWState, params_N: jax.Array
    ) -> tuple[jax.Array, AdamWState]:
        updates_N, new = clipped_update(grads_N, norm, state, params_N)
        kept = AdamWState(new.step, jnp.where(applies, new.m, state.m), jnp.where(applies, new.v, state.v))
        return jnp.where(applies, params_N + updates_N, params_N), kept

    def apply_by_custom_call(
        grads_N: jax.Array, norm: jax.Array, applies: jax.Array, state: AdamWState, params_N: jax.Array
    ) -> tuple[jax.Array, AdamWState]:
        updates_done = (state.step + 1).astype(jnp.float32)
        corrections = [1.0 / (1.0 - jnp.power(beta, updates_done)) for beta in (beta1, beta2)]
        scalars = jnp.stack([clip_scale(norm, max_norm), schedule(state.step), *corrections, applies.astype(jnp.float32)])
        buffer = jax.ShapeDtypeStruct(params_N.shape, params_N.dtype)
        params_N, m_N, v_N = library.call(
            library.ADAMW,
            (buffer, buffer, buffer),
            grads_N,
            params_N,
            state.m,
            state.v,
            scalars,
            aliases={1: 0, 2: 1, 3: 2},
            spans=np.array(layout.update_spans, dtype=np.int64).reshape(-1),
            weight_decay=np.float32(weight_decay),
            beta1=np.float32(beta1),
            beta2=np.float32(beta2),
            epsilon=np.float32(epsilon),
        )
        return params_N, AdamWState(state.step + 1, m_N, v_N)

    return Optimizer(init, update, apply_by_custom_call if custom_call else apply)


def _within(layout: ParameterLayout, spans: tuple[tuple[int, int], ...]) -> jax.Array:
    """(num_parameters,) bool, true within [start, stop) of a span: comparisons that fuse into the update, not an array.

    Rows of equal length are counted rather than elements, whose number may exceed 32 bits.
    """
    bounds = [bound for span in spans for bound in span]
    length = math.gcd(layout.num_parameters, *bounds)
    num_rows = layout.num_parameters // length
    # One number a row, broadcast after the comparisons: a compiler that does not fuse iota would write one an element.
    row = lax.broadcasted_iota(jnp.uint32, (num_rows, 1), 0)
    within = jnp.zeros((num_rows, 1), dtype=bool)
    for start, stop in spans:
        within |= (row >= start // length) & (row < stop // length)
    return jnp.broadcast_to(within, (num_rows, length)).reshape(-1)


TABLE = (
    Implementation("custom_call", library.refusal, "one pass over the four buffers"),
    Implementation("xla", always, "the reference, on every device"),
)
