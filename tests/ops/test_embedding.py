"""Embeddings: values, and the sums of gradients, by every implementation under every writer."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.compute.plan import SEAMS
from gpt2_jax.ops.embedding import embedding_of
from gpt2_jax.ops.table import Choice
from gpt2_jax.ops.threaded import Site
from gpt2_jax.ops.writer import writer_of
from tests.conftest import TINY, available
from tests.implementations import dtypes, plan_of_kind
from tests.ops.seams import ROUNDING, differentiate, in_dtype, parameters, random

NAMES = ("wte", "wpe")


def plan_of(kind, implementation, dtype):
    plan = plan_of_kind(kind, dtype)
    row = next(row for row in SEAMS["embedding"] if row.name == implementation)
    if reason := row.accepts(plan):
        pytest.skip(f"embedding:{implementation} for {kind}: {reason}")
    return dataclasses.replace(plan, embedding=Choice(implementation, "test"))


@pytest.mark.parametrize("kind", ["xla", *available(["threaded"]), "nvidia"])
@pytest.mark.parametrize("implementation", [row.name for row in SEAMS["embedding"]])
@dtypes
@pytest.mark.parametrize("shape", [(3, 16), (2, 5), (1, 1)], ids=str)
def test_values_and_gradients(kind, implementation, dtype, shape):
    plan = plan_of(kind, implementation, dtype)
    x = np.random.default_rng(0).integers(0, TINY.vocab_size, shape).astype(np.int32)
    x[0, 0], x[-1, -1] = 0, TINY.vocab_size - 1
    x[:, :2] = x[0, 0]  # the same token several times
    params, dy = parameters(plan), in_dtype(random(1, *shape, TINY.channels), dtype)
    # The classifier's part of the table's gradient, to which this one is added where it is in the buffer already.
    before = 0.25
    site = Site(plan, NAMES, added=("wte",))
    found = differentiate(embedding_of(plan), site, x, params, dy, before=before)
    tensors = TINY.layout.views(params)
    wanted = (tensors["wte"][x] + tensors["wpe"][: shape[1]]).astype(jnp.dtype(dtype))
    assert found.y.dtype == dtype
    np.testing.assert_array_equal(np.asarray(found.y), wanted)
    dy = np.asarray(dy).astype(np.float32)
    dwte, dwpe = np.zeros_like(tensors["wte"]), np.zeros_like(tensors["wpe"])
    np.add.at(dwte, x, dy)
    dwpe[: shape[1]] = dy.sum(0)
    dwte += before if writer_of(plan).writes_at_once else 0
    # A plain function's gradient goes through the cast of its result, which is exact.
    atol = 2 * shape[0] * ROUNDING["float32"] * 16
    np.testing.assert_allclose(found.weights["wte"], dwte, rtol=0, atol=atol)
    np.testing.assert_allclose(found.weights["wpe"], dwpe, rtol=0, atol=atol)
    assert (found.weights["wpe"][shape[1] :] == 0).all()
