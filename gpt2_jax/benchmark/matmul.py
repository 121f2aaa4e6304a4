"""bench_matmul.py: the time that a training step's matrix products take, by every implementation in one run."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import jax

from gpt2_jax.benchmark import swift
from gpt2_jax.benchmark.chart import Bar, check_writable, draw_bars
from gpt2_jax.benchmark.machine import (
    OthersWork,
    cpu_rates_lines,
    describe_machine,
    load_lines,
    machine_line,
    measure_load,
    percent,
    ratio,
    seconds_running,
    spread,
)
from gpt2_jax.benchmark.matmul_timing import ERROR_ROWS, Run, measure
from gpt2_jax.benchmark.products import IMPLEMENTATIONS, PRODUCTS, dimensions, flops, linears_of
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2Config, config_from_descriptor
from gpt2_jax.ops.cpu import library
from gpt2_jax.sharing import anonymous

_QUICK_SECONDS = 41.0  # of the whole program, so that it ends within 50


def bench_matmul(
    tokens: int = 256,
    implementations: Sequence[str] = IMPLEMENTATIONS,
    *,
    config: GPT2Config | None = None,
    rounds: int = 5,
    quick: bool = False,
    plot: str | None = None,
) -> None:
    """Measure, and print a table, what was refused, how it was counted, and the JSON line last. GPT-2 124M by default."""
    if tokens < 1 or rounds < 1:
        raise Gpt2JaxError(f"expected --tokens and --rounds of at least 1, found {tokens} and {rounds}")
    if plot is not None:
        check_writable(plot)
    # A product then runs on the thread that asks for it: no hand-over to time.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    beside_swift = swift.is_comparable(swift.MODEL if config is None else "", tokens)
    config = config or config_from_descriptor(swift.MODEL)
    machine = describe_machine()
    title, size = f"Matrix products of one GPT-2 training step, {tokens:,} tokens", _size_of_step(config, tokens)
    load_before, during = measure_load(), OthersWork()
    print(f"{title}; {size}\n{machine_line(machine)}\nbefore: {load_before}", flush=True)
    runs, refusals = measure(
        config,
        tokens,
        implementations,
        rounds=rounds,
        seconds=_QUICK_SECONDS if quick else None,
        say=lambda text: print(f"[{seconds_running():4.0f} s] {text}", flush=True),
    )
    load_after, others = measure_load(), during.others()
    rates = library.rates()
    record: dict[str, Any] = {
        "bench": "matmul",
        "tokens": tokens,
        "rows": _rows(runs),
        "totals": totals(runs),
        "cpu_rates": rates,
        "refused": [refusal._replace(reason=anonymous(refusal.reason))._asdict() for refusal in refusals],
        "machine": machine,
        "load": {"before": asdict(load_before), "others_during": others, "after": asdict(load_after)},
    }
    print(_table(record, runs))
    if rates is not None:
        print("\n".join([*cpu_rates_lines(rates), *_share_lines(record["totals"], rates)]))
    print("\n".join(load_lines(load_before, others, load_after)))
    published = []
    if beside_swift:
        work = _work_of_step(config, tokens)
        print("\n".join(["", *swift.ladder(totals(runs), work), ""]))
        published = swift.bars(work)
    if plot is not None:
        _plot_rates(record, published, plot, title, f"{size}\n{machine_line(machine)}")
        print(f"chart: {plot}")
    print(json.dumps(record))


def _size_of_step(config: GPT2Config, tokens: int) -> str:
    number = sum(linear.layers * len(PRODUCTS) for linear in linears_of(config))
    work = _work_of_step(config, tokens)
    return f"{config.num_layers} layers, {config.channels} channels: {number} products, {work / 1e9:,.1f} GFLOP"


def _work_of_step(config: GPT2Config, tokens: int) -> float:
    linears = linears_of(config)
    return sum(linear.layers * flops(product, linear, tokens) for linear in linears for product in PRODUCTS)


def totals(runs: list[Run]) -> list[dict[str, Any]]:
    """The seconds and rate of a whole step's products, for every run: the JSON line's "totals"."""
    result = []
    for run in runs:
        step = [(product, linear) for product in PRODUCTS for linear in run.operands.linears]
        seconds = sum(linear.layers * run.median_seconds(product, linear) for product, linear in step)
        work = sum(linear.layers * flops(product, linear, run.operands.tokens) for product, linear in step)
        total = {
            "implementation": run.implementation,
            "precision": run.precision,
            "seconds": seconds,
            "gflops": work / seconds / 1e9,
            "seconds_range": [min(run.round_seconds), max(run.round_seconds)],
            "spread": spread(run.round_seconds),
            "rounds": len(run.round_seconds),
            "max_error": max(run.errors.values()),
        }
        if any(run.is_extrapolated(product, linear) for product, linear in step):
            total["extrapolated"] = True
        result.append(total)
    return result


def _share_lines(totals: list[dict[str, Any]], rates: dict[str, float]) -> list[str]:
    """The share of the CPU's peak that each implementation reaches, where its precision has one."""
    shares = [
        f"{total['implementation']} in {total['precision']} {total['gflops'] / rates[total['precision']]:.0%}"
        for total in totals
        if total["precision"] in rates
    ]
    return [f"share of that peak: {', '.join(shares)}"] if shares else []


