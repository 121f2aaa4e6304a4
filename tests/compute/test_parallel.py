"""Several devices against one: the same losses and parameters, rows that are llm.c's parts, and what travels."""

from __future__ import annotations

import dataclasses
import re

import jax
import numpy as np
import pytest

from gpt2_jax import jax_compat
from gpt2_jax.compute import parallel
from gpt2_jax.compute.plan import Plan, make_plan
from gpt2_jax.compute.step import compile_step, create_state, loss_and_gradient, make_step, state_shapes
from gpt2_jax.config import ComputeSettings, OptimizerSettings
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc.loader import LoaderState
from gpt2_jax.llmc.rounding import RoundingStream, rounded_to_nearest, stochastically_rounded
from gpt2_jax.llmc.state_file import ProcessState, TrainingState, read_state_files, write_state_files
from gpt2_jax.ops.dropout import noise_of, noise_of_step
from tests.conftest import CPU, TINY, available

pytestmark = pytest.mark.skipif(not jax_compat.serves_several_devices(), reason="this jax does not serve several devices")

SETTINGS = OptimizerSettings(learning_rate=1e-2, weight_decay=0.1)
# Sums that are scattered by jax itself, as on GPUs.
SCATTERS = dataclasses.replace(CPU, lacks=CPU.lacks - {"reduce_scatter"})
B, T = 2, 16


def plan_of(devices: int, zero: int = 1, *, matmul: str = "xla", dtype: str = "float32", backend=CPU) -> Plan:
    settings = ComputeSettings(matmul=matmul, dtype=dtype)  # type: ignore[arg-type]
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


@pytest.mark.parametrize(("devices", "zero"), [(2, 0), (2, 1), (4, 1)])
@pytest.mark.parametrize("matmul", available(["xla", "threaded"]))
def test_devices_train_like_one_with_as_many_micro_batches(tiny_params, matmul, zero, devices):
    """float32 sums in another order: the issue's 1e-5 of losses."""
    batches = tokens(20, devices * B)
    one, expected = train(plan_of(1, matmul=matmul), tiny_params, batches, micro_batches=devices)
    plan = plan_of(devices, zero, matmul=matmul)
    several, losses = train(plan, tiny_params, batches)
    assert expected[0] - expected[-1] > 1
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(whole(plan, several.params), np.asarray(one.params), rtol=0, atol=1e-3)


def test_the_stages_differ_by_the_clipping_factors_rounding(tiny_params):
    batches = tokens(6, 2 * B)
    buffers = []
    for zero in (0, 1):
        plan = plan_of(2, zero)
        state, _ = train(plan, tiny_params, batches)
        buffers.append([whole(plan, buffer) for buffer in (state.optimizer.m, state.optimizer.v)])
    # The norm is summed over parts or over the whole: a rounding of the clipping factor.
    np.testing.assert_allclose(buffers[0][0], buffers[1][0], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("backend", [CPU, SCATTERS], ids=["in rank order", "reduce-scatter"])
@pytest.mark.parametrize("zero", [0, 1])
def test_micro_batches_are_summed_before_anything_travels(tiny_params, backend, zero):
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


def counts(plan: Plan, micro_batches: int = 1) -> dict[str, int]:
    """How often each collective is in the compiled step, by XLA's name."""
    text = compile_step(plan, SETTINGS, 20, (micro_batches, plan.devices * B, T)).as_text()
    names = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
    found = {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in names}
    return {name: count for name, count in found.items() if count}


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_what_travels_in_a_step(micro_batches):
    assert counts(plan_of(1), micro_batches) == {}
    # The gradient once, whatever the accumulation; weights once; squares, loss.
    assert counts(plan_of(2, 1), micro_batches) == {"all-to-all": 1, "all-gather": 3}
    assert counts(plan_of(2, 0), micro_batches) == {"all-to-all": 1, "all-gather": 2}
    scattered = counts(plan_of(2, 1, backend=SCATTERS), micro_batches)
    assert (scattered["reduce-scatter"], scattered["all-gather"]) == (1, 1)
    assert set(scattered) == {"reduce-scatter", "all-gather", "all-reduce"}
    assert set(counts(plan_of(2, 0, backend=SCATTERS), micro_batches)) == {"all-reduce"}


def test_bfloat16_travels_as_two_bytes():
    text = compile_step(plan_of(2, dtype="bfloat16"), SETTINGS, 20, (1, 2 * B, T)).as_text()
    gathers = [line for line in text.splitlines() if re.search(r" all-gather(?:-start)?\(", line)]
    large = [line for line in gathers if str(TINY.layout.num_parameters // 2) in line]
    assert len(large) == 1
    assert re.search(r"= \(?u16\[", large[0])


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


def test_every_device_drops_its_own_and_none_updates_what_is_frozen(tiny_params):
    settings = dataclasses.replace(SETTINGS, dropout=0.25, freeze="wte,ln*")
    plans = [make_plan(ComputeSettings(matmul="xla"), CPU, TINY, devices=devices, optimizer=settings) for devices in (2, 1)]
    (rows,) = tokens(1, 2 * B)
    x, y = rows[:, :-1], rows[:, 1:]
    step, state = make_step(plans[0], settings, 20, seed=3), create_state(plans[0], tiny_params)
    new, metrics = step(state, x[None], y[None])
    noise = noise_of_step(3, np.zeros((), np.int32))
    of_ranks = [
        loss_and_gradient(plans[1], tiny_params, None, x[part], y[part], noise_of(noise_of(noise, rank), 0))[0]
        for rank, part in enumerate((slice(B), slice(B, None)))
    ]
    assert abs(float(of_ranks[0]) - float(of_ranks[1])) > 1e-4
    np.testing.assert_allclose(float(metrics.loss), np.mean([float(loss) for loss in of_ranks]), rtol=1e-6)
    before, after = (TINY.layout.views(buffer) for buffer in (tiny_params, whole(plans[0], new.params)))
    assert {name for name in before if np.array_equal(before[name], after[name])} == set(plans[0].frozen)
