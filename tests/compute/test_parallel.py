"""Several devices against one: the same losses and parameters, rows that are llm.c's parts, and what travels."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax import jax_compat
from gpt2_jax.compute import parallel
from gpt2_jax.compute.backend import Backend
from gpt2_jax.compute.plan import Plan, make_plan
from gpt2_jax.compute.step import compile_step, create_state, make_step, state_shapes
from gpt2_jax.config import ComputeSettings, OptimizerSettings
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc.loader import LoaderState
from gpt2_jax.llmc.rounding import RoundingStream, rounded_to_nearest, stochastically_rounded
from gpt2_jax.llmc.state_file import ProcessState, TrainingState, read_state_files, write_state_files
from tests.conftest import CPU, TINY, available, can_alias

pytestmark = pytest.mark.skipif(not jax_compat.serves_several_devices(), reason="this jax does not serve several devices")

SETTINGS = OptimizerSettings(learning_rate=1e-2, weight_decay=0.1)
# Sums that are scattered by jax itself, as on GPUs.
SCATTERS = dataclasses.replace(CPU, lacks=CPU.lacks - {"reduce_scatter"})
B, T = 2, 16


def plan_of(
    devices: int, zero: int = 1, *, matmul: str = "xla", dtype: str = "float32", backend: Backend = CPU, **compute: Any
) -> Plan:
    settings = ComputeSettings(matmul=matmul, dtype=dtype, **compute)  # type: ignore[arg-type]
    return make_plan(settings, backend, TINY, devices=devices, zero=zero)


def tokens(steps: int, rows: int) -> np.ndarray:
    """(steps, rows, T + 1) int32 of few ids, which is to be learned."""
    return np.random.default_rng(1).integers(0, 10, (steps, rows, T + 1)).astype(np.int32)


def train(plan: Plan, params: np.ndarray, tokens_SRT: np.ndarray, micro_batches: int = 1):
    """The state and the losses after a step on each of the batches, whose rows come in the order of one device's."""
    step, state, losses = make_step(plan, SETTINGS, 20), create_state(plan, params), []
    for rows in tokens_SRT:
        shape = (micro_batches, -1, T)
        state, metrics = step(state, rows[:, :-1].reshape(shape), rows[:, 1:].reshape(shape))
        losses.append(float(metrics.loss))
    return state, losses


def whole(plan: Plan, buffer: jax.Array) -> np.ndarray:
    return np.asarray(parallel.make_whole_buffer(plan)(buffer))


STAGES = (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("matmul", "devices", "zero"),
    [
        ("xla", 2, 1),
        *(
            pytest.param(*one.values, devices, zero, marks=one.marks)
            for one in available(["threaded"])
            for devices, zero in ((2, 1), (4, 2), (2, 3))
        ),
    ],
)
def test_devices_train_like_one_with_as_many_micro_batches(tiny_params, matmul, devices, zero):
    """float32 sums in another order: the issue's 1e-5 of losses."""
    batches = tokens(20, devices * B)
    one, expected = train(plan_of(1, matmul=matmul), tiny_params, batches, micro_batches=devices)
    plan = plan_of(devices, zero, matmul=matmul)
    several, losses = train(plan, tiny_params, batches)
    assert expected[0] - expected[-1] > 1
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(whole(plan, several.params), np.asarray(one.params), rtol=0, atol=1e-3)


def test_bfloat16_on_two_devices_is_bfloat16_on_one(tiny_params):
    """Weights travel rounded, so the first loss and gradient are those of rounded parameters on one device, by float32's
    roundings: a sum's terms come in two parts. Later losses may differ by a rounding to bfloat16, relative to the loss."""
    batches = tokens(20, 2 * B)
    params = rounded_to_nearest(tiny_params)
    one, expected = train(plan_of(1, dtype="bfloat16"), params, batches[:1], micro_batches=2)
    plan = plan_of(2, dtype="bfloat16")
    two, losses = train(plan, tiny_params, batches[:1])
    float32, bfloat16 = (float(jnp.finfo(dtype).eps) for dtype in (jnp.float32, jnp.bfloat16))
    np.testing.assert_allclose(losses, expected, rtol=4 * float32)
    m = np.asarray(one.optimizer.m)
    np.testing.assert_allclose(whole(plan, two.optimizer.m), m, rtol=0, atol=4 * float32 * np.abs(m).max())
    expected, losses = (train(each, tiny_params, batches, n)[1] for each, n in ((plan_of(1, dtype="bfloat16"), 2), (plan, 1)))
    assert expected[0] - expected[-1] > 1
    np.testing.assert_allclose(losses, expected, rtol=bfloat16)