def _rows(runs: list[Run]) -> list[dict[str, Any]]:
    """Every product of every linear layer of every run: the JSON line's "rows"."""
    rows = []
    for run in runs:
        for product in PRODUCTS:
            for linear in run.operands.linears:
                m, k, n = dimensions(product, linear, run.operands.tokens)
                seconds = run.median_seconds(product, linear)
                row = {
                    "implementation": run.implementation,
                    "precision": run.precision,
                    "product": product,
                    "m": m,
                    "k": k,
                    "n": n,
                    "seconds": seconds,
                    "gflops": flops(product, linear, run.operands.tokens) / seconds / 1e9,
                }
                if run.is_extrapolated(product, linear):
                    row["extrapolated"] = True
                rows.append(row)
    return rows


def _product_gflops(run: Run, product: str) -> float:
    """GFLOP/s of all products of one kind (fwd, dx or dw) in a step."""
    linears = run.operands.linears
    work = sum(linear.layers * flops(product, linear, run.operands.tokens) for linear in linears)
    return work / sum(linear.layers * run.median_seconds(product, linear) for linear in linears) / 1e9


def _table(record: dict[str, Any], runs: list[Run]) -> str:
    # XLA and PyTorch in the precision that a run's operands would have there.
    peers = {(total["implementation"], total["precision"]): total for total in record["totals"]}
    lines = [
        "",
        f"{'':<32}{'GFLOP/s':^32}{'one step':>10}{'rounds':>9}{'speed, times that of':>23}{'max|err|':>10}",
        f"{'implementation':<15}{'precision':<17}{'fwd':>8}{'dx':>8}{'dw':>8}{'all':>8}{'seconds':>10}{'differ by':>11}"
        f"{'XLA':>11}{'PyTorch':>10}{'/max|ref|':>10}",
    ]
    for run, total in zip(runs, record["totals"], strict=True):
        operands = run.precision if run.precision == "BF16_BF16_F32" else "F32_F32_F32"
        of_xla, of_pytorch = (_times(peers.get((peer, operands)), total) for peer in ("xla", "pytorch"))
        speeds = "".join(f"{_product_gflops(run, product):>8.1f}" for product in PRODUCTS)
        mark = "*" if "extrapolated" in total else ""
        lines.append(
            f"{run.implementation + mark:<15}{run.precision:<17}{speeds}{total['gflops']:>8.1f}{total['seconds']:>10.3f}"
            f"{percent(total['spread']):>11}{of_xla:>11}{of_pytorch:>10}{total['max_error']:>10.1e}"
        )
    lines += ["", *_refused_lines(record["refused"]), *_notes(runs, any("extrapolated" in total for total in record["totals"]))]
    return "\n".join(lines)


