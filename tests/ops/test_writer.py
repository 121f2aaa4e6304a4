"""Every writer completes the same gradient buffer, and the sum of squares of each of its tensors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.families.gpt2 import GPT2Config, config_from_descriptor
from gpt2_jax.ops.threaded import Site
from gpt2_jax.ops.writer import empty_slots, squared_norms, write_gradient, write_product, write_rows, writer_of
from tests.implementations import plan_of_kind, plan_with, rows_of
from tests.ops.seams import ROUNDING, in_dtype, random

CONFIG = GPT2Config(max_sequence_length=6, vocab_size=70, num_layers=3, num_heads=1, channels=5)
ROWS = 4


@rows_of("writer")
@pytest.mark.parametrize("accumulate", [False, True])
def test_the_buffer_and_its_squares(implementation, dtype, accumulate):
    """A product's weight is written by its product or, for attprojw, as an array; the table by both and by rows."""
    plan = plan_with("writer", implementation, dtype, CONFIG, matmul_precision="highest")
    layout, seed = plan.layout, iter(range(1000))
    wanted = {
        name: tensor.astype(np.float64) for name, tensor in layout.views(np.zeros(layout.num_parameters, np.float32)).items()
    }
    factors, arrays = {}, {}
    for tensor in layout.tensors:
        for layer in range(tensor.num_layers):
            place = wanted[tensor.name][layer] if tensor.stacked else wanted[tensor.name]
            if tensor.multiplies and tensor.name != "attprojw":
                dy, x = (in_dtype(random(next(seed), ROWS, size), dtype) for size in tensor.shape)
                factors[tensor.name, layer] = dy, x
                place += np.asarray(dy).astype(np.float64).T @ np.asarray(x).astype(np.float64)
            else:
                arrays[tensor.name, layer] = gradient = random(next(seed), *tensor.shape)
                place += gradient
    indices, rows = np.array([[3, 0], [3, 69]], np.int32), in_dtype(random(next(seed), 2, 2, 5), dtype)
    np.add.at(wanted["wte"], indices, np.asarray(rows).astype(np.float64))
    before = random(next(seed), layout.num_parameters) if accumulate else np.full(layout.num_parameters, np.nan, np.float32)

    @jax.jit
    def write(gradient_N, factors, arrays, rows):
        slots = {tensor.name: [None] * tensor.num_layers for tensor in layout.tensors}
        # From the last layer to the first, as a backward pass does.
        for name, layer in sorted([*factors, *arrays], key=lambda place: (-place[1], place[0])):
            site = Site(plan, (name,), layer, accumulate=accumulate)
            if (name, layer) in factors:
                gradient_N, slots[name][layer] = write_product(site, gradient_N, name, *factors[name, layer])
            else:
                gradient_N, slots[name][layer] = write_gradient(site, gradient_N, name, arrays[name, layer])
        site = Site(plan, ("wte",), accumulate=accumulate, added=("wte",))
        gradient_N, of_rows = write_rows(site, gradient_N, "wte", indices, rows)
        slots["wte"] = [slots["wte"][0] + of_rows]
        slots = {name: tuple(each) for name, each in slots.items()}
        assert jax.tree.map(jnp.shape, slots) == jax.tree.map(jnp.shape, empty_slots(plan))
        return writer_of(plan).squares(plan, *writer_of(plan).finish(plan, gradient_N, slots, accumulate))

    found_N, squares = write(jnp.asarray(before), factors, arrays, rows)
    wanted_N = np.concatenate([wanted[tensor.name].reshape(-1) for tensor in layout.tensors])
    wanted_N += before.astype(np.float64) if accumulate else 0
    # cuBLAS rounds a product; else what is left are the roundings of float32's sums.
    rounding = ROUNDING["bfloat16"] if plan.linear.name == "cublas" else 8 * ROUNDING["float32"]
    np.testing.assert_allclose(found_N, wanted_N, rtol=0, atol=rounding * np.abs(wanted_N).max())
    assert (squares.shape, squares.dtype) == ((len(layout.tensors),), jnp.float32)
    for tensor, square in zip(layout.tensors, squares.tolist(), strict=True):
        exact = np.square(np.asarray(found_N[tensor.offset : tensor.stop], dtype=np.float64)).sum()
        assert square == pytest.approx(exact, rel=400 * 2.0**-24), tensor.name


@pytest.mark.parametrize("custom_call", [False, True])
def test_squared_norms(custom_call):
    """Not finite where the gradient is not; and of its own tensor alone."""
    if custom_call:
        plan_with("writer", "in_place")
    gradient = random(0, CONFIG.layout.num_parameters)
    gradient[CONFIG.layout["fcb"].offset + 3] = np.nan
    gradient[CONFIG.layout["lnfb"].stop - 1] = np.inf
    found = squared_norms(jnp.asarray(gradient), CONFIG.layout.tensors, custom_call=custom_call)
    for tensor, square in zip(CONFIG.layout.tensors, found.tolist(), strict=True):
        exact = np.square(gradient[tensor.offset : tensor.stop].astype(np.float64)).sum()
        assert square == pytest.approx(float(exact), rel=400 * 2.0**-24, nan_ok=True), tensor.name


def test_slices_are_updated_only_where_32_bits_hold_every_place():
    """A larger place would become a negative one, and the gradient of the last layers would lie over the token table."""
    for descriptor, writer in (("d48", "update_slice"), ("gpt3:c2560", "concatenate"), ("gpt3:c12288", "concatenate")):
        plan = plan_of_kind("nvidia", "bfloat16", config_from_descriptor(descriptor))
        assert plan.writer.name == writer, descriptor
    assert "do not fit into the 32 bits" in dict(plan.writer.refusals)["update_slice"]


@rows_of("writer")
def test_rows_that_cancel_leave_no_negative_squares(implementation, dtype):
    """Of the change of a sum of squares, roundings may leave less than nothing; its root would be nan."""
    plan = plan_with("writer", implementation, dtype, CONFIG)
    table, site = plan.layout["wte"], Site(plan, ("wte",))
    dy, x = in_dtype(random(0, 1, table.shape[0]), dtype), in_dtype(random(1, 1, table.shape[1]), dtype)

    @jax.jit
    def write(gradient_N, dy, x):
        slots = {name: list(each) for name, each in empty_slots(plan).items()}
        gradient_N, of_product = write_product(site, gradient_N, "wte", dy, x)
        rows = -(dy.astype(jnp.float32).T @ x.astype(jnp.float32))
        added = site._replace(added=("wte",))
        gradient_N, of_rows = write_rows(added, gradient_N, "wte", jnp.arange(table.shape[0], dtype=jnp.int32), rows)
        slots["wte"] = [of_product + of_rows]
        slots = {name: tuple(each) for name, each in slots.items()}
        return writer_of(plan).squares(plan, *writer_of(plan).finish(plan, gradient_N, slots, False))

    _, squares = write(jnp.zeros(plan.layout.num_parameters), dy, x)
    assert (
        0
        <= float(squares[0])
        < 1e-2 * float(np.square(np.asarray(dy).astype(np.float32).T @ np.asarray(x).astype(np.float32)).sum())
    )
