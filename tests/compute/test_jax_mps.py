"""The program that jax-mps would be given holds all of its own operations, and computes the reference's numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.compute.test_metal_check import PRESETS, rounding_error
from tests.conftest import REPOSITORY

PARTS = ("mps.sdpa_causal", "mps.gelu", "mps.layer_norm")


@pytest.fixture(scope="module")
def found():
    """What tests/jax_mps.py found, in a process that the plugin's Python may change."""
    command = [sys.executable, "-m", "tests.jax_mps"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    if "unavailable" in result:
        pytest.skip(result["unavailable"])
    return result


def test_all_attention_gelu_and_layer_norm_are_recognised(found):
    """Forward and backward, for every preset, both dtypes, and every --recompute, which makes parts a second time."""
    assert {program["run"] for program in found["programs"]} >= {path.stem for path in PRESETS}
    for program in found["programs"]:
        layers, recompute = program["layers"], program["recompute"]
        norms = 2 * layers + 1
        wanted = dict(zip(PARTS, (layers, layers, norms), strict=True))
        if program["function"] == "training step":
            wanted |= {f"{part}_bwd": count for part, count in wanted.items()}
            wanted["mps.sdpa_causal"] *= 2 if recompute == "block" else 1
            wanted["mps.gelu"] *= 1 if recompute == "none" else 2
            wanted["mps.layer_norm"] += 2 * layers if recompute in ("layernorm", "block") else 0
        assert program["custom_calls"] == wanted, program


def test_every_operation_is_in_the_table_of_jax_mps(found):
    """Also no product whose declared type the plugin would not heed."""
    assert [line for program in found["programs"] for line in program["violations"]] == []


def test_the_blocks_keep_a_fifth(found):
    """14.8 GB by the reference's forms, as XLA keeps what its backward reads; a layer's inputs of products alone are 2.4."""
    assert found["residual_bytes"] <= 2.9e9


def test_the_step_is_short(found):
    """1199 lines by the reference's forms."""
    lines = {program["dtype"]: program["lines"] for program in found["programs"] if program["run"] == "small, one micro-batch"}
    assert lines["float32"] <= 650


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_programs_compute_what_the_reference_does(found, dtype):
    """Loss and gradient, validation, sampling, and a whole step with two micro-batches, clipping and AdamW."""
    differences = found["differences"][dtype]
    if not differences:
        pytest.skip("this jaxlib has no StableHLO interpreter")
    assert differences.pop("parameters, in roundings") <= 1
    # Both round in bfloat16, each in its own places.
    allowed = {"float32": 1e-6, "bfloat16": np.sqrt(2) * rounding_error(dtype)}[dtype]
    assert {name: value for name, value in differences.items() if value > allowed} == {}
    assert len(differences) == 8
