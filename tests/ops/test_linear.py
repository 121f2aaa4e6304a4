"""The linear layer by every implementation of the products, against float64."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.compute.step import loss_and_gradient
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.ops import matmul
from gpt2_jax.ops.cpu import library
from gpt2_jax.ops.linear import linear
from gpt2_jax.ops.threaded import Site
from tests.conftest import plan_of
from tests.implementations import plan_with, rows_of
from tests.ops.seams import ROUNDING, differentiate, in_dtype, parameters, random
from tests.ops.test_matmul import left_out

ODD = GPT2Config(max_sequence_length=8, vocab_size=5, num_layers=2, num_heads=1, channels=7)


@rows_of("linear")
@pytest.mark.parametrize("leading", [(2, 5), (1, 1), (3, 1, 2), (64,)], ids=str)
@pytest.mark.parametrize("names", [("attprojw", "attprojb"), ("fcprojw", "fcprojb")], ids=lambda names: names[0])
def test_value_and_derivatives(implementation, dtype, leading, names):
    plan = plan_with("linear", implementation, dtype, ODD)
    params, site = parameters(plan), Site(plan, names, layer=1)
    w, b = (np.asarray(site.view(params, name).array()) for name in names)
    (O, I), rows = w.shape, int(np.prod(leading))
    x, dy = (in_dtype(random(seed, *leading, size), dtype) for seed, size in ((1, I), (2, O)))
    found = differentiate(linear, site, x, params, dy)
    assert (found.y.dtype, found.dx.dtype) == (dtype, dtype)
    assert (found.y.shape, found.dx.shape) == ((*leading, O), (*leading, I))
    x, dy = (np.asarray(each).astype(np.float64).reshape(rows, -1) for each in (x, dy))
    split = partial(left_out, implementation, dtype=dtype)
    for each, expected, magnitude, terms, more in (
        (found.y, x @ w.T + b, np.abs(x) @ np.abs(w).T + np.abs(b), I, split(x, w.T)),
        (found.dx, dy @ w, np.abs(dy) @ np.abs(w), O, split(dy, w)),
        (found.weights[names[0]], dy.T @ x, np.abs(dy).T @ np.abs(x), rows, split(dy.T, x, weight_gradient=True)),
        (found.weights[names[1]], dy.sum(0), np.abs(dy).sum(0), rows, 0.0),
    ):
        # Operands are exact. cuBLAS rounds the product before it adds the bias, and that sum once more, as it does the
        # gradient of the weight; float32 rounds each partial sum.
        bound = (2 * ROUNDING[dtype] + (terms + 1) * ROUNDING["float32"]) * magnitude + more
        each = np.asarray(each).astype(np.float64).reshape(expected.shape)
        assert (np.abs(each - expected) <= bound).all()


@pytest.mark.parametrize(
    ("setting", "precision", "of_gradients"),
    [
        ("default", "S8_S8_S32_X6", "BF16_BF16_F32_X3"),
        ("high", "BF16_BF16_F32_X3", "BF16_BF16_F32_X3"),
        ("highest", "BF16_BF16_F32_X6", "BF16_BF16_F32_X6"),
    ],
)
def test_only_a_weights_gradient_is_split_less_by_default(setting, precision, of_gradients, monkeypatch):
    """In what XLA is given, for a custom call that multiplies float32 in parts alone."""
    parts = {"available": True, "reason": "", "precisions": ["BF16_BF16_F32_X3", "BF16_BF16_F32_X6", "S8_S8_S32_X6"]}
    monkeypatch.setattr(library, "implementation", lambda name: parts)
    plan = plan_of(GPT2Config(8, 50, 1, 1, 16), matmul="amx", matmul_precision=setting)
    params_N, tokens_BT = jnp.zeros(plan.layout.num_parameters), jnp.zeros((2, 8), jnp.int32)
    lowered = jax.jit(partial(loss_and_gradient, plan)).lower(params_N, params_N, tokens_BT, tokens_BT)
    calls = re.findall(r".*@gpt2_jax_(?:matmul|attention).*", lowered.as_text())
    found = {("transpose_a = 1" in call, re.search(r'precision = "(\w+)"', call)[1]) for call in calls}
    assert found == {(False, precision), (True, of_gradients)}
    gradients = "" if of_gradients == precision else f", weights' gradients {of_gradients}"
    assert plan.describe_precision() == precision + gradients


def test_every_product_takes_the_same_part_of_the_table():
    """A custom call is named by --matmul and by nothing else, and has products of its own."""
    names = [row.name for row in matmul.TABLE]
    assert sorted(names) == sorted([*matmul.IMPLEMENTATIONS, "cublas", "apple"])
    assert names[-1] == "xla"
