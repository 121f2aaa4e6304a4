"""A plain function as a threaded op: all that an op without a kernel of its own needs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from gpt2_jax.ops.threaded import Site, Slots, ThreadedOp, threaded
from gpt2_jax.ops.writer import write_gradient


def plain(function: Callable[..., Any]) -> ThreadedOp:
    """The threaded op of a plain function (site, x, *weights) -> y, weights float32 in the order of site.names.

    Its backward pass differentiates the function anew: XLA finds what both passes compute, and computes it once.
    """

    def read(site: Site, flat_N: jax.Array) -> list[jax.Array]:
        return [site.view(flat_N, name).array() for name in site.names]

    def forward(site: Site, x: Any, flat_N: jax.Array) -> tuple[Any, Any]:
        return function(site, x, *read(site, flat_N)), x

    def backward(site: Site, x: Any, flat_N: jax.Array, dy: Any, gradient_N: jax.Array) -> tuple[Any, jax.Array, Slots]:
        _, pull_back = jax.vjp(partial(function, site), x, *read(site, flat_N))
        dx, *gradients = pull_back(dy)
        slots = {}
        for name, gradient in zip(site.names, gradients, strict=True):
            gradient_N, slots[name] = write_gradient(site, gradient_N, name, gradient)
        return dx, gradient_N, slots

    return threaded(forward, backward)
