"""Multiply two matrices with each custom call that this machine runs: what an installed wheel must be able to do."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from gpt2_jax.compute.backend import cpu_backend
from gpt2_jax.compute.plan import make_plan
from gpt2_jax.config import ComputeSettings
from gpt2_jax.families.gpt2 import config_from_descriptor
from gpt2_jax.ops.matmul import CUSTOM_CALLS, custom_call_precision, matmul

FLOAT32 = jnp.dtype("float32")
refusals = dict(make_plan(ComputeSettings(), cpu_backend("to use the library"), config_from_descriptor("d6")).linear.refusals)
# Integers of three bits, and sums of at most 17 of their products: exact in every precision.
a, b = np.random.default_rng(0).integers(-7, 8, (2, 17, 17)).astype(np.float32)
for name in CUSTOM_CALLS:
    if name in refusals:
        print(f"{name}: {refusals[name]}")
        continue
    precision = custom_call_precision(name, FLOAT32, None)
    product = matmul(a, b, transpose_b=True, out_dtype=FLOAT32, implementation=name, precision=precision)
    np.testing.assert_array_equal(product, a @ b.T)
    print(f"{name} in {precision}: right")
if "naive" in refusals:
    raise SystemExit("the library is not there")
