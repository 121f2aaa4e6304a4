"""Several devices that train one model: the only file that sends anything from one device to another.

A rank is a device: its place on the one mesh axis. Rank r keeps row r of every sharded buffer (D, N/D), which is llm.c's
ZeRO-1 part of rank r (`layout.part(D)`). What travels, by --zero:

| stage | parameters and moments | gradients | weights |
| --- | --- | --- | --- |
| 0 | whole on every device | all-reduce, once a step | do not travel |
| 1 | rows | reduce-scatter, once a step | all-gather, once a step, in the dtype of products |

On one device every function here gives back what it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax import jax_compat
from gpt2_jax.buffer.layout import ParameterLayout
from gpt2_jax.ops.writer import squared_norms

if TYPE_CHECKING:
    from gpt2_jax.compute.plan import Plan

AXIS = "data"
EVERYWHERE = P()  # the same values on every device
BY_RANK = P(AXIS)  # the leading axis is divided among the devices
BATCHES = P(None, AXIS)  # (A, D * B, T): the second is


def mesh_of(plan: Plan) -> Mesh:
    """D devices on one axis, whose order is that of ranks: the first ones of each process, process after process."""
    each = plan.devices // plan.processes
    of_process = (
        [device for device in jax.devices() if device.process_index == process][:each] for process in range(plan.processes)
    )
    return Mesh(np.array([*chain.from_iterable(of_process)]), (AXIS,))


def own_ranks(plan: Plan) -> range:
    """The ranks of this process's devices."""
    each = plan.devices // plan.processes
    first = each * jax.process_index() if plan.processes > 1 else 0
    return range(first, first + each)


def sharding_of(plan: Plan, spec: P) -> NamedSharding | None:
    """Where an array of this spec lies; None on one device, which holds everything."""
    return None if plan.devices == 1 else NamedSharding(mesh_of(plan), spec)


def buffers_of(plan: Plan) -> P:
    """The spec of parameters and moments."""
    return BY_RANK if plan.zero else EVERYWHERE


