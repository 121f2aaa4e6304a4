"""Published figures of a port of GPT-2's training to Swift, beside which a Mac's own are put.

Matt Gallagher, "Training an LLM in Swift", parts 1 and 2, on Cocoa with Love (2026), repository mattgallagher/CwlLlmSwift:
GPT-2 124M, 4 sequences of 64 tokens a step, forward, backward and AdamW in float32 on an M3 Max with 16 CPU cores.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from gpt2_jax.benchmark.chart import Bar

MODEL, TOKENS = "d12", 256
MACHINE = "M3 Max"


class Rung(NamedTuple):
    """One of his implementations, and this project's that does as much, by its name in bench_matmul; "" for none."""

    name: str
    steps_per_second: float  # as published
    ours: str = ""
    remark: str = ""  # in place of ours


RUNGS = (
    Rung("llm.c, one thread", 0.175, remark="llm.c itself"),
    Rung("Basic Swift", 0.014, "naive"),
    Rung("Fast Swift", 0.189, "simd"),
    Rung("llm.c with OpenMP", 0.776, remark="llm.c itself"),
    Rung("Multithreaded Swift", 1.014, "threaded"),
    Rung("AMX by hand", 1.678, remark="none: undocumented instructions"),
    Rung("Accelerate's cblas_sgemm", 2.015, "accelerate"),
    Rung("Basic Metal", 1.841, remark="none: no kernels of our own on this GPU"),
    Rung("Tiled Metal", 3.371, remark="none"),
    Rung("BNNSGraph, CPU", 3.997, remark="none"),
    Rung("MPSGraph", 13.357, remark="bench-train --backend metal"),
)


def is_comparable(model: str, tokens: int) -> bool:
    """Whether a bench on this machine measures the same work on the same kind of machine."""
    return sys.platform == "darwin" and (model, tokens) == (MODEL, TOKENS)


def ladder(totals: list[dict[str, Any]], work: float) -> list[str]:
    """A Markdown table of his whole steps beside the products of a step here; `work` is their floating point operations."""
    ours = {total["implementation"]: total for total in totals if total["precision"] == "F32_F32_F32"}
    lines = [
        f"| Swift, {MACHINE} | its step | tok/s | GFLOP/s | here | products of a step | GFLOP/s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for rung in RUNGS:
        rate = rung.steps_per_second
        his = f"| {rung.name} | {1 / rate:.2g} s | {_three_digits(TOKENS * rate)} | {_three_digits(work * rate / 1e9)} "
        lines.append(his + _cells(rung.ours, rung.remark, ours))
    others = [name for name in ours if name not in {rung.ours for rung in RUNGS}]
    return lines + ["| | | | " + _cells(name, "", ours) for name in others]


def bars(work: float) -> list[Bar]:
    """His rates, for the picture of bench_matmul."""
    group = f"published: Swift on an {MACHINE}, whole steps"
    return [
        Bar(rung.name, group, rate := work * rung.steps_per_second / 1e9, f"{rate:,.1f}", pale=True)
        for rung in sorted(RUNGS, key=lambda rung: rung.steps_per_second)
    ]


def _cells(name: str, remark: str, ours: dict[str, dict[str, Any]]) -> str:
    if not name:
        return f"| {remark} | | |"
    if name not in ours:
        return f"| `{name}` | | |"
    return f"| `{name}` | {ours[name]['seconds']:.3g} s | {_three_digits(ours[name]['gflops'])} |"


def _three_digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
