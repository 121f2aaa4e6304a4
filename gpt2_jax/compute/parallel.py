"""Several devices that train one model: how a state lies on them, and what of it travels when.

A rank is a device: its place on the one mesh axis. Rank r keeps row r of every sharded buffer (D, N/D), which is llm.c's
ZeRO-1 part of rank r (`layout.part(D)`). What travels, by --zero:

| stage | parameters and moments | gradients | weights |
| --- | --- | --- | --- |
| 0 | whole on every device | all-reduce, once a step | do not travel |
| 1 | rows | reduce-scatter, once a step | all-gather, once a step, in the dtype of products |
| 2 | rows | reduce-scatter of each layer, in every micro-batch | as 1 |
| 3 | rows | as 2 | all-gather of each op's, forward and backward, in every micro-batch |

On one device every function here gives back what it is given.
"""

from __future__ import annotations

import time
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
from gpt2_jax.ops import collectives
from gpt2_jax.ops.collectives import AXIS
from gpt2_jax.ops.writer import squared_norms

if TYPE_CHECKING:
    from gpt2_jax.compute.plan import Plan

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


_DIVIDED = {
    0: "every device keeps all parameters and moments",
    1: "parameters and moments are divided",
    2: "parameters, moments and gradients are divided",
    3: "parameters, moments and gradients are divided, weights are gathered op by op",
}


def bytes_sent(plan: Plan, num_micro_batches: int) -> int:
    """Bytes that each of several devices sends in a step of so many micro-batches, and receives."""
    D, w = plan.devices, plan.compute_dtype.itemsize
    of_parameter = {0: 8, 1: 4 + w, 2: 4 * num_micro_batches + w, 3: (4 + 2 * w) * num_micro_batches}[plan.zero]
    if plan.zero == 3 and plan.recompute == "block":
        of_parameter += w * num_micro_batches
    return of_parameter * plan.layout.num_parameters * (D - 1) // D


def describe(plan: Plan, num_micro_batches: int) -> str:
    """For people: mesh and stage, and the bytes that each of several devices sends in a step."""
    sent = bytes_sent(plan, num_micro_batches) / 1e6
    of_processes = f" of {plan.processes} processes" if plan.processes > 1 else ""
    where = f"{plan.devices}{of_processes} on the one axis '{AXIS}'"
    return f"{where}, ZeRO stage {plan.zero}: {_DIVIDED[plan.zero]}; {sent:.1f} MB travel from each in a step"


_MEASURED_ELEMENTS, _EXCHANGES, _MEASUREMENTS = 1 << 24, 4, 3


def measured_bandwidth(plan: Plan) -> float:
    """Bytes a second that each of several devices sends while all scatter and gather a long array, as a step does."""
    D = plan.devices
    size = min(plan.layout.num_parameters, _MEASURED_ELEMENTS) // D * D

    def exchange(values: jax.Array) -> jax.Array:
        for _ in range(_EXCHANGES):
            values = collectives.gathered(collectives.scattered_sum(plan, values.reshape(D, -1))).reshape(-1)
        return values

    values = zeros(plan, jax.ShapeDtypeStruct((D * size,), jnp.float32), BY_RANK)
    jitted = jax.jit(on_every_device(plan, exchange, (BY_RANK,), BY_RANK))
    compiled = jitted.lower(values).compile(compiler_options=plan.compiler_options())
    jax.block_until_ready(compiled(values))
    seconds = []
    for _ in range(_MEASUREMENTS):
        started = time.perf_counter()
        jax.block_until_ready(compiled(values))
        seconds.append(time.perf_counter() - started)
    return 2 * _EXCHANGES * 4 * size * (D - 1) / D / min(seconds)


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


def rank() -> jax.Array:
    """This device's rank, an int32 scalar."""
    return lax.axis_index(AXIS)


def row_of(plan: Plan, buffer: jax.Array) -> jax.Array:
    """A device's part (1, n) of rows (D, n) as a flat buffer (n,); a whole buffer as it is."""
    return buffer if buffer.ndim == 1 else buffer[0]


def gathered_weights(plan: Plan, row: jax.Array) -> jax.Array:
    """The parameter buffer that a micro-batch reads: the whole one (N,) float32 of the devices' rows, whose values are those
    of the dtype of products; with stage 3 the row, of which ops gather what they need."""
    if plan.zero in (0, 3):
        return row
    return _joined(plan.layout, collectives.gathered_weights(plan, row)).astype(jnp.float32)


def whole_buffer(plan: Plan, row: jax.Array) -> jax.Array:
    """The whole buffer (N,) of the devices' rows, every bit of it."""
    return row if plan.zero == 0 else _joined(plan.layout, collectives.gathered(row))


def mean_gradient(plan: Plan, grads_N: jax.Array) -> jax.Array:
    """The mean of all devices' gradients: whole with stage 0, else this device's row (N/D,). From stage 2 on the row of
    their sum is given."""
    D = plan.devices
    if D == 1:
        return grads_N
    if plan.zero >= 2:
        return grads_N / D
    if plan.zero:
        return collectives.scattered_sum(plan, _divided(plan.layout, grads_N, D)) / D
    return collectives.whole_sum(plan, grads_N) / D


def mean(plan: Plan, value: jax.Array) -> jax.Array:
    """The mean of a small array over all devices."""
    return value if plan.devices == 1 else collectives.sum_everywhere(plan, value) / plan.devices


def highest(plan: Plan, numbers: jax.Array) -> jax.Array:
    """The highest over all devices of each of a few numbers (1, K), as (K,)."""
    return jnp.max(collectives.gathered(numbers[0]), axis=0)


def everywhere(plan: Plan, part: jax.Array) -> jax.Array:
    """Where there are several processes, what the devices have one after another, the same on all; else this device's."""
    return part if plan.processes == 1 else collectives.gathered(part).reshape(-1, *part.shape[1:])


def squares(plan: Plan, grads: jax.Array) -> jax.Array:
    """Each tensor's sum of squares (S,) of the gradient that `mean_gradient` returned, the same on every device."""
    own = squared_norms(grads, buffer_layout(plan).tensors)
    return collectives.sum_everywhere(plan, own) if plan.zero else own


def buffer_layout(plan: Plan) -> ParameterLayout:
    """The layout of what one device keeps of parameters and moments."""
    return plan.layout.part(plan.devices) if plan.zero else plan.layout


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


def gradient_layout(plan: Plan) -> ParameterLayout:
    """The layout of the gradient that a micro-batch makes on one device."""
    return plan.layout.part(plan.devices) if plan.zero >= 2 else plan.layout


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
        return collectives.gathered(lax.slice(part[0], (tensor.offset,), (tensor.stop,)))

    return jax.jit(on_every_device(plan, body, (BY_RANK,), EVERYWHERE))


def _whole_of_part(plan: Plan, part: jax.Array) -> jax.Array:
    return whole_buffer(plan, part[0])
