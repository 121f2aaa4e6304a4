"""Whole training steps of GPT-2 on several devices of one machine, by --zero and number, beside PyTorch's DDP and FSDP2."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from gpt2_jax.benchmark.machine import OthersWork, describe_machine, load_lines, machine_line, measure_load, percent, spread
from gpt2_jax.benchmark.train import say
from gpt2_jax.benchmark.train_report import Measured, System, Workload, title
from gpt2_jax.benchmark.train_rounds import TurnLimits, measure_in_turn
from gpt2_jax.benchmark.train_system import ON_SEVERAL
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.machine import gigabytes

WEAK, STRONG = "weak", "strong"


class Row(NamedTuple):
    """One system on some of the devices."""

    scaling: str  # WEAK: a batch for each device; STRONG: the tokens of a step are those of all devices
    work: Workload
    measured: Measured

    @property
    def tokens_per_second(self) -> float:
        return self.work.tokens / self.measured.seconds_per_step


def bench_scale(work: Workload, devices: Sequence[int], stages: Sequence[int], dtype: str, *, steps: int) -> bool:
    """Measure on 1 to D devices, and print a table, what was refused, and the JSON line last.

    `work` is that of one device. False when a system failed that should have run. Gpt2JaxError for numbers of devices of
    which the largest is no multiple.
    """
    largest = max(devices)
    if min(devices) < 1 or any(largest % number for number in devices):
        found = ", ".join(map(str, devices))
        raise Gpt2JaxError(
            f"--devices: expected numbers that divide the largest of them, found {found}", f"--devices {largest}"
        )
    machine, load_before, during = describe_machine(), measure_load(), OthersWork()
    print(f"{title(work)} on each device\n{machine_line(machine)}\nbefore: {load_before}", flush=True)
    rows: list[Row] = []
    for number in sorted(set(devices)):
        here = dataclasses.replace(work, devices=number)
        rows += _measured(WEAK, here, _systems(number, stages, work.backend, dtype), steps)
        if number < largest:
            same_step = dataclasses.replace(here, micro_batches=work.micro_batches * largest // number)
            rows += _measured(STRONG, same_step, _systems(number, stages[:1], work.backend, dtype)[:1], steps)
        else:  # both are the same there
            ours = next(row for row in rows if row.work.devices == number)
            rows.append(ours._replace(scaling=STRONG))
    load_after, others = measure_load(), during.others()
    load = {"before": dataclasses.asdict(load_before), "others_during": others, "after": dataclasses.asdict(load_after)}
    print(table(rows))
    print("\n".join(load_lines(load_before, others, load_after)))
    print(json.dumps(record(rows, work, machine, load)))
    return not any(row.measured.failed for row in rows)


def _systems(devices: int, stages: Sequence[int], backend: str, dtype: str) -> list[System]:
    if devices == 1:
        alone = "pytorch_best" if (backend, dtype) == ("cuda", "bfloat16") else "pytorch"
        return [System("gpt2_jax", "auto", dtype), System(alone, "", dtype)]
    ours = [System("gpt2_jax", "auto", dtype, stage=f"zero{stage}") for stage in stages]
    return [*ours, *(System(name, "", dtype) for name in ON_SEVERAL)]


def _measured(scaling: str, work: Workload, systems: list[System], steps: int) -> list[Row]:
    tell = partial(_say_of, f"{work.devices} device(s), {scaling}")
    return [Row(scaling, work, one) for one in measure_in_turn(systems, work, steps, TurnLimits(), tell)]


def _say_of(what: str, text: str) -> None:
    say(f"{what}: {text}")


def speedup(row: Row, rows: Sequence[Row]) -> float | None:
    """Tokens a second over this project's on one device, measured in the same way; None where that was not measured."""
    one = [each for each in rows if each.scaling == row.scaling and each.work.devices == 1 and _is_ours(each)]
    return row.tokens_per_second / one[0].tokens_per_second if one and row.measured.result else None


def over_ddp(row: Row, rows: Sequence[Row]) -> float | None:
    """Tokens a second over DDP's on as many devices; None where that was not measured."""
    same = [each for each in rows if each.work == row.work and each.measured.system.name == "pytorch_ddp"]
    measured = [each for each in same if each.measured.result is not None]
    return row.tokens_per_second / measured[0].tokens_per_second if measured and row.measured.result else None


def _is_ours(row: Row) -> bool:
    return row.measured.system.name == "gpt2_jax" and row.measured.result is not None


def table(rows: Sequence[Row]) -> str:
    """For people: a line for each system; those that were not measured with the reason."""
    lines = [
        f"{'scaling':8}{'devices':>8}  {'system':30}{'ms':>10}{'±':>7}{'tok/s':>12}{'times one':>11}{'/ DDP':>8}  memory of one"
    ]
    for row in rows:
        one, name = row.measured, str(row.measured.system)
        begin = f"{row.scaling:8}{row.work.devices:>8}  {name:30}"
        if one.result is None:
            lines.append(f"{begin}  {one.reason}")
            continue
        times, ddp = (f"{ratio:.2f}" if ratio else "" for ratio in (speedup(row, rows), over_ddp(row, rows)))
        estimated = f", estimated {gigabytes(one.result.estimated_bytes)}" if one.result.estimated_bytes else ""
        lines.append(
            f"{begin}{1e3 * one.seconds_per_step:>10.2f}{percent(spread(one.result.seconds)):>7}{row.tokens_per_second:>12,.0f}"
            f"{times:>11}{ddp:>8}  {gigabytes(one.result.peak_memory_bytes)}{estimated}"
        )
    return "\n".join(lines)


def record(rows: Sequence[Row], work: Workload, machine: dict[str, Any], load: dict[str, Any]) -> dict[str, Any]:
    """All of it as one JSON object; seconds, bytes."""
    return {
        "bench": "scale",
        "model": work.model_name,
        "batch_size": work.batch_size,
        "sequence_length": work.sequence_length,
        "backend": work.backend,
        "machine": machine,
        "load": load,
        "rows": [_record_of(row, rows) for row in rows],
    }


def _record_of(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    one, result = row.measured, row.measured.result
    what = {
        "scaling": row.scaling,
        "devices": row.work.devices,
        "micro_batches": row.work.micro_batches,
        "system": one.system.name,
        "stage": one.system.stage,
        "dtype": one.system.dtype,
    }
    if result is None:
        return what | {"refused": one.reason, "failed": one.failed}
    return what | {
        "device": result.device,
        "seconds_per_step": one.seconds_per_step,
        "steps": len(result.seconds),
        "spread": spread(result.seconds),
        "tokens_per_second": row.tokens_per_second,
        "times_one_device": speedup(row, rows),
        "times_ddp": over_ddp(row, rows),
        "peak_memory_bytes": result.peak_memory_bytes,
        "estimated_bytes": result.estimated_bytes,
        "compiled_bytes": result.compiled_bytes,
        "compile_seconds": result.compile_seconds,
        "losses": result.losses[:3],
    }
