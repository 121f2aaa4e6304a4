"""bench_matmul.py: what it measures, marks, refuses and prints, on a tiny model."""

from __future__ import annotations

import json
import math
import statistics
import sys

import jax
import numpy as np
import pytest

from gpt2_jax.benchmark import matmul as bench
from gpt2_jax.benchmark import matmul_timing, swift
from gpt2_jax.benchmark.chart import check_writable
from gpt2_jax.benchmark.matmul_timing import Refusal, measure
from gpt2_jax.benchmark.products import IMPLEMENTATIONS, PRECISIONS, PRODUCTS, linears_of, make_operands
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2Config, config_from_descriptor
from gpt2_jax.ops import matmul
from gpt2_jax.ops.cpu import library

CONFIG = GPT2Config(max_sequence_length=16, vocab_size=256, num_layers=2, num_heads=2, channels=32)
TOKENS = 24


@pytest.fixture(scope="module")
def everything():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul_timing, "_LONGEST_ROUND", math.inf)
        return measure(CONFIG, TOKENS, rounds=2)


def test_every_implementation_is_measured_or_refused_with_a_reason(everything):
    runs, refusals = everything
    found = {(run.implementation, run.precision) for run in runs}
    refused = {refusal.implementation if refusal.precision is None else refusal[:2] for refusal in refusals}
    for implementation in IMPLEMENTATIONS:
        offered = {"numpy": 1, "xla": 2, "pytorch": 2}.get(implementation, len(PRECISIONS))
        for precision in PRECISIONS[:offered]:
            assert (implementation, precision) in found | refused or implementation in refused
    assert {("xla", "F32_F32_F32"), ("threaded", "BF16_BF16_F32"), ("numpy", "F32_F32_F32")} <= found
    assert all(refusal.reason for refusal in refusals)


def test_results_are_right_in_every_precision(everything):
    for run in everything[0]:
        # k roundings of a sum; bfloat16 rounds both operands and at times the result.
        bound = {"BF16_BF16_F32": 3 * 2.0**-8, "BF16_BF16_F32_X3": 1e-4}.get(run.precision, 4 * CONFIG.channels * 2.0**-24)
        assert len(run.errors) == 15
        assert 0 < max(run.errors.values()) < bound, (run.implementation, run.precision)


def test_the_rows_and_totals_are_a_steps(everything):
    runs, _ = everything
    rows, totals = bench._rows(runs), bench.totals(runs)
    assert len(rows) == 15 * len(totals) == 15 * len(runs)
    C, V = 32, 256
    shapes = {(row["product"], row["m"], row["k"], row["n"]) for row in rows}
    assert {("fwd", TOKENS, C, 3 * C), ("dx", TOKENS, 3 * C, C), ("dw", 3 * C, TOKENS, C)} <= shapes
    assert {("fwd", TOKENS, C, V), ("dx", TOKENS, V, C), ("dw", V, TOKENS, C), ("dw", C, TOKENS, 4 * C)} <= shapes
    for total in totals:
        mine = [row for row in rows if all(row[key] == total[key] for key in ("implementation", "precision"))]
        layers = [1 if V in (row["m"], row["k"], row["n"]) else CONFIG.num_layers for row in mine]
        assert total["seconds"] == pytest.approx(sum(n * row["seconds"] for n, row in zip(layers, mine, strict=True)))
        work = sum(2 * n * row["m"] * row["k"] * row["n"] for n, row in zip(layers, mine, strict=True))
        assert total["gflops"] == pytest.approx(work / total["seconds"] / 1e9)
        assert "extrapolated" not in total


def test_the_totals_of_gpt2_124m_are_llmcs_count_of_the_step():
    """6 operations for each weight of a linear layer and each token."""
    linears = linears_of(config_from_descriptor("d12"))
    weights = sum(linear.layers * linear.outputs * linear.inputs for linear in linears)
    assert weights == 12 * 12 * 768 * 768 + 50304 * 768
    assert bench._size_of_step(config_from_descriptor("d12"), 256).endswith(
        f"147 products, {6 * 256 * weights / 1e9:.1f} GFLOP"
    )


def test_a_wrong_implementation_shows_in_its_error(monkeypatch):
    monkeypatch.setattr(matmul, "matmul", lambda *args, right=matmul.matmul, **options: 1.5 * right(*args, **options))
    products = sys.modules["gpt2_jax.benchmark.products"]
    products._compiled.cache_clear()
    runs, _ = measure(CONFIG, TOKENS, ["xla"], rounds=1)
    products._compiled.cache_clear()
    assert min(runs[0].errors.values()) == pytest.approx(0.5, rel=1e-3)


