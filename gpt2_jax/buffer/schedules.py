"""Learning-rate schedules by llm.c's formulas (llmc/schedulers.h), computed inside the compiled step."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array], jax.Array]
SCHEDULES = ("cosine", "linear", "constant", "wsd")


def learning_rate_schedule(
    kind: str, learning_rate: float, *, steps: int, warmup_steps: int = 0, final_fraction: float = 1.0
) -> Schedule:
    """Learning rate of the update with index `count` (0-based), float32, by llm.c's formulas.

    All kinds but 'constant' rise as lr * (count + 1) / warmup_steps first. Then 'cosine' and 'linear' fall to
    final_fraction * lr at `steps`; 'wsd' stays at lr up to int(0.8 * steps) and falls with 1 - sqrt.
    """
    lowest = final_fraction * learning_rate
    decay_start = int(0.8 * steps) if kind == "wsd" else warmup_steps
    decays: dict[str, Schedule] = {
        "cosine": lambda done: lowest + 0.5 * (1.0 + jnp.cos(math.pi * done)) * (learning_rate - lowest),
        "linear": lambda done: learning_rate - done * (learning_rate - lowest),
        "wsd": lambda done: lowest + (1.0 - jnp.sqrt(done)) * (learning_rate - lowest),
    }
    if kind != "constant" and kind not in decays:
        raise ValueError(f"schedule: expected one of {SCHEDULES}, found {kind!r}")

    def schedule(count: jax.Array) -> jax.Array:
        step = count.astype(jnp.float32)
        if kind == "constant":
            return jnp.full_like(step, learning_rate)
        # The fraction of the decay that is done; a run whose warmup fills it has no decay.
        done = jnp.clip((step - decay_start) / max(steps - decay_start, 1), 0.0, 1.0)
        decayed = decays[kind](done)
        if not warmup_steps:
            return decayed
        return jnp.where(step < warmup_steps, learning_rate * (step + 1.0) / warmup_steps, decayed)

    return schedule
