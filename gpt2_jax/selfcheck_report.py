"""What selfcheck.py has found, for people, for programs and for an issue. Nothing in it names a person, a machine, a path or a
network."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt2_jax.data.tokenizer import gpt2_tokenizer
from gpt2_jax.doctor import VARIABLES
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.files import atomic_write
from gpt2_jax.gradient_check import Comparison
from gpt2_jax.jax_compat import version_text
from gpt2_jax.machine import processor_name, system_name
from gpt2_jax.selfcheck import BATCH_SIZE, Check, OfDtype
from gpt2_jax.sharing import anonymous

_PACKAGES = ("gpt2_jax", "jax", "jaxlib", "jax-mps", "metaljax", "jax-graft", "jax-metal", "numpy", "torch")


def rows_to_show(rows: list[Comparison]) -> list[tuple[str, Comparison]]:
    """Each quantity with its label; of the gradients of the 16 tensors only the worst, where all are within tolerance."""
    grads = [row for row in rows if row.name.startswith("grad ")]
    shown = [(row.name, row) for row in rows if not row.passed or row not in grads]
    if grads and all(row.passed for row in grads):
        worst = max(grads, key=lambda row: row.used_tolerance)
        shown.append((f"16 grads, worst {worst.name.removeprefix('grad ')}", worst))
    return shown


def text_lines(found: OfDtype, config: GPT2Config) -> Iterator[str]:
    """One dtype's results as a table: speed, agreement, what the plugin recognised, the texts."""
    if found.failure:
        yield f"\n{found.dtype}: FAILED: {found.failure}"
        return
    checks, tokens = found.checks, BATCH_SIZE * config.max_sequence_length
    yield f"\n{found.dtype:<22}{'last loss':>11}{'compiled in':>13}{'a step':>11}{'from':>10}{'to':>10}{'tok/s':>9}"
    for check in checks:
        outcome = check.outcome
        median, seconds = outcome.median_seconds, outcome.step_seconds
        yield (
            f"{outcome.system.name:<22}{outcome.losses[-1]:>11.6f}{outcome.compile_seconds:>11.1f} s"
            f"{1000 * median:>8.1f} ms{1000 * min(seconds):>10.1f}{1000 * max(seconds):>10.1f}{tokens / median:>9.0f}"
        )
    yield f"\n{'':<22}{'against':<10}{'':<26}{'max |difference|':>18}{'of largest value':>18}{'of tolerance':>14}"
    for check in checks:
        for against, rows in ((checks[0].outcome.system.name, check.against_reference), ("pytorch", check.against_pytorch)):
            for label, row in rows_to_show(rows) if check is not checks[0] or against == "pytorch" else []:
                verdict = "ok" if row.passed else "FAILED"
                yield (
                    f"{check.outcome.system.name:<22}{against:<10}{label:<26}"
                    f"{row.max_absolute:>18.3e}{row.max_relative:>18.3e}{row.used_tolerance:>13.1%}  {verdict}"
                )
    yield ""
    for check in checks:
        same = "the same bits" if check.outcome.repeats_bits else "other bits; the worse of both is above"
        yield f"{check.outcome.system.name}: the gradient computed a second time has {same}"
    if found.expected_operations:
        yield f"the plugin's own operations in the step: {describe_operations(found.operations, found.expected_operations)}"
    if not checks[0].against_pytorch:
        yield "PyTorch is not installed, so it was not asked: pip install -e '.[test]'"
    for check in checks:
        yield f"\ntext of {check.outcome.system.name}{_like(checks[0], check)}: {gpt2_tokenizer().decode(check.sample)}"


def describe_operations(operations: dict[str, int], expected: dict[str, int]) -> str:
    """How many of each were found, and how many should have been."""
    if not operations:
        return "none was found"
    parts = [f"{name} {operations.get(name, 0)} of {count}" for name, count in sorted(expected.items())]
    return ", ".join(parts + [f"{name} {count}" for name, count in operations.items() if name not in expected])


