"""How gradients reach the gradient buffer: a table of writers.

A slot is the input of a threaded op whose cotangent leaves the backward pass on its own. Writers differ in what they put
into the buffer at once and in what they leave in slots for `finish`, which completes the buffer:

| writer | weight of a product, (O, I) | other tensors | slot of a product's weight | slot of another tensor |
| --- | --- | --- | --- | --- |
| in_place | written by the product itself | written together at the end | sum of squares, a scalar | the gradient |
| update_slice | written at once | written at the end, stacked over layers | a scalar without meaning | the gradient |
| concatenate | joined with all others at the end | the same | the gradient | the gradient |
| scattered | a layer's: scattered at once, the rest at the end | the same | a layer's: this rank's part | the same |

The buffer of `scattered` is this rank's row (N/D,); that of the others is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gpt2_jax import jax_compat
from gpt2_jax.buffer.layout import PlacedTensor
from gpt2_jax.ops import matmul
from gpt2_jax.ops.cpu import library
from gpt2_jax.ops.sharded import scattered
from gpt2_jax.ops.table import Fallback, Implementation
from gpt2_jax.ops.threaded import Site

if TYPE_CHECKING:
    from gpt2_jax.compute.plan import Plan

_FLOAT32 = jnp.dtype(jnp.float32)
# Of all layers: the slots' cotangents by tensor, one for each layer.
AllSlots = dict[str, tuple[jax.Array, ...]]


class Writer(NamedTuple):
    """The functions of one writer; each returns the gradient buffer and the slot's cotangent."""

    # (site, gradient_N, name, dy_MO, x_MI): dyᵀ x, the gradient of a product's weight
    product: Callable[[Site, jax.Array, str, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    # (site, gradient_N, name, gradient): a gradient that is there as an array
    array: Callable[[Site, jax.Array, str, jax.Array], tuple[jax.Array, jax.Array]]
    # (site, gradient_N, name, indices, rows): rows (..., C) added to those of a matrix that indices (...) name
    rows: Callable[[Site, jax.Array, str, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    # (plan, gradient_N, slots, accumulate): the complete buffer of a micro-batch, and those squares that are summed by then
    finish: Callable[[Plan, jax.Array, AllSlots, bool], tuple[jax.Array, jax.Array]]
    # (plan, gradient_N, known): the buffer of the whole step, and each tensor's sum of squares (S,) float32
    squares: Callable[[Plan, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    # Whether the slots of product weights hold a scalar rather than the gradient.
    writes_at_once: bool
    # Whether a layer's gradients are scattered over the devices at once; its slots hold this device's parts.
    scatters: bool = False


def writer_of(plan: Plan) -> Writer:
    return next(row.functions for row in TABLE if row.name == plan.writer.name)


def empty_slots(plan: Plan) -> AllSlots:
    """The inputs whose cotangents are the slots: zeros, which no computation reads."""
    writer = writer_of(plan)

    def shape_of(tensor: PlacedTensor) -> tuple[int, ...]:
        if writer.writes_at_once and tensor.multiplies:
            return ()
        return (tensor.layer_size // plan.devices,) if writer.scatters and tensor.stacked else tensor.shape

    return {tensor.name: (jnp.zeros(shape_of(tensor), _FLOAT32),) * tensor.num_layers for tensor in plan.layout.tensors}


def write_product(
    site: Site, gradient_N: jax.Array, name: str, dy_MO: jax.Array, x_MI: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Write dyᵀ x, the gradient of a product's weight (O, I); returns the buffer and the slot's cotangent."""
    return writer_of(site.plan).product(site, gradient_N, name, dy_MO, x_MI)


def write_gradient(site: Site, gradient_N: jax.Array, name: str, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Write a tensor's gradient, in the shape of one layer; returns the buffer and the slot's cotangent."""
    return writer_of(site.plan).array(site, gradient_N, name, gradient.astype(_FLOAT32))


def write_rows(
    site: Site, gradient_N: jax.Array, name: str, indices: jax.Array, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Add rows (..., C) to those of a matrix that `indices` (...) name; returns the buffer and the slot's cotangent."""
    return writer_of(site.plan).rows(site, gradient_N, name, indices, rows)


def squared_norms(gradient_N: jax.Array, tensors: Sequence[PlacedTensor], *, custom_call: bool = False) -> jax.Array:
    """The sum of squares of each tensor's gradient, (S,) float32: not finite where the gradient is not.

    With `custom_call` (on the CPU) all threads add up, in float64.
    """
    if custom_call:
        return library.call(
            library.SUMS_OF_SQUARES,
            jax.ShapeDtypeStruct((len(tensors),), _FLOAT32),
            gradient_N,
            spans=np.array([(tensor.offset, tensor.stop) for tensor in tensors], dtype=np.int64).reshape(-1),
        )
    return jnp.stack([jnp.sum(jnp.square(lax.slice(gradient_N, (tensor.offset,), (tensor.stop,)))) for tensor in tensors])


# Written by the CPU's custom calls. All of them form one chain in one memory. XLA's own updates of a slice stay out of
# it, since XLA may fuse them into loops over the whole buffer.


def _product_in_place(
    site: Site, gradient_N: jax.Array, name: str, dy_MO: jax.Array, x_MI: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return matmul.matmul_into(site.plan, site.view(gradient_N, name), dy_MO, x_MI, accumulate=site.adds(name))


def _array_in_place(site: Site, gradient_N: jax.Array, name: str, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    tensor = site.plan.layout[name]
    if not tensor.multiplies:
        return gradient_N, gradient
    gradient_N = _write_into(gradient_N, [tensor.layer_offset(site.layer)], [gradient], site.adds(name))
    return gradient_N, squared_norms(gradient_N, [tensor.of_layer(site.layer)], custom_call=True)[0]


def _rows_in_place(
    site: Site, gradient_N: jax.Array, name: str, indices: jax.Array, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
    results = (_like(gradient_N), jax.ShapeDtypeStruct((), _FLOAT32))
    offset = np.int64(site.plan.layout[name].layer_offset(site.layer))
    library.load()
    return jax_compat.ffi_call(library.ADD_ROWS_INTO, results, gradient_N, indices, rows, aliases={0: 0}, out_offset=offset)


def _finish_in_place(plan: Plan, gradient_N: jax.Array, slots: AllSlots, accumulate: bool) -> tuple[jax.Array, jax.Array]:
    small = [tensor for tensor in plan.layout.tensors if not tensor.multiplies]
    places = [(tensor.layer_offset(layer), gradient) for tensor in small for layer, gradient in enumerate(slots[tensor.name])]
    gradient_N = _write_into(gradient_N, [offset for offset, _ in places], [gradient for _, gradient in places], accumulate)
    # Summed in the order in which they were made, from the last layer to the first. The embedding's part is the change of
    # the sum: where rows cancel, roundings may leave less than nothing.
    products = [jnp.sum(jnp.stack(slots[tensor.name][::-1])) for tensor in plan.layout.tensors if tensor.multiplies]
    return gradient_N, jnp.maximum(jnp.stack(products), 0.0)


def _squares_in_place(plan: Plan, gradient_N: jax.Array, of_products: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Only small tensors are read again for their squares."""
    small = [tensor for tensor in plan.layout.tensors if not tensor.multiplies]
    of_small = iter(squared_norms(gradient_N, small, custom_call=True))
    of_large = iter(of_products)
    return gradient_N, jnp.stack([next(of_large if tensor.multiplies else of_small) for tensor in plan.layout.tensors])


def _write_into(gradient_N: jax.Array, offsets: list[int], pieces: list[jax.Array], accumulate: bool) -> jax.Array:
    library.load()
    return jax_compat.ffi_call(
        library.WRITE_INTO,
        _like(gradient_N),
        gradient_N,
        *pieces,
        aliases={0: 0},
        offsets=np.array(offsets, dtype=np.int64),
        accumulate=np.int64(accumulate),
    )


# Written by XLA's dynamic_update_slice, which works in place where the buffer is donated.


def _update(gradient_N: jax.Array, offset: int, gradient: jax.Array, accumulate: bool) -> jax.Array:
    flat = gradient.astype(_FLOAT32).reshape(-1)
    if accumulate:
        # Behind a barrier: where an update reads the buffer that it writes, XLA makes it in a copy of the whole buffer.
        flat = flat + lax.optimization_barrier(lax.slice(gradient_N, (offset,), (offset + flat.size,)))
    return lax.dynamic_update_slice(gradient_N, flat, (offset,))


def _product_by_update(
    site: Site, gradient_N: jax.Array, name: str, dy_MO: jax.Array, x_MI: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _array_by_update(site, gradient_N, name, matmul.weight_gradient(site.plan, dy_MO, x_MI))


def _array_by_update(site: Site, gradient_N: jax.Array, name: str, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    tensor = site.plan.layout[name]
    if not tensor.multiplies:
        return gradient_N, gradient
    gradient_N = _update(gradient_N, tensor.layer_offset(site.layer), gradient, site.adds(name))
    return gradient_N, jnp.zeros((), _FLOAT32)


def _rows_by_update(
    site: Site, gradient_N: jax.Array, name: str, indices: jax.Array, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
    C = rows.shape[-1]
    first = site.plan.layout[name].layer_offset(site.layer)
    gradient_N = lax.scatter_add(
        gradient_N,
        first + (indices.reshape(-1) * C)[:, None],
        rows.astype(_FLOAT32).reshape(-1, C),
        lax.ScatterDimensionNumbers((1,), (), (0,)),
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )
    return gradient_N, jnp.zeros((), _FLOAT32)


def _finish_by_update(plan: Plan, gradient_N: jax.Array, slots: AllSlots, accumulate: bool) -> tuple[jax.Array, jax.Array]:
    for tensor in plan.layout.tensors:
        if not tensor.multiplies:
            gradient_N = _update(gradient_N, tensor.offset, jnp.stack(slots[tensor.name]), accumulate)
    return gradient_N, jnp.zeros((0,), _FLOAT32)


def _squares_by_a_pass(plan: Plan, gradient_N: jax.Array, known: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Keeps XLA from pulling the making of the gradient into the optimizer's passes over the buffer.
    gradient_N = lax.optimization_barrier(gradient_N)
    return gradient_N, squared_norms(gradient_N, plan.layout.tensors, custom_call=library.serves(plan))


# The reference: gradients are arrays until one concatenation in file order.


def _product_as_array(
    site: Site, gradient_N: jax.Array, name: str, dy_MO: jax.Array, x_MI: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return gradient_N, matmul.weight_gradient(site.plan, dy_MO, x_MI).astype(_FLOAT32)


def _array_as_it_is(site: Site, gradient_N: jax.Array, name: str, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gradient_N, gradient


def _rows_as_array(
    site: Site, gradient_N: jax.Array, name: str, indices: jax.Array, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
    zeros = jnp.zeros(site.plan.layout[name].shape, _FLOAT32)
    return gradient_N, zeros.at[indices].add(rows.astype(_FLOAT32))


def _concatenate(plan: Plan, gradient_N: jax.Array, slots: AllSlots, accumulate: bool) -> tuple[jax.Array, jax.Array]:
    pieces = [gradient.reshape(-1) for tensor in plan.layout.tensors for gradient in slots[tensor.name]]
    # lax's, not jnp's, which in some versions of jax joins 16 pieces at a time.
    whole_N = lax.concatenate(pieces, 0)
    return gradient_N + whole_N if accumulate else whole_N, jnp.zeros((0,), _FLOAT32)


# Scattered over several devices.


def _join_row(plan: Plan, gradient: jax.Array, slots: AllSlots, accumulate: bool) -> tuple[jax.Array, jax.Array]:
    once = [tensor.name for tensor in plan.layout.tensors if not tensor.stacked]
    parts = dict(zip(once, scattered(plan, [slots[name][0] for name in once]), strict=True))
    pieces = [
        piece
        for tensor in plan.layout.tensors
        for piece in ([parts[tensor.name]] if tensor.name in parts else slots[tensor.name])
    ]
    row = lax.concatenate(pieces, 0)
    return gradient + row if accumulate else row, jnp.zeros((0,), _FLOAT32)


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


_SCATTERED = "gradients are scattered over the devices (--zero 2 and 3)"


def _refuses_scattered(plan: Plan) -> str | None:
    return None if plan.zero >= 2 else "gradients stay whole on their device"


def _refuses_whole(plan: Plan) -> str | None:
    return _SCATTERED if plan.zero >= 2 else None


def _refuses_in_place(plan: Plan) -> str | None:
    if plan.zero >= 2:
        return _SCATTERED
    if reason := library.refusal(plan):
        return reason
    if not jax_compat.ffi_call_can_alias():
        return Fallback(f"jax {jax.__version__} cannot alias a custom call's argument and result; 0.4.38 can")
    return None


def _refuses_update(plan: Plan) -> str | None:
    if plan.zero >= 2:
        return _SCATTERED
    if "slice_updates" in plan.backend.lacks:
        return f"on {plan.backend.name} an update of a slice may copy the whole buffer"
    # jax makes the place of an update an int32, without a word where it does not fit; XLA then takes it for 0.
    if plan.layout.num_parameters > np.iinfo(np.int32).max:
        return f"the places of {plan.layout.num_parameters:,} parameters do not fit into the 32 bits of a slice's update"
    return None


TABLE = (
    Implementation(
        "scattered",
        _refuses_scattered,
        "a device keeps the gradient of what it updates",
        functions=Writer(
            _product_as_array, _array_as_it_is, _rows_as_array, _join_row, _squares_by_a_pass, False, scatters=True
        ),
    ),
    Implementation(
        "in_place",
        _refuses_in_place,
        "products write gradients where they belong",
        functions=Writer(_product_in_place, _array_in_place, _rows_in_place, _finish_in_place, _squares_in_place, True),
    ),
    Implementation(
        "update_slice",
        _refuses_update,
        "a slice of the donated buffer is updated in place",
        functions=Writer(_product_by_update, _array_by_update, _rows_by_update, _finish_by_update, _squares_by_a_pass, True),
    ),
    Implementation(
        "concatenate",
        _refuses_whole,
        "the reference, on every device",
        functions=Writer(_product_as_array, _array_as_it_is, _rows_as_array, _concatenate, _squares_by_a_pass, False),
    ),
)
