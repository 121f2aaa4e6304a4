"""Which updates are refused: the outlier detector against llm.c's in float64, and what is not finite."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.compute.stability import WINDOW, empty_windows, judge, not_finite
from gpt2_jax.compute.step import accumulated_gradient
from gpt2_jax.ops.cpu import library
from gpt2_jax.ops.writer import squared_norms
from tests.conftest import available, plan_of


class Detector:
    """llm.c's outlier detector: running sums in double, nan until a value pushes another one out of the window."""

    def __init__(self):
        self.values, self.index, self.sum, self.sum_of_squares = [], 0, 0.0, 0.0

    def update(self, value: float) -> float:
        self.sum += value
        self.sum_of_squares += value * value
        if len(self.values) < 128:
            self.values.append(value)
            return math.nan
        old, self.values[self.index] = self.values[self.index], value
        self.index = (self.index + 1) % 128
        self.sum -= old
        self.sum_of_squares -= old * old
        mean = self.sum / 128
        deviation = math.sqrt(self.sum_of_squares / 128 - mean * mean)
        return 0.0 if deviation == 0 else (value - mean) / deviation


def run(losses, norms, *, max_loss_z=0.0, max_gradient_z=0.0):
    """Verdicts on the steps of a run, and its last windows."""
    judging = jax.jit(judge, static_argnames=("max_loss_z", "max_gradient_z"))
    windows, verdicts = jnp.asarray(empty_windows()), []
    for loss, norm in zip(losses, norms, strict=True):
        loss, norm = jnp.float32(loss), jnp.float32(norm)
        verdict, windows = judging(loss, norm, windows, max_loss_z=max_loss_z, max_gradient_z=max_gradient_z)
        verdicts.append(jax.tree.map(np.asarray, verdict))
    return verdicts, np.asarray(windows)


def noise(mean: float, deviation: float, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, deviation, count).astype(np.float32)


def test_scores_are_llmcs():
    losses, norms = noise(3.3, 0.05, 300, 1), noise(0.4, 0.1, 300, 2)
    losses[200], norms[250] = 4.5, 3.0
    verdicts, windows = run(losses, norms)
    found = np.array([verdict.z_scores for verdict in verdicts])
    detectors = Detector(), Detector()
    expected = np.array(
        [[d.update(value) for value in values.tolist()] for d, values in zip(detectors, (losses, norms), strict=True)]
    ).T
    assert np.isnan(found[:WINDOW]).all()
    assert np.isfinite(found[WINDOW:]).all()
    # A mean of 128 float32 values is off by a few roundings of 3.3, of which a deviation is 0.05 or more: 1e-4.
    np.testing.assert_allclose(found[WINDOW:], expected[WINDOW:], rtol=1e-3, atol=1e-4)
    assert found[200, 0] > 5
    assert found[250, 1] > 5
    np.testing.assert_array_equal(windows, [losses[-WINDOW:], norms[-WINDOW:]])


@pytest.mark.parametrize(("thresholds", "refused"), [((0, 0), []), ((5, 0), [200]), ((0, 5), [250]), ((5, 5), [200, 250])])
def test_outliers_are_refused_by_their_threshold(thresholds, refused):
    losses, norms = noise(3.3, 0.05, 300, 1), noise(0.4, 0.1, 300, 2)
    losses[200], norms[250] = 4.5, 3.0
    verdicts, _ = run(losses, norms, max_loss_z=thresholds[0], max_gradient_z=thresholds[1])
    assert [step for step, verdict in enumerate(verdicts) if not verdict.applies] == refused
    assert all(verdict.is_finite for verdict in verdicts)


def test_nothing_is_an_outlier_before_the_window_is_full_and_nothing_below_the_mean_ever():
    losses = noise(3.3, 0.05, 200, 1)
    losses[100], losses[190] = 50.0, 0.0
    verdicts, _ = run(losses, np.ones(200), max_loss_z=3.0, max_gradient_z=3.0)
    assert all(verdict.applies for verdict in verdicts[:WINDOW])
    assert verdicts[190].applies
    assert verdicts[190].z_scores[1] == 0  # equal values have no deviation


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_not_finite_is_refused_and_forgotten(bad, which):
    steps = [noise(3.3, 0.05, 140, 1), noise(0.4, 0.1, 140, 2)]
    steps[which][5] = steps[which][135] = bad
    verdicts, windows = run(*steps)
    assert [step for step, verdict in enumerate(verdicts) if not verdict.applies] == [5, 135]
    assert [step for step, verdict in enumerate(verdicts) if not verdict.is_finite] == [5, 135]
    kept = [step for step in range(140) if step not in (5, 135)][-WINDOW:]
    np.testing.assert_array_equal(windows, [row[kept] for row in steps])


@pytest.mark.parametrize("custom_call", [False, *([True] if library.is_built() else [])])
def test_norms_tell_which_tensors_are_not_finite(tiny_layout, custom_call):
    grads = np.random.default_rng(3).normal(size=tiny_layout.num_parameters).astype(np.float32)
    views = tiny_layout.views(grads)
    views["fcw"][1, 2, 3] = np.nan
    views["lnfb"][-1] = np.inf
    found = jax.jit(partial(squared_norms, tensors=tiny_layout.tensors, custom_call=custom_call))(grads)
    for tensor, value in zip(tiny_layout.tensors, found.tolist(), strict=True):
        if tensor.name in ("fcw", "lnfb"):
            assert not np.isfinite(value)
        else:
            expected = np.square(views[tensor.name], dtype=np.float64).sum()
            assert abs(value - expected) <= 1e-5 * expected


@pytest.mark.parametrize("matmul", available(["xla", "threaded"]))
@pytest.mark.parametrize("num_micro_batches", [1, 3])
def test_the_norm_is_that_of_the_whole_buffer(tiny_params, tiny_batch, matmul, num_micro_batches):
    """Writers sum the squares of a tensor while they write it; with micro-batches those of the running total count."""
    params, batch = jnp.asarray(tiny_params), [part.reshape(num_micro_batches, -1, 16) for part in tiny_batch]
    gradient = jax.jit(partial(accumulated_gradient, plan_of(matmul=matmul)))
    _, grads, found = gradient(params, jnp.full_like(params, jnp.nan), *batch)
    expected = np.square(np.asarray(grads, dtype=np.float64)).sum()
    # Sums of at most 203 * 128 squares in float32, then one of 16: far below 2^-24 times the longest sum's depth.
    assert abs(float(found.sum()) - expected) <= 1e-5 * expected


def test_the_message_names_the_tensors_whose_gradient_is_not_finite(tiny_layout):
    squared = np.ones(16, np.float32)
    squared[[4, 15]] = np.nan, np.inf
    message = not_finite(12, 3.5, math.nan, squared, tiny_layout, ["a.bin at token 7", "b.bin at token 0"])
    assert message.startswith("step 12: expected a finite loss and gradient, found a loss of 3.5 and a gradient norm of nan")
    assert message.endswith("not finite in qkvw, lnfb, for the batch of a.bin at token 7; b.bin at token 0")
    many = not_finite(12, 3.5, math.nan, squared, tiny_layout, [f"{number}.bin" for number in range(9)])
    assert many.endswith("; 7.bin ...")
