"""Whole training steps of GPT-2, side by side: this project, plain JAX, PyTorch."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from gpt2_jax.benchmark import peak as peak_of
from gpt2_jax.benchmark.chart import check_writable
from gpt2_jax.benchmark.machine import OthersWork, describe_machine, load_lines, machine_line, measure_load, seconds_running
from gpt2_jax.benchmark.products import IMPLEMENTATIONS
from gpt2_jax.benchmark.train_report import Measured, System, Workload, plot_systems, record, table, title
from gpt2_jax.benchmark.train_rounds import TurnLimits, measure_in_turn
from gpt2_jax.benchmark.train_system import DTYPES, ON_NVIDIA_IN_BFLOAT16, SYSTEMS
from gpt2_jax.compute.backend import cpu_backend
from gpt2_jax.compute.plan import make_plan
from gpt2_jax.config import ComputeSettings
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.names import nearest
from gpt2_jax.ops import matmul
from gpt2_jax.ops.cpu import library as custom_calls

_QUICK_SECONDS = 165.0  # of the whole program, so that it ends within 3 minutes
_QUICK_STEPS = 3
_SLOWEST_PRODUCTS = 30.0  # seconds a step: an implementation that needs more is measured only when it is named
_SCALING_TOKENS = (256, 512, 1024, 2048, 4096, 8192)
_SCALING_SEQUENCE_LENGTH = 256
_SCALING_STEPS = 3
_QUICK_PEAK_SECONDS = 20.0
_PEAK_SECONDS = 120.0
_PEAK_ROUNDS = 3


def select_systems(patterns: Sequence[str], *, quick: bool, backend: str) -> list[System]:
    """The systems that patterns such as 'pytorch', 'gpt2_jax:simd' or 'jax_plain:bfloat16' name; by default all, or the
    few of `quick`."""
    known = [
        System(name, implementation, dtype, setting)
        for name in SYSTEMS
        if backend == "cuda" or patterns or name not in ON_NVIDIA_IN_BFLOAT16
        for implementation in (("auto", *matmul.IMPLEMENTATIONS) if name == "gpt2_jax" else ("",))
        for dtype in DTYPES
        for setting in _settings(name, implementation, dtype, backend)
    ]
    if not patterns and quick:
        return [s for s in known if s.matmul == "auto" or s.name == "pytorch" or (s.name, s.dtype) == ("jax_plain", "float32")]
    known = [s for s in known if s.dtype == "bfloat16" or s.name not in ON_NVIDIA_IN_BFLOAT16]
    if not patterns:
        known = [s for s in known if s.name != "pytorch_tuned"]  # its search takes minutes
        # 'auto' is one of the others on the CPU, and the only one elsewhere.
        return [s for s in known if s.matmul == "" or (s.matmul == "auto") == (backend != "cpu")]
    chosen = []
    for pattern in patterns:
        parts = set(pattern.split(":"))
        named = [s for s in known if parts <= set(s) - {""} and ("auto" in parts or s.matmul != "auto")]
        if not named:
            implementations = ", ".join(("auto", *matmul.IMPLEMENTATIONS))
            parts_known = sorted({part for system in known for part in system} - {""})
            meant = {name for part in pattern.split(":") for name in nearest(part, parts_known)}
            is_one = meant and any(meant <= set(system) for system in known)
            raise Gpt2JaxError(
                f"--systems: expected names of {', '.join(SYSTEMS)}, {', '.join(DTYPES)} or {implementations}, "
                f"joined by colons, found {pattern!r}",
                f"--systems {':'.join(sorted(meant)) if is_one else 'gpt2_jax:auto pytorch:bfloat16'}",
            )
        chosen += named
    return [s for s in known if s in chosen]


def _settings(name: str, implementation: str, dtype: str, backend: str) -> tuple[str, ...]:
    """The values of --matmul-precision with which a system computes in a way of its own."""
    if dtype == "float32" and _splits_float32(implementation):
        return ("", "high", "highest")
    # By default NVIDIA GPUs multiply float32 in TF32.
    compared = implementation == "auto" or name in ("pytorch", "pytorch_compiled")
    return ("", "highest") if dtype == "float32" and backend == "cuda" and compared else ("",)


def _splits_float32(implementation: str) -> bool:
    """Whether an implementation multiplies float32 only in parts, so that every --matmul-precision has other products."""
    if implementation not in matmul.IMPLEMENTATIONS or implementation == "xla":
        return False
    try:
        return "F32_F32_F32" not in custom_calls.implementation(implementation)["precisions"]
    except NotImplementedError:
        return False


def bench_train(
    work: Workload,
    systems: Sequence[str] = (),
    *,
    steps: int = 10,
    quick: bool = False,
    scaling: bool = False,
    plot: str | None = None,
) -> bool:
    """Measure, and print a table, what was refused, how it was counted, and the JSON line last.

    False when a system failed that should have run.
    """
    if min(work.batch_size, work.micro_batches, steps) < 1 or not 1 <= work.sequence_length <= work.config.max_sequence_length:
        raise Gpt2JaxError(
            "expected --batch-size, --micro-batches and --steps of at least 1 and --sequence-length 1 to "
            f"{work.config.max_sequence_length}, "
            f"found {work.batch_size}, {work.micro_batches}, {steps} and {work.sequence_length}"
        )
    if quick:
        steps = min(steps, _QUICK_STEPS)
    chosen = select_systems(systems, quick=quick, backend=work.backend)
    if plot is not None:
        check_writable(plot)
    machine = describe_machine()
    load_before, during = measure_load(), OthersWork()
    print(f"{title(work)}\n{machine_line(machine)}\nbefore: {load_before}", flush=True)

    peak = _measure_peak(work, quick)
    left_out = [Measured(system, None, reason) for system in chosen if not systems and (reason := _too_slow(system, peak))]
    in_turn = measure_in_turn(
        [system for system in chosen if system not in [one.system for one in left_out]],
        work,
        steps,
        TurnLimits(deadline=_QUICK_SECONDS if quick else None),
        say,
    )
    measured = sorted(left_out + in_turn, key=lambda one: chosen.index(one.system))
    by_tokens = _measure_scaling(work, chosen) if scaling else []

    load_after, others = measure_load(), during.others()
    load = {"before": dataclasses.asdict(load_before), "others_during": others, "after": dataclasses.asdict(load_after)}
    print(table(measured, by_tokens, work, peak))
    print("\n".join(load_lines(load_before, others, load_after)))
    line = record(measured, by_tokens, work, peak, machine, load)
    if plot is not None:
        plot_systems(measured, work, plot, machine_line(machine))
        print(f"chart: {plot}")
    print(json.dumps(line))
    return not any(one.failed for one in measured)


def _measure_peak(work: Workload, quick: bool) -> dict[str, Any]:
    """The best rate of products; with `quick` only this project's choices and PyTorch are asked for it."""
    few = [make_plan(ComputeSettings(), cpu_backend("a bench"), work.config).linear.name, "pytorch"]
    request = peak_of.Request(
        backend=work.backend,
        model=dataclasses.asdict(work.config),
        tokens=work.tokens,
        implementations=few if quick else list(IMPLEMENTATIONS),
        rounds=_PEAK_ROUNDS,
        seconds=_QUICK_PEAK_SECONDS if quick else _PEAK_SECONDS,
        batch_size=work.batch_size,
        sequence_length=work.sequence_length,
    )
    say("measuring the matrix products alone, for the peak ...")
    # In a process of its own: none of the libraries' threads are left.
    command = [sys.executable, "-m", "gpt2_jax.benchmark.peak", json.dumps(dataclasses.asdict(request))]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        found = (ended.stderr.strip().splitlines() or [f"status {ended.returncode}"])[-1]
        raise Gpt2JaxError(f"the matrix products alone: expected to measure them, found: {found}")
    answer: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    say(f"{answer['gflops']:,.1f} GFLOP/s by {answer['of']}")
    return answer


