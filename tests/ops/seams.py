"""One threaded op by itself: its value and its derivatives, wherever its plan's writer leaves them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.compute.plan import Plan
from gpt2_jax.ops.threaded import Site, ThreadedOp
from gpt2_jax.ops.writer import empty_slots, writer_of

# Half a unit in the last place, relative to a number, at most.
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8}


class Derivatives(NamedTuple):
    y: Any
    dx: Any
    weights: dict[str, np.ndarray]  # the gradient of each of the op's tensors, of one layer


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def parameters(plan: Plan, seed: int = 0) -> np.ndarray:
    """A buffer whose values are bfloat16's, so that a cast of weights changes nothing; padding rows are zero."""
    params = random(seed, plan.layout.num_parameters).astype(jnp.bfloat16).astype(np.float32)
    params[slice(*plan.layout["wte"].padding_span)] = 0
    return params


def differentiate(op: ThreadedOp, site: Site, x: Any, params_N: np.ndarray, dy: Any, *, before: float = np.nan) -> Derivatives:
    """`before` fills the gradient buffer: what is written at once must not depend on it, and touches its place alone."""
    plan, layout = site.plan, site.plan.layout
    slots = {name: empty_slots(plan)[name][site.layer] for name in site.names}

    @jax.jit
    def run(x, params_N, gradient_N):
        (y, _), pull_back = jax.vjp(lambda x, flat_N, slots: op(site, x, flat_N, slots), x, params_N, slots)
        return y, *pull_back((dy, gradient_N))

    y, dx, gradient_N, dslots = run(x, jnp.asarray(params_N), jnp.full(params_N.shape, before, jnp.float32))
    gradient_N, weights = np.array(gradient_N), {}
    for name in site.names:
        tensor = layout[name].of_layer(site.layer)
        if writer_of(plan).writes_at_once and tensor.multiplies:
            weights[name] = gradient_N[tensor.offset : tensor.stop].reshape(tensor.shape).copy()
            gradient_N[tensor.offset : tensor.stop] = before
        else:
            weights[name] = np.asarray(dslots[name])
        assert (weights[name].shape, weights[name].dtype) == (tensor.shape, np.float32)
    np.testing.assert_array_equal(gradient_N, np.float32(before))
    return Derivatives(y, dx, weights)


def assert_within(found: Any, expected: Any, roundings: float, dtype: str) -> None:
    """So many roundings of `dtype`, relative to the largest expected value of each array in both pytrees."""
    found, expected = jax.tree_util.tree_leaves(found), jax.tree_util.tree_leaves(expected)
    assert len(found) == len(expected)
    for each, wanted in zip(found, expected, strict=True):
        wanted = np.asarray(wanted).astype(np.float32)
        assert each.shape == wanted.shape
        atol = roundings * ROUNDING[dtype] * float(np.abs(wanted).max(initial=0))
        np.testing.assert_allclose(np.asarray(each).astype(np.float32), wanted, rtol=0, atol=atol)


def in_dtype(array: np.ndarray, dtype: str) -> jax.Array:
    return jnp.asarray(array).astype(dtype)
