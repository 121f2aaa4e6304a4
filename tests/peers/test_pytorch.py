"""The whole model, its gradients and ten optimizer steps against PyTorch's GPT-2, at a small size."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from gpt2_jax.buffer.layout import ParameterLayout
from gpt2_jax.gradient_check import check_gradients
from gpt2_jax.ops import layer_norm, writer
from gpt2_jax.ops.cpu import library
from gpt2_jax.ops.matmul import IMPLEMENTATIONS
from tests.conftest import TINY, available, can_alias, plan_of

pytestmark = pytest.mark.torch


def check(tiny_params, tiny_batch, dtype, matmul):
    rows = check_gradients(plan_of(dtype=dtype, matmul=matmul), tiny_params, *tiny_batch)
    assert len(rows) == 1 + 1 + 16 + 1
    assert [row.name for row in rows if not row.passed] == []
    assert all(np.isfinite(row.used_tolerance) for row in rows)


@pytest.mark.parametrize("matmul", available(IMPLEMENTATIONS))
def test_float32_is_within_tolerance(tiny_params, tiny_batch, matmul):
    check(tiny_params, tiny_batch, "float32", matmul)


@pytest.mark.parametrize("matmul", available(["xla", "threaded"]))
def test_bfloat16_is_within_tolerance(tiny_params, tiny_batch, matmul):
    check(tiny_params, tiny_batch, "bfloat16", matmul)


def test_a_wrong_gradient_is_found(tiny_params, tiny_batch, monkeypatch):
    monkeypatch.setattr(layer_norm, "LAYERNORM_EPSILON", 1e-3)
    failed = {row.name for row in check_gradients(plan_of(), tiny_params, *tiny_batch) if not row.passed}
    assert "loss" in failed
    assert "grad qkvw" in failed


def failures(params, batch, matmul) -> list[str]:
    """What check_gradients finds wrong, the losses of ten steps apart."""
    rows = check_gradients(plan_of(matmul=matmul), params, *batch)
    return [row.name for row in rows if not row.passed and row.name != "10 steps' losses"]


@can_alias
@pytest.mark.parametrize("matmul", available(["threaded"]))
@pytest.mark.parametrize("broken", ["gain of every norm", "position table", "token table", "last shift"])
def test_what_the_running_step_computes_is_what_is_checked(tiny_params, tiny_batch, monkeypatch, matmul, broken):
    """Custom calls that make one gradient 1 % too large: the check once differentiated another model than the one that runs."""
    real_call, real_write = library.call, writer._write_into
    wpe, lnfb = (TINY.layout[name].offset for name in ("wpe", "lnfb"))
    bad_place = {"position table": wpe, "last shift": lnfb}.get(broken)

    def call(target, *arguments, **options):
        found = real_call(target, *arguments, **options)
        if broken == "gain of every norm" and target == library.LAYER_NORM_BACKWARD:
            return (found[0], found[1] * 1.01, found[2])
        return found

    def write_into(gradient_N, offsets, pieces, accumulate):
        scaled = [piece * (1.01 if offset == bad_place else 1.0) for offset, piece in zip(offsets, pieces, strict=True)]
        return real_write(gradient_N, offsets, scaled, accumulate)

    def rows_in_place(site, gradient_N, name, indices, rows):
        return real_rows_in_place(site, gradient_N, name, indices, rows * (1.01 if broken == "token table" else 1.0))

    (row,) = (row for row in writer.TABLE if row.name == "in_place")
    real_rows_in_place = row.functions.rows
    patched = dataclasses.replace(row, functions=row.functions._replace(rows=rows_in_place))
    monkeypatch.setattr(writer, "TABLE", tuple(patched if one is row else one for one in writer.TABLE))
    monkeypatch.setattr(library, "call", call)
    monkeypatch.setattr(writer, "_write_into", write_into)
    assert (
        failures(tiny_params, tiny_batch, matmul)
        == {
            "gain of every norm": ["grad ln1w", "grad ln2w", "grad lnfw"],
            "position table": ["grad wpe"],
            "token table": ["grad wte"],
            "last shift": ["grad lnfb"],
        }[broken]
    )


@can_alias
@pytest.mark.parametrize("matmul", available(["threaded"]))
def test_a_gradient_that_is_added_to_what_was_in_the_buffer_is_found(tiny_params, tiny_batch, monkeypatch, matmul):
    """The buffer holds the last step's gradient, which must be replaced."""
    real_write = writer._write_into
    monkeypatch.setattr(writer, "_write_into", lambda buffer, offsets, pieces, _: real_write(buffer, offsets, pieces, True))
    failed = failures(tiny_params, tiny_batch, matmul)
    assert {"grad lnfw", "grad qkvb"} <= set(failed)


def test_a_wrong_decay_mask_is_found_in_the_ten_losses(tiny_params, tiny_batch, monkeypatch):
    """The tempting mistake: stacked biases and LayerNorm gains have two dimensions, but must not decay."""

    def spans_by_dimensions(layout):
        return tuple((tensor.offset, tensor.stop) for tensor in layout.tensors if len(tensor.full_shape) >= 2)

    monkeypatch.setattr(ParameterLayout, "decay_spans", property(spans_by_dimensions))
    failed = [row.name for row in check_gradients(plan_of(), tiny_params, *tiny_batch) if not row.passed]
    assert failed == ["10 steps' losses"]