def test_the_slow_are_timed_on_slices_and_marked(monkeypatch):
    monkeypatch.setattr(matmul_timing, "_LONGEST_ROUND", 1e-9)
    runs, _ = measure(CONFIG, TOKENS, ["blocked", "numpy"], rounds=1)
    totals, rows = bench.totals(runs), bench._rows(runs)
    assert [total["extrapolated"] for total in totals] == [True] * 3
    assert [row["extrapolated"] for row in rows] == [True] * 45
    for run in runs:
        for (product, name), made in run.rows.items():
            linear = next(linear for linear in linears_of(CONFIG) if linear.name == name)
            whole = {"dw": linear.outputs}.get(product, TOKENS)
            assert len(made) == matmul_timing.ERROR_ROWS < whole
            assert run.median_seconds(product, linear) == pytest.approx(
                statistics.median(run.seconds[product, name]) * whole / len(made)
            )
        assert max(run.errors.values()) < 1e-2  # the right rows are compared


def test_of_one_extrapolated_round_no_speed_is_told(monkeypatch):
    for rounds, told in ((1, ["one", "round"]), (3, ["1.00"])):
        monkeypatch.setattr(matmul_timing, "_LONGEST_ROUND", 1e-9)
        runs, _ = measure(CONFIG, TOKENS, ["xla"], rounds=rounds)
        totals = bench.totals(runs)
        assert [total["rounds"] for total in totals] == [rounds] * 2
        assert [total["spread"] is None for total in totals] == [rounds == 1] * 2
        text = bench._table({"totals": totals, "refused": []}, runs)
        row = next(line for line in text.splitlines() if line.startswith("xla*") and "F32_F32_F32" in line)
        assert row.split()[8 : 8 + len(told)] == told


def test_one_layer_that_stands_for_all_is_extrapolated_too():
    """What --quick measures: with one round nothing is compared with it."""
    runs, _ = measure(CONFIG, TOKENS, ["xla"], rounds=1, seconds=1e9)
    totals = bench.totals(runs)
    assert [len(run.rows["fwd", "qkvw"]) for run in runs] == [TOKENS] * 2  # all rows
    assert [total["extrapolated"] for total in totals] == [True] * 2
    assert [bench.is_doubtful(total) for total in totals] == [True] * 2
    assert "extrapolated" not in next(row for row in bench._rows(runs) if row["n"] == 256)  # the classifier is one layer


def test_with_a_limit_the_first_is_measured_and_the_rest_refused():
    runs, refusals = measure(CONFIG, TOKENS, ["xla", "numpy"], rounds=3, seconds=0.001)
    assert len(runs) == 1
    assert len(bench.totals(runs)) == 1
    assert [refusal.reason for refusal in refusals] == ["the 0 seconds were over"] * 2


def test_a_round_is_a_step_in_its_order(everything):
    run = next(run for run in everything[0] if run.implementation == "numpy")
    met = []
    original = run.multiply
    run.multiply = lambda *product: met.append(product) or original(*product)
    run.round([0, 1])
    run.multiply = original
    order = [(product, linear.name, layer) for product, linear, layer in met]
    assert order[:5] == [*(("fwd", name, 0) for name in ("qkvw", "attprojw", "fcw", "fcprojw")), ("fwd", "qkvw", 1)]
    assert order[8:11] == [(product, "wte", 0) for product in PRODUCTS]
    assert order[11:14] == [("dx", "fcprojw", 1), ("dw", "fcprojw", 1), ("dx", "fcw", 1)]
    assert order[-1] == ("dw", "qkvw", 0)
    assert len(order) == 3 * (4 * 2 + 1)


def test_operands_are_not_each_others_twins():
    operands = make_operands(config_from_descriptor("d12"), 64)
    for name, weights in operands.weights.items():
        assert weights[0].std() == pytest.approx(0.02, rel=0.05)
        assert abs(np.corrcoef(weights[0][0], weights[-1][1])[0, 1]) < 0.2
        assert abs(np.corrcoef(operands.x[name][0], weights[0][0])[0, 1]) < 0.2
        assert abs(np.corrcoef(operands.x[name][0], operands.x[name][1])[0, 1]) < 0.2