def report_of(results: list[OfDtype], config: GPT2Config) -> dict[str, Any]:
    """The report as JSON has it."""
    report = {
        "processor": anonymous(processor_name()),
        "system": anonymous(system_name()),
        "versions": {name: version for name in _PACKAGES if (version := version_text(name))},
        "environment": {name: anonymous(os.environ[name]) for name in VARIABLES if name in os.environ},
        "model": dataclasses.asdict(config),
        "passed": all(found.passed for found in results),
        "dtypes": [
            {
                "dtype": found.dtype,
                "passed": found.passed,
                "failure": anonymous(found.failure),
                "operations": found.operations,
                "expected_operations": found.expected_operations,
                "systems": [_system(check, config) for check in found.checks],
            }
            for found in results
        ],
    }
    return dict(_json_value(report))


def write_report(path: Path, report: dict[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(report, indent=1) + "\n").encode())


def markdown(report: dict[str, Any]) -> str:
    """A report of `report_of` for an issue: a table, and what is not as it should be."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"### selfcheck: {'all agree within tolerance' if report['passed'] else 'FAILED'}",
        "",
        f"{report['processor']}, {report['system']}; {versions}",
    ]
    if report["environment"]:
        lines += ["", "set: " + ", ".join(f"`{name}={value}`" for name, value in report["environment"].items())]
    lines += [
        "",
        "| dtype | system | device | last loss | compiled | a step | tok/s | worst of tolerance | same bits twice |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    wrong, operations = [], []
    for of_dtype in report["dtypes"]:
        dtype = of_dtype["dtype"]
        if of_dtype["failure"]:
            wrong.append(f"- {dtype}: {of_dtype['failure']}")
        if of_dtype["expected_operations"]:
            said = describe_operations(of_dtype["operations"], of_dtype["expected_operations"])
            operations.append(f"- {dtype}, the plugin's own operations in the step: {said}")
        for system in of_dtype["systems"]:
            rows = [("cpu, xla", row) for row in system["against_reference"]]
            rows += [("PyTorch", row) for row in system["against_pytorch"]]
            # JSON has no number for what is not finite.
            worst = max((math.inf if row["used_tolerance"] is None else row["used_tolerance"] for _, row in rows), default=0.0)
            loss = system["losses"][-1]
            lines.append(
                f"| {dtype} | {system['name']} | {system['device']} | {'none' if loss is None else format(loss, '.6f')} "
                f"| {system['compile_seconds']:.1f} s | {1000 * system['median_step_seconds']:.1f} ms "
                f"| {system['tokens_per_second']:,.0f} | {worst:.1%} | {'yes' if system['repeats_bits'] else 'no'} |"
            )
            wrong += [
                f"- {dtype}, {system['name']} against {against}: {row['name']} differs by {row['max_absolute']}, "
                f"{row['max_relative']} of the largest value"
                for against, row in rows
                if not row["passed"]
            ]
    lines += ["", *operations] if operations else []
    lines += ["", "not within tolerance:", "", *wrong] if wrong else []
    return "\n".join(lines) + "\n"


def _system(check: Check, config: GPT2Config) -> dict[str, Any]:
    outcome = check.outcome
    return {
        "name": outcome.system.name,
        "device": anonymous(outcome.system.device.device_kind),
        "compile_seconds": outcome.compile_seconds,
        "step_seconds": outcome.step_seconds,
        "median_step_seconds": outcome.median_seconds,
        "tokens_per_second": BATCH_SIZE * config.max_sequence_length / outcome.median_seconds,
        "losses": outcome.losses,
        "repeats_bits": outcome.repeats_bits,
        "sample": check.sample,
        "against_reference": [dataclasses.asdict(row) | {"passed": row.passed} for row in check.against_reference],
        "against_pytorch": [dataclasses.asdict(row) | {"passed": row.passed} for row in check.against_pytorch],
    }


def _like(reference: Check, check: Check) -> str:
    return "" if check is reference else " (the same)" if check.sample == reference.sample else " (another)"


def _json_value(value: Any) -> Any:
    """The value with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _json_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