def _too_slow(system: System, peak: dict[str, Any]) -> str | None:
    """Why an implementation that nobody named is left out."""
    precisions = ("BF16_BF16_F32",) if system.dtype == "bfloat16" else ("F32_F32_F32", "S8_S8_S32_X6")
    for total in peak["totals"]:
        slow = total["seconds"] > _SLOWEST_PRODUCTS
        if slow and total["implementation"] == system.matmul and total["precision"] in precisions:
            return f"its products alone take about {total['seconds']:.0f} s a step; --systems {system} measures it"
    return None


def _measure_scaling(work: Workload, chosen: list[System]) -> list[tuple[Workload, Measured]]:
    """This project's own choice from 256 to 8192 tokens, sequences of 256 (or the model's longest, if that is less)."""
    sequence_length = min(_SCALING_SEQUENCE_LENGTH, work.config.max_sequence_length)
    result = []
    for dtype in dict.fromkeys(system.dtype for system in chosen):
        for tokens in _SCALING_TOKENS:
            grown = dataclasses.replace(work, batch_size=tokens // sequence_length, sequence_length=sequence_length)
            tell = partial(_say_of, f"{tokens} tokens")
            system = System("gpt2_jax", "auto", dtype)
            (one,) = measure_in_turn([system], grown, _SCALING_STEPS, TurnLimits(), tell)
            result.append((grown, one))
    return result


def say(text: str) -> None:
    print(f"[{seconds_running():4.0f} s] {text}", flush=True)


def _say_of(what: str, text: str) -> None:
    say(f"{what}: {text}")