def test_without_pytorch_it_says_so_and_goes_on(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    runs, refusals = measure(CONFIG, TOKENS, ["pytorch", "numpy"], rounds=1)
    assert [run.implementation for run in runs] == ["numpy"]
    assert {refusal.reason for refusal in refusals} == {"PyTorch is not installed: pip install -e '.[test]'"}


def test_a_custom_call_that_the_machine_lacks_is_refused_once(monkeypatch):
    def without_simd(name):
        available = name != "simd"
        return {"name": name, "available": available, "reason": "no such instructions", "precisions": ["F32_F32_F32"]}

    monkeypatch.setattr(library, "implementation", without_simd)
    runs, refusals = measure(CONFIG, TOKENS, ["simd", "numpy"], rounds=1)
    assert refusals == [Refusal("simd", None, "no such instructions")]
    assert bench._refused_lines([refusals[0]._asdict()]) == ["not simd: no such instructions"]
    assert len(runs) == 1


def test_an_implementation_that_breaks_is_no_refusal(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("INTERNAL: out of luck")

    monkeypatch.setattr(matmul_timing, "_rates", broken)
    with pytest.raises(RuntimeError, match="out of luck"):
        measure(CONFIG, TOKENS, ["numpy"], rounds=1)


def test_an_unknown_implementation_is_an_error_with_the_known_ones():
    for typed, hint in ((["gemm"], "threaded xla"), (["xla", "threded", "py-torch"], "xla threaded pytorch")):
        with pytest.raises(Gpt2JaxError, match=r"--implementations: expected some of naive, .*pytorch, found ") as refused:
            measure(CONFIG, TOKENS, typed)
        assert refused.value.hint == f"--implementations {hint}"


def test_it_prints_a_table_and_one_json_line_last_and_draws(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # the setting is for a process of its own
    picture = tmp_path / "rates.png"
    bench.bench_matmul(TOKENS, ["simd", "xla"], config=CONFIG, rounds=1, plot=str(picture))
    *text, last = capsys.readouterr().out.splitlines()
    record = json.loads(last)
    assert (record["bench"], record["tokens"]) == ("matmul", TOKENS)
    row_keys = {"implementation", "precision", "product", "m", "k", "n", "seconds", "gflops"}
    assert {frozenset(row) for row in record["rows"]} == {frozenset(row_keys)}
    total_keys = {"implementation", "precision", "seconds", "gflops", "rounds", "seconds_range", "spread", "max_error"}
    assert {frozenset(total) for total in record["totals"]} == {frozenset(total_keys)}
    assert {refusal["implementation"] for refusal in record["refused"]} == {"simd"}
    lines = [line for line in text if line.startswith(("simd ", "xla "))]
    assert len(lines) == 4
    assert any(line.split()[:2] == ["xla", "F32_F32_F32"] and line.split()[7:9] == ["single", "1.00"] for line in lines)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000


def test_a_picture_that_cannot_be_saved_brings_the_command_after_which_it_can(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, hint in (("my plots/a.png", "mkdir -p 'my plots'"), ("a b.jpg", "--plot 'a b.png'"), ("", "--plot steps.png")):
        with pytest.raises(Gpt2JaxError, match=r"--plot: expected a \.png file in a folder that exists") as refused:
            check_writable(path)
        assert refused.value.hint == hint


@pytest.mark.parametrize("options", [{"tokens": 0}, {"rounds": 0}, {"plot": "no/such/folder/a.png"}, {"plot": "a.jpg"}])
def test_impossible_settings_are_refused_before_anything_runs(options, capsys):
    with pytest.raises(Gpt2JaxError, match="expected"):
        bench.bench_matmul(config=CONFIG, **options)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("system", "model", "tokens", "comparable"),
    [("darwin", "d12", 256, True), ("linux", "d12", 256, False), ("darwin", "d24", 256, False), ("darwin", "d12", 512, False)],
)
def test_published_figures_stand_beside_the_same_work_on_the_same_kind_of_machine(
    monkeypatch, system, model, tokens, comparable
):
    monkeypatch.setattr(sys, "platform", system)
    assert swift.is_comparable(model, tokens) == comparable


def test_the_ladder_beside_the_published_figures(everything, monkeypatch, tmp_path, capsys):
    """With the tiny model's times, as if they were those of a Mac."""
    monkeypatch.setattr(swift, "is_comparable", lambda *about: True)
    monkeypatch.setattr(bench, "measure", lambda *about, **options: everything)
    drawn = []
    monkeypatch.setattr(bench, "draw_bars", lambda path, bars, **about: drawn.extend(bars))
    bench.bench_matmul(TOKENS, config=CONFIG, plot=str(tmp_path / "ladder.png"))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    by_name = {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in lines}
    total = next(
        total
        for total in bench.totals(everything[0])
        if (total["implementation"], total["precision"]) == ("threaded", "F32_F32_F32")
    )
    row = by_name["Multithreaded Swift"]
    assert row[1:3] == ["0.99 s", f"{256 * 1.014:,.0f}"]
    assert row[4] == "`threaded`"
    assert float(row[5].removesuffix(" s")) == pytest.approx(total["seconds"], rel=5e-3)
    assert "bench-train --backend metal" in by_name["MPSGraph"]
    assert any("`xla`" in line for line in lines)
    published = [bar for bar in drawn if bar.group.startswith("published")]
    assert len(published) == len(swift.RUNGS)
    assert len(drawn) == len(published) + len(everything[0])
