"""Multiply two matrices with each custom call that this machine runs: what an installed wheel must be able to do."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from gpt2_jax.compute.backend import Backend
from gpt2_jax.ops.linear import RUNGS, choose_implementation, matmul

refusals = choose_implementation("auto", Backend("cpu", "cpu", "")).refusals
# Integers of three bits, and sums of at most 17: exact in every precision.
a, b = np.random.default_rng(0).integers(-7, 8, (2, 33, 33)).astype(np.float32)
for rung in RUNGS:
    if rung in refusals:
        print(f"{rung}: {refusals[rung]}")
        continue
    product = matmul(a, b, transpose_b=True, out_dtype=jnp.dtype("float32"), implementation=rung)
    np.testing.assert_array_equal(product, a @ b.T)
    print(f"{rung}: right")
if "naive" in refusals:
    raise SystemExit("the library is not there")