def is_doubtful(total: dict[str, Any]) -> bool:
    """True for a total that one round of a part was extrapolated to: no ratio is made of it."""
    return "extrapolated" in total and total["rounds"] < 2


def _times(peer: dict[str, Any] | None, total: dict[str, Any]) -> str:
    """How many times as fast as the peer; "-" without a peer, and "one round" if one of the two is doubtful."""
    if peer is None:
        return "-"
    if is_doubtful(peer) or is_doubtful(total):
        return "one round"
    if peer is total:
        return "1.00"
    return ratio(peer["seconds"], total["seconds"], (peer["seconds_range"], total["seconds_range"]))


def _refused_lines(refused: list[dict[str, Any]]) -> list[str]:
    """One line for every reason, with all that were refused for it."""
    by_reason: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for refusal in refused:
        by_reason[refusal["reason"]][refusal["precision"]].append(refusal["implementation"])
    lines = []
    for reason, by_precision in by_reason.items():
        who = "; ".join(
            ", ".join(names) + (f" in {precision}" if precision else "") for precision, names in by_precision.items()
        )
        lines.append(f"not {who}: {reason}")
    return lines


def _notes(runs: list[Run], any_extrapolated: bool) -> list[str]:
    counts = {len(run.round_seconds) for run in runs} or {0}
    rounds = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
    notes = [
        f"time: medians of {rounds} round(s), the implementations' in turn; a round is the products of a step in its order,",
        "  so weights come from memory. This project's implementations write dw to where the gradient belongs and sum its",
        "  squares, as their step does; every other result is a new array, as in everybody's step.",
        "rounds differ by: the longest less the shortest, of the median; single: there was one round.",
        "~: the rounds of the two overlap, so either may be the faster one.",
        f"max|err|/max|ref|: the largest of all products, {ERROR_ROWS} rows of each, evenly spread, against float64 from the",
        "  float32 operands before any rounding.",
        "bfloat16: x and dy are bfloat16, weights float32 as the optimizer keeps them. This project's implementations read",
        "  those in place, XLA rounds them inside the compiled product, PyTorch once a step (counted in fwd) as its autocast",
        "  does.",
        "  dw is float32: PyTorch's is bfloat16 converted. Logits are float32, PyTorch's bfloat16.",
    ]
    if any_extrapolated:
        notes.append("* extrapolated: timed on a slice of rows, evenly spread, or on one layer (--quick), as the whole would")
        notes.append("  take too long. one round: a time that was extrapolated from a single round is compared with nothing.")
    return notes


def _plot_rates(record: dict[str, Any], published: list[Bar], path: str, title: str, subtitle: str) -> None:
    """The rates as bars, published ones first."""
    bars = list(published)
    for total in record["totals"]:
        of_products = [
            row["gflops"] for row in record["rows"] if all(row[key] == total[key] for key in ("implementation", "precision"))
        ]
        extrapolated = "extrapolated" in total
        bars.append(
            Bar(
                label=total["implementation"],
                group=total["precision"],
                value=total["gflops"],
                text=f"{total['gflops']:,.1f}" + ("*" if extrapolated else "") + (", one round" if total["rounds"] < 2 else ""),
                range=(min(of_products), max(of_products)),
                pale=extrapolated,
            )
        )
    note = "bar: a whole step's products; line: slowest to fastest of its 15 shapes"
    if any("*" in bar.text for bar in bars):
        note += "; * pale: extrapolated from a slice of rows, or from one layer"
    draw_bars(
        path, bars, title=title, subtitle=subtitle, axis="GFLOP/s (more is better, logarithmic)", note=note, logarithmic=True
    )
