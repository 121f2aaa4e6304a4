"""Learning-rate schedules against llm.c's formulas."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_jax.buffer.schedules import SCHEDULES, learning_rate_schedule


def llmc_learning_rate(kind, lr, step, steps, warmup, final):
    """llm.c llmc/schedulers.h in float64."""
    lowest = lr * final
    if kind == "constant":
        return lr
    if step < warmup:
        return lr * (step + 1) / warmup
    if kind == "wsd":
        decay_point = int(0.8 * steps)
        if step < decay_point:
            return lr
        return lowest + (1 - math.sqrt((step - decay_point) / (steps - decay_point))) * (lr - lowest)
    ratio = (step - warmup) / (steps - warmup)
    if kind == "cosine":
        return lowest + 0.5 * (1 + math.cos(math.pi * ratio)) * (lr - lowest)
    return lr - ratio * (lr - lowest)


@given(
    kind=st.sampled_from(SCHEDULES),
    steps=st.integers(2, 200_000),
    warmup_fraction=st.floats(0, 0.7),
    position=st.floats(0, 1, exclude_max=True),
    final=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_schedules_are_llmcs(kind, steps, warmup_fraction, position, final):
    lr, warmup, step = 6e-4, int(steps * warmup_fraction), int(position * steps)
    schedule = learning_rate_schedule(kind, lr, steps=steps, warmup_steps=warmup, final_fraction=final)
    found = schedule(jnp.int32(step))
    assert found.dtype == jnp.float32
    # A few float32 operations on numbers up to lr; sqrt is steep at the start of wsd's decay.
    np.testing.assert_allclose(found, llmc_learning_rate(kind, lr, step, steps, warmup, final), rtol=0, atol=lr * 1e-5)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="expected one of"):
        learning_rate_schedule("cosin", 1e-3, steps=10)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_schedule_begins_and_ends_where_it_says(kind):
    """At the ends of each phase, where a step more or less shows."""
    schedule = learning_rate_schedule(kind, 1.0, steps=10, warmup_steps=4, final_fraction=0.5)
    rates = [float(schedule(jnp.int32(step))) for step in range(12)]
    if kind == "constant":
        assert rates == [1.0] * 12
        return
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[10] == rates[11] == pytest.approx(0.5)  # no further than the end
    decay_start = 8 if kind == "wsd" else 4
    assert rates[decay_start] == 1.0 > rates[decay_start + 1]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_warmup_as_long_as_the_run_leaves_no_decay(kind):
    schedule = learning_rate_schedule(kind, 1.0, steps=4, warmup_steps=4)
    assert np.isfinite([float(schedule(jnp.int32(step))) for step in range(5)]).all()
