"""bench_matmul.py: the time that a training step's matrix products take, by every implementation in one run."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax

from gpt2_jax.benchmark.chart import Bar, check_writable, draw_bars
from gpt2_jax.benchmark.machine import describe_machine, machine_line, seconds_running
from gpt2_jax.benchmark.matmul_timing import ERROR_ROWS, Run, measure
from gpt2_jax.benchmark.products import IMPLEMENTATIONS, PRODUCTS, dimensions, flops, linears_of
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2Config, config_from_descriptor
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
    config = config or config_from_descriptor("d12")
    machine = describe_machine()
    title, size = f"Matrix products of one GPT-2 training step, {tokens:,} tokens", _size_of_step(config, tokens)
    print(f"{title}; {size}\n{machine_line(machine)}", flush=True)
    runs, refusals = measure(
        config,
        tokens,
        implementations,
        rounds=rounds,
        seconds=_QUICK_SECONDS if quick else None,
        say=lambda text: print(f"[{seconds_running():4.0f} s] {text}", flush=True),
    )
    record = {
        "bench": "matmul",
        "tokens": tokens,
        "rows": _rows(runs),
        "totals": totals(runs),
        "refused": [refusal._replace(reason=anonymous(refusal.reason))._asdict() for refusal in refusals],
        "machine": machine,
    }
    print(_table(record, runs))
    if plot is not None:
        _plot_ladder(record, plot, title, f"{size}\n{machine_line(machine)}")
        print(f"chart: {plot}")
    print(json.dumps(record))


def _size_of_step(config: GPT2Config, tokens: int) -> str:
    linears = linears_of(config)
    number = sum(linear.layers * len(PRODUCTS) for linear in linears)
    work = sum(linear.layers * flops(product, linear, tokens) for linear in linears for product in PRODUCTS)
    return f"{config.num_layers} layers, {config.channels} channels: {number} products, {work / 1e9:,.1f} GFLOP"


def totals(runs: list[Run]) -> list[dict[str, Any]]:
    """Of every run, a training step's worth of products: the JSON line's "totals"."""
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
            "max_error": max(run.errors.values()),
        }
        if any(run.is_extrapolated(product, linear) for product, linear in step):
            total["extrapolated"] = True
        result.append(total)
    return result


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
    """Of all products of one kind in a step."""
    linears = run.operands.linears
    work = sum(linear.layers * flops(product, linear, run.operands.tokens) for linear in linears)
    return work / sum(linear.layers * run.median_seconds(product, linear) for linear in linears) / 1e9


def _table(record: dict[str, Any], runs: list[Run]) -> str:
    # XLA and PyTorch in the precision that a run's operands would have there.
    peers = {(total["implementation"], total["precision"]): total["seconds"] for total in record["totals"]}
    lines = [
        "",
        f"{'':<32}{'GFLOP/s':^32}{'one step':>10}{'speed, times that of':>23}{'max|err|':>10}",
        f"{'implementation':<15}{'precision':<17}{'fwd':>8}{'dx':>8}{'dw':>8}{'all':>8}{'seconds':>10}"
        f"{'XLA':>13}{'PyTorch':>10}{'/max|ref|':>10}",
    ]
    for run, total in zip(runs, record["totals"], strict=True):
        operands = run.precision if run.precision == "BF16_BF16_F32" else "F32_F32_F32"
        of_xla, of_pytorch = (_times(peers.get((peer, operands)), total["seconds"]) for peer in ("xla", "pytorch"))
        speeds = "".join(f"{_product_gflops(run, product):>8.1f}" for product in PRODUCTS)
        mark = "*" if "extrapolated" in total else ""
        lines.append(
            f"{run.implementation + mark:<15}{run.precision:<17}{speeds}{total['gflops']:>8.1f}{total['seconds']:>10.3f}"
            f"{of_xla:>13}{of_pytorch:>10}{total['max_error']:>10.1e}"
        )
    lines += ["", *_refused_lines(record["refused"]), *_notes(runs, any("extrapolated" in total for total in record["totals"]))]
    return "\n".join(lines)


def _times(peers_seconds: float | None, seconds: float) -> str:
    return "-" if peers_seconds is None else f"{peers_seconds / seconds:.2f}"


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
    rounds = min((len(values) for run in runs for values in run.seconds.values()), default=0)
    notes = [
        f"time: medians of {rounds} round(s), the implementations' in turn; a round is the products of a step in its order,",
        "  so weights come from memory. This project's rungs write dw to where the gradient belongs and sum its squares, as",
        "  their step does; every other result is a new array, as in everybody's step.",
        f"max|err|/max|ref|: the largest of all products, {ERROR_ROWS} rows of each, evenly spread, against float64 from the",
        "  float32 operands before any rounding.",
        "bfloat16: x and dy are bfloat16, weights float32 as the optimizer keeps them. This project's rungs read those in",
        "  place, XLA rounds them inside the compiled product, PyTorch once a step (counted in fwd) as its autocast does.",
        "  dw is float32: PyTorch's is bfloat16 converted. Logits are float32, PyTorch's bfloat16.",
    ]
    if any_extrapolated:
        notes.append("* extrapolated: timed on a slice of rows, evenly spread, as the whole would take too long")
    return notes


def _plot_ladder(record: dict[str, Any], path: str, title: str, subtitle: str) -> None:
    """The ladder as bars."""
    bars = []
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
                text=f"{total['gflops']:,.1f}" + ("*" if extrapolated else ""),
                range=(min(of_products), max(of_products)),
                pale=extrapolated,
            )
        )
    note = "bar: a whole step's products; line: slowest to fastest of its 15 shapes"
    if any(bar.pale for bar in bars):
        note += "; * pale: extrapolated from a slice of rows"
    draw_bars(
        path, bars, title=title, subtitle=subtitle, axis="GFLOP/s (more is better, logarithmic)", note=note, logarithmic=True
    )
