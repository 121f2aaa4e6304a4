"""Every way to compute, as plans that a test can run on this machine."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from gpt2_jax.compute.backend import Backend, metal_backend
from gpt2_jax.compute.metal_plugins import METAL_PLUGINS
from gpt2_jax.compute.plan import SEAMS, Plan
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.ops.matmul import IMPLEMENTATIONS
from gpt2_jax.ops.table import Choice
from tests.conftest import TINY, available, plan_of

# Of this record what is for NVIDIA GPUs computes on the CPU too, but for cuDNN.
NVIDIA = Backend("cuda", "cpu", "test", frozenset({"custom_calls"}))
# What jax-mps would take, on the CPU: jax's own forms stand for the plugin's operations.
APPLE = dataclasses.replace(metal_backend(METAL_PLUGINS[0], "test"), platform="cpu")

own_products = pytest.mark.parametrize("kind", available(("naive", "threaded", "amx")))
kinds = pytest.mark.parametrize("kind", ["xla", *available(("naive", "threaded", "amx")), "nvidia", "apple"])
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def plan_of_kind(kind: str, dtype: str = "float32", config: GPT2Config = TINY, **compute: Any) -> Plan:
    """A plan whose matrix products are of this name on the CPU; or all that an NVIDIA GPU would take but cuDNN, or
    all that jax-mps would take."""
    if kind == "apple":
        return plan_of(config, backend=APPLE, matmul="auto", dtype=dtype, **compute)
    if kind != "nvidia":
        return plan_of(config, matmul=kind, dtype=dtype, **compute)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT2_JAX_DISABLE", "attention:cudnn")
        return plan_of(config, backend=NVIDIA, matmul="auto", dtype=dtype, **compute)


def rows_of(seam: str) -> Any:
    """Parametrize a test by the implementations of a seam, each with both dtypes."""
    return pytest.mark.parametrize(
        ("implementation", "dtype"), [(row.name, dtype) for row in SEAMS[seam] for dtype in ("float32", "bfloat16")]
    )


def plan_with(seam: str, implementation: str, dtype: str = "float32", config: GPT2Config = TINY, **compute: Any) -> Plan:
    """A plan in which this implementation computes the seam; skips the test, with the table's reason, if none can."""
    row = next(row for row in SEAMS[seam] if row.name == implementation)
    refused = dict(plan_of(config, matmul="auto", dtype=dtype).linear.refusals)
    on_cpu = [implementation] if seam == "linear" and implementation in IMPLEMENTATIONS else ["xla", "threaded"]
    plans = [plan_of_kind(kind, dtype, config, **compute) for kind in on_cpu if kind not in refused]
    if (seam, implementation) != ("attention", "cudnn"):
        plans.append(plan_of_kind("nvidia", dtype, config, **compute))
    plans.append(plan_of_kind("apple", dtype, config, **compute))
    reasons = [row.accepts(plan) for plan in plans]
    if None not in reasons:
        reason = refused[implementation] if seam == "linear" and implementation in IMPLEMENTATIONS else reasons[-1]
        pytest.skip(f"{seam}:{implementation}: {reason}")
    choice: dict[str, Any] = {seam: Choice(implementation, "test")}
    return dataclasses.replace(plans[reasons.index(None)], **choice)