def on_every_device(plan: Plan, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`function` run by every device on its own part of the arguments; itself on one device."""
    if plan.devices == 1:
        return function
    return jax_compat.shard_map(function, mesh_of(plan), in_specs, out_specs)


def place(plan: Plan, tree: Any, specs: Any) -> Any:
    """Host arrays on the devices as their specs say; on one device they are left to jax. Of what is divided by rank each of
    several processes gives the parts of its own ranks."""
    if plan.devices == 1:
        return tree
    put = jax.device_put if plan.processes == 1 else _put_own
    return jax.tree_util.tree_map(lambda spec, array: put(array, sharding_of(plan, spec)), specs, tree, is_leaf=_is_spec)


def _put_own(array: np.ndarray, sharding: NamedSharding | None) -> jax.Array:
    assert sharding is not None
    return jax.make_array_from_process_local_data(sharding, np.asarray(array))


def _is_spec(value: Any) -> bool:
    return isinstance(value, P)


def describe(plan: Plan) -> str:
    """For people: the stage, and the bytes that each of several devices sends in a step."""
    N, D = plan.layout.num_parameters, plan.devices
    width = plan.compute_dtype.itemsize
    sent = (4 + width if plan.zero else 8) * N * (D - 1) // D
    what = "parameters and moments are divided" if plan.zero else "every device keeps all parameters and moments"
    return f"ZeRO stage {plan.zero}: {what}; {sent / 1e6:.1f} MB travel from each in a step"


def zeros(plan: Plan, shapes: Any, specs: Any) -> Any:
    """Arrays of zeros of these shapes on the devices as the specs say."""
    numpy = jnp if plan.devices == 1 else np
    if plan.processes > 1:
        return jax.tree_util.tree_map(partial(_zeros_of, plan), specs, shapes, is_leaf=_is_spec)
    return place(plan, jax.tree_util.tree_map(lambda shape: numpy.zeros(shape.shape, shape.dtype), shapes), specs)


def _zeros_of(plan: Plan, spec: P, shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Of several processes each makes its own part."""
    sharding = NamedSharding(mesh_of(plan), spec)
    part = np.zeros(sharding.shard_shape(shape.shape), shape.dtype)
    return jax.make_array_from_callback(shape.shape, sharding, lambda index: part)


def own_part(plan: Plan, array: np.ndarray, axis: int = 0) -> np.ndarray:
    """Of a host array whose axis is divided by rank this process's part."""
    each, ranks = array.shape[axis] // plan.devices, own_ranks(plan)
    part = slice(ranks.start * each, ranks.stop * each)
    return array[(slice(None),) * axis + (part,)]


def parts_of(buffer: jax.Array) -> list[jax.Array]:
    """What each device has of a buffer, by rank, each on its device: a row (N/D,), or the whole (N,)."""
    if len(buffer.sharding.device_set) == 1:
        return [buffer]
    shards = {shard.device: shard.data for shard in buffer.addressable_shards}
    rank_order = sorted(shards, key=lambda device: device.id)
    return [shards[device].reshape(-1) if shards[device].ndim > 1 else shards[device] for device in rank_order]


# Inside of `on_every_device`.


def row_of(plan: Plan, buffer: jax.Array) -> jax.Array:
    """A device's part (1, n) of rows (D, n) as a flat buffer (n,); a whole buffer as it is."""
    return buffer if buffer.ndim == 1 else buffer[0]


def gathered_weights(plan: Plan, row: jax.Array) -> jax.Array:
    """The whole parameter buffer (N,) float32 of the devices' rows, whose values are those of the dtype of products.

    With bfloat16 each value travels as 2 bytes: gathered as integers, since XLA would gather float32 and convert it after.
    """
    if plan.zero == 0:
        return row
    if plan.dtype == "float32":
        return _joined(plan.layout, lax.all_gather(row, AXIS))
    # reduce_precision is a rounding that XLA does not take for the conversion's inverse and remove.
    narrow = lax.reduce_precision(row, 8, 7).astype(jnp.bfloat16)
    bits = lax.all_gather(lax.bitcast_convert_type(narrow, jnp.uint16), AXIS)
    return lax.bitcast_convert_type(_joined(plan.layout, bits), jnp.bfloat16).astype(jnp.float32)


def whole_buffer(plan: Plan, row: jax.Array) -> jax.Array:
    """The whole buffer (N,) of the devices' rows, every bit of it."""
    return row if plan.zero == 0 else _joined(plan.layout, lax.all_gather(row, AXIS))


def mean_gradient(plan: Plan, grads_N: jax.Array) -> jax.Array:
    """The mean of all devices' gradients: whole with stage 0, else this device's row (N/D,)."""
    D = plan.devices
    if D == 1:
        return grads_N
    # Keeps XLA from pulling the making of the gradient into the passes over the buffer.
    grads_N = lax.optimization_barrier(grads_N)
    if plan.zero:
        return _scattered_sum(plan, _divided(plan.layout, grads_N, D)) / D
    if not _adds_in_rank_order(plan):
        return lax.psum(grads_N, AXIS) / D
    size = grads_N.shape[0]
    padded = jnp.pad(grads_N, (0, -size % D)).reshape(D, -1)
    return lax.all_gather(_scattered_sum(plan, padded), AXIS, tiled=True)[:size] / D


def mean(plan: Plan, value: jax.Array) -> jax.Array:
    """The mean of a small array over all devices."""
    return value if plan.devices == 1 else _sum(plan, value) / plan.devices


def highest(plan: Plan, numbers: jax.Array) -> jax.Array:
    """The highest over all devices of each of a few numbers (1, K), as (K,)."""
    return jnp.max(lax.all_gather(numbers[0], AXIS), axis=0)


def everywhere(plan: Plan, part: jax.Array) -> jax.Array:
    """Where there are several processes, what the devices have one after another, the same on all; else this device's."""
    return part if plan.processes == 1 else lax.all_gather(part, AXIS, tiled=True)


def squares(plan: Plan, grads: jax.Array) -> jax.Array:
    """Each tensor's sum of squares (S,) of the gradient that `mean_gradient` returned, the same on every device."""
    own = squared_norms(grads, buffer_layout(plan).tensors)
    return _sum(plan, own) if plan.zero else own


def buffer_layout(plan: Plan) -> ParameterLayout:
    """The layout of what one device keeps of parameters and moments."""
    return plan.layout.part(plan.devices) if plan.zero else plan.layout


def _sum(plan: Plan, value: jax.Array) -> jax.Array:
    if not _adds_in_rank_order(plan):
        return lax.psum(value, AXIS)
    return _in_order(lax.all_gather(value, AXIS))


def _scattered_sum(plan: Plan, pieces: jax.Array) -> jax.Array:
    """Of every device's pieces (D, n), one for each rank, the sum of those for this device."""
    if not _adds_in_rank_order(plan):
        return lax.psum_scatter(pieces, AXIS, scatter_dimension=0, tiled=True)[0]
    return _in_order(lax.all_to_all(pieces, AXIS, 0, 0, tiled=True))


def _adds_in_rank_order(plan: Plan) -> bool:
    return "reduce_scatter" in plan.backend.lacks


def _in_order(values: jax.Array) -> jax.Array:
    """The sum over the leading axis, one after another, so that the bits depend on the order of ranks alone."""
    total = values[0]
    for rank in range(1, values.shape[0]):
        total = total + values[rank]
    return total


def _divided(layout: ParameterLayout, buffer: jax.Array, num_parts: int) -> jax.Array:
    """A whole buffer (N,) as the rows (D, N/D) of all ranks."""
    rows = []
    for tensor in layout.tensors:
        piece = lax.slice(buffer, (tensor.offset,), (tensor.stop,)).reshape(tensor.num_layers, num_parts, -1)
        rows.append(piece.transpose(1, 0, 2).reshape(num_parts, -1))
    return lax.concatenate(rows, 1)


def _joined(layout: ParameterLayout, rows: jax.Array) -> jax.Array:
    """The whole buffer (N,) of the rows (D, N/D) of all ranks."""
    num_parts = rows.shape[0]
    pieces = []
    for tensor in layout.part(num_parts).tensors:
        piece = lax.slice(rows, (0, tensor.offset), (num_parts, tensor.stop)).reshape(num_parts, tensor.num_layers, -1)
        pieces.append(piece.transpose(1, 0, 2).reshape(-1))
    return lax.concatenate(pieces, 0)


@cache
def make_highest(plan: Plan) -> Callable[[jax.Array], jax.Array]:
    """The compiled `highest` of numbers (D, K) that lie by rank."""
    return jax.jit(on_every_device(plan, partial(highest, plan), (BY_RANK,), EVERYWHERE))


@cache
def make_whole_buffer(plan: Plan) -> Callable[[jax.Array], jax.Array]:
    """The compiled function that makes the whole buffer (N,), on every device, of what the state keeps."""
    if not plan.zero:
        return lambda buffer: buffer
    body = partial(_whole_of_part, plan)
    return jax.jit(on_every_device(plan, body, (BY_RANK,), EVERYWHERE))


@cache
def make_tensor_rows(plan: Plan, number: int) -> Callable[[jax.Array], jax.Array]:
    """The compiled function that makes of rows (D, N/D) all ranks' parts of one tensor, (D, its elements / D), everywhere."""
    tensor = buffer_layout(plan).tensors[number]

    def body(part: jax.Array) -> jax.Array:
        return lax.all_gather(lax.slice(part[0], (tensor.offset,), (tensor.stop,)), AXIS)

    return jax.jit(on_every_device(plan, body, (BY_RANK,), EVERYWHERE))


def _whole_of_part(plan: Plan, part: jax.Array) -> jax.Array:
    return whole_buffer(plan, part[0])