@pytest.mark.parametrize("zero", [0, 1])
def test_deterministic_sums_are_in_rank_order(tiny_params, zero):
    """Bit for bit NumPy's additions of the ranks' gradients one after another, where another order gives other bits."""
    plan = plan_of(4, zero, backend=SCATTERS, deterministic=True)
    grads = np.random.default_rng(3).normal(size=(4, N)).astype(np.float32)
    mean = parallel.on_every_device(
        plan,
        lambda grads: parallel.mean_gradient(plan, grads[0]),
        (parallel.BY_RANK,),
        parallel.BY_RANK if zero else parallel.EVERYWHERE,
    )
    expected, backwards = (each[0] + each[1] + each[2] + each[3] for each in (grads, grads[::-1]))
    assert (expected != backwards).any()
    found = np.asarray(jax.jit(mean)(parallel.place(plan, grads, parallel.BY_RANK)))
    np.testing.assert_array_equal(found.reshape(-1), TINY.layout.rows(expected, 4).reshape(-1) / 4 if zero else expected / 4)


@pytest.mark.parametrize("backend", [CPU, SCATTERS], ids=["the CPU's", "sums of other backends"])
def test_deterministic_steps_have_the_same_bits_in_every_run(tiny_params, backend):
    plan, batches = plan_of(2, backend=backend, deterministic=True), tokens(3, 2 * B)
    first, again = (train(plan, tiny_params, batches)[0] for _ in range(2))
    for one, other in zip(jax.tree_util.tree_leaves(first), jax.tree_util.tree_leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_the_stages_have_the_same_gradient(tiny_params):
    """A tenth of it is the first moment after one step. Sums within a device may come in another order."""
    moments = []
    for zero in STAGES:
        plan = plan_of(2, zero)
        moments.append(whole(plan, train(plan, tiny_params, tokens(1, 2 * B))[0].optimizer.m))
    largest = np.abs(moments[0]).max()
    for other in moments[1:]:
        np.testing.assert_allclose(other, moments[0], rtol=0, atol=4 * np.finfo(np.float32).eps * largest)


@pytest.mark.parametrize(("zero", "backend"), [(0, SCATTERS), (1, CPU), (2, SCATTERS), (3, CPU)])
def test_several_devices_sum_micro_batches(tiny_params, zero, backend):
    batches = tokens(3, 2 * 2 * B)
    expected = train(plan_of(1), tiny_params, batches, micro_batches=4)[1]
    # Micro-batch a of a step has one half from each rank.
    losses = train(plan_of(2, zero, backend=backend), tiny_params, batches, micro_batches=2)[1]
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_is_the_part_of_llmcs_rank(tmp_path, tiny_params, dtype):
    """Byte for byte what a state file of that rank has, and together the whole buffer again."""
    plan = plan_of(4, dtype=dtype)
    rows = np.asarray(create_state(plan, tiny_params).params)
    paths = [tmp_path / f"state_{rank}.bin" for rank in range(4)]
    state = TrainingState(1, tiny_params, tiny_params, (ProcessState(LoaderState(0, 0)),) * 4)
    write_state_files(paths, state, TINY.layout, zero=True)
    for path, row in zip(paths, rows, strict=True):
        assert path.read_bytes()[1024 : 1024 + row.nbytes] == row.tobytes()
    np.testing.assert_array_equal(read_state_files(paths, TINY.layout).m, whole(plan, create_state(plan, tiny_params).params))


NAMES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


def collectives_of(text: str) -> list[tuple[str, str, int]]:
    """Of every collective in a compiled step: XLA's name, the elements' type, and their number in the largest result."""
    found = []
    for line in text.splitlines():
        if made := re.search(rf" = (.*?) ({'|'.join(NAMES)})(?:-start)?\(", line):
            results = [(math.prod(map(int, filter(None, sizes.split(",")))), kind) for kind, sizes in RESULTS.findall(made[1])]
            found.append((made[2], max(results)[1], max(results)[0]))
    return found


RESULTS = re.compile(r"(\w+)\[([\d,]*)\]")


def in_loops(text: str) -> str:
    """Those computations of a compiled step that its loops call, directly or through others."""
    computations = dict(re.findall(r"^(?:ENTRY )?%?([\w.-]+) .*?\{\n(.*?)^\}", text, re.M | re.S))
    waiting = re.findall(r"body=%?([\w.-]+)", text)
    reached: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += [called for called in re.findall(r"%?([\w.-]+)", computations[name]) if called in computations]
    return "\n".join(computations[name] for name in reached)


def compiled(plan: Plan, micro_batches: int = 1) -> str:
    return compile_step(plan, SETTINGS, 20, (micro_batches, plan.devices * B, T)).as_text()


N, S = TINY.layout.num_parameters, len(TINY.layout.tensors)


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("backend", ["in rank order", "deterministic", "jax's sums"])
def test_what_travels_in_a_step_of_stage_1(backend, devices, micro_batches):
    """Gradients once and weights once, whatever the accumulation, and a few scalars; all of it outside of the loop."""
    record = CPU if backend == "in rank order" else SCATTERS
    text = compiled(plan_of(devices, 1, backend=record, deterministic=backend == "deterministic"), micro_batches)
    large = [each for each in collectives_of(text) if each[2] > devices * S]
    small = {name for name, _, size in collectives_of(text) if size <= devices * S}
    if backend == "jax's sums":
        assert sorted(large) == [("all-gather", "f32", N), ("reduce-scatter", "f32", N // devices)]
        assert small == {"all-reduce"}
    else:
        assert sorted(large) == [("all-gather", "f32", N), ("all-to-all", "f32", exchanged(text, devices))]
        assert small == {"all-gather"}
    assert len(collectives_of(text)) <= len(large) + 2  # the loss, and every tensor's sum of squares
    assert collectives_of(in_loops(text)) == []
    assert micro_batches == 1 or " dot(" in in_loops(text)


def exchanged(text: str, devices: int) -> int:
    """Elements in the largest result of an all-to-all, which some versions of XLA give one result for each device."""
    tuples = re.search(r" = \(.*\) all-to-all\(", text) is not None
    return N // devices if tuples else N


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_what_travels_in_a_step_of_stage_0(micro_batches):
    text = compiled(plan_of(2, 0, backend=SCATTERS), micro_batches)
    assert {name for name, _, _ in collectives_of(text)} == {"all-reduce"}
    assert [each for each in collectives_of(text) if each[2] > S] == [("all-reduce", "f32", N)]
    ordered = collectives_of(compiled(plan_of(2, 0), micro_batches))
    assert {name for name, _, _ in ordered} == {"all-gather", "all-to-all"}
    assert collectives_of(in_loops(text)) == []


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_what_travels_in_a_step_of_stage_2(micro_batches):
    """Weights once; each layer's gradients, and those outside of the layers, in every micro-batch: a row in all."""
    text = compiled(plan_of(2, 2, backend=SCATTERS), micro_batches)
    assert [each for each in collectives_of(text) if each[0] == "all-gather"] == [("all-gather", "f32", N)]
    scatters = [each for each in collectives_of(text) if each[0] == "reduce-scatter"]
    assert len(scatters) == TINY.num_layers + 1
    assert sum(size for _, _, size in scatters) == N // 2
    assert collectives_of(in_loops(text)) == (scatters if micro_batches > 1 else [])


@can_alias  # the barrier of the custom calls, which XLA's compiler for the CPU keeps
@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("matmul", available(["threaded"]))
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_what_travels_in_a_step_of_stage_3(micro_batches, matmul, recompute):
    """Every weight before its op and, since it is not kept, once more in the backward pass; nothing is ever whole."""
    plan = plan_of(2, 3, matmul=matmul, dtype="bfloat16", backend=SCATTERS, recompute=recompute)
    text = compiled(plan, micro_batches)
    gathers = [each for each in collectives_of(text) if each[0] == "all-gather"]
    assert {kind for _, kind, _ in gathers} == {"u16"}
    sizes = {tensor.name: tensor.size for tensor in TINY.layout.tensors}
    layers = sum(tensor.size for tensor in TINY.layout.tensors if tensor.stacked)
    once = sizes["wpe"] + 2 * sizes["wte"]  # the embedding's backward reads no weight; the classifier's is made forward
    norm = 2 * (sizes["lnfw"] + sizes["lnfb"])
    # What a block's last op makes is not read again.
    anew = layers - sizes["fcprojw"] - sizes["fcprojb"] if recompute == "block" else 0
    assert sum(size for _, _, size in gathers) == 2 * layers + anew + norm + once
    scatters = [each for each in collectives_of(text) if each[0] == "reduce-scatter"]
    assert sum(size for _, _, size in scatters) == N // 2
    in_loop = [each for each in collectives_of(in_loops(text)) if each[0] != "all-reduce"]
    assert sorted(in_loop) == (sorted(gathers + scatters) if micro_batches > 1 else [])
    assert f"f32[{N}]" not in text


def test_nothing_travels_on_one_device():
    assert collectives_of(compiled(plan_of(1), 3)) == []


@pytest.mark.parametrize("backend", [CPU, SCATTERS], ids=["in rank order", "jax's sums"])
def test_bfloat16_weights_travel_as_two_bytes(backend):
    found = collectives_of(compiled(plan_of(2, dtype="bfloat16", backend=backend)))
    assert [kind for name, kind, size in found if name == "all-gather" and size > 2 * S] == ["u16"]


def test_one_device_compiles_what_it_did_before_there_were_several():
    """No collective, no sharding, no manual computation: the text of the step names none of them."""
    plan = plan_of(1)
    batch = jax.ShapeDtypeStruct((1, B, T), np.int32)
    text = make_step(plan, SETTINGS, 20).lower(state_shapes(plan), batch, batch).as_text()
    for word in ("sharding", "manual", "all_gather", "all_reduce", "collective", "partition"):
        assert word not in text.replace("mhlo.num_partitions", "")


def test_each_rank_rounds_its_row_by_its_own_seeds(tiny_params):
    """llm.c's bits: the noise counts within the rank's part."""
    plan, batches = plan_of(2, dtype="bfloat16"), tokens(1, 2 * B)
    seeds = np.stack([RoundingStream(7 + rank, 7 + rank).next_seeds(1) for rank in range(2)])
    params = rounded_to_nearest(tiny_params)
    x, y = batches[:, :, :-1], batches[:, :, 1:]
    plain, _ = make_step(plan, SETTINGS, 20)(create_state(plan, params), x, y)
    rounded, _ = make_step(plan, SETTINGS, 20, rounds=True)(create_state(plan, params), x, y, seeds)
    for rank in range(2):
        expected = stochastically_rounded(np.asarray(plain.params)[rank], TINY.layout.part(2), seeds[rank])
        np.testing.assert_array_equal(np.asarray(rounded.params)[rank], expected)


def test_a_number_of_devices_that_does_not_divide_the_channels_is_refused():
    with pytest.raises(Gpt2JaxError, match=r"divides the model's 32 channels \(2, 4, 8, 16, 32"):
        plan_of(3)
    assert plan_of(3, zero=0).devices == 3


def test_the_bytes_that_travel():
    """By hand, of N parameters on D devices: each sends (D - 1) / D of what it has."""
    for zero, dtype, micro_batches, of_parameter in (
        (0, "bfloat16", 3, 8),
        (1, "bfloat16", 3, 4 + 2),
        (1, "float32", 3, 4 + 4),
        (2, "bfloat16", 3, 3 * 4 + 2),
        (3, "bfloat16", 3, 3 * (4 + 2 * 2)),
    ):
        plan = plan_of(4, zero, dtype=dtype)
        assert parallel.bytes_sent(plan, micro_batches) == of_parameter * N * 3 // 4
    assert f"4 on the one axis 'data', ZeRO stage 3: {parallel._DIVIDED[3]}; 0.6 MB" in parallel.describe(plan, 3)
    assert parallel.bytes_sent(plan_of(1), 3) == 0
    assert parallel.measured_bandwidth(plan) > 0
