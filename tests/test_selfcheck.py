"""The check of a device against XLA on the CPU: it passes what agrees, fails what does not, and leaves a report."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys

import jax
import numpy as np
import pytest

from gpt2_jax import selfcheck, selfcheck_report
from gpt2_jax.compute.backend import Backend
from tests.conftest import CPU, REPOSITORY, TINY, plan_of
from tests.implementations import APPLE, plan_of_kind

STEPS, BATCH_SIZE = 3, 2


def imitated_plugin():
    """A backend that lacks everything, on the CPU."""
    lacks = frozenset({"donation", "custom_calls", "loops"})
    plan = plan_of(backend=Backend("metal", "METAL", "test", lacks, "jax-metal"), matmul="auto", matmul_precision="highest")
    return selfcheck.System("imitated", jax.devices("cpu")[0], plan)


def systems_to_check(dtype="float32"):
    return selfcheck.systems_to_check(CPU, TINY, dtype)


def check(systems):
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, STEPS * BATCH_SIZE * TINY.max_sequence_length + 1)
    return selfcheck.check_systems(systems, tokens, steps=STEPS, batch_size=BATCH_SIZE)


@pytest.fixture(scope="module")
def checks():
    """In float32: XLA, the custom calls, the imitated plugin."""
    return check([*systems_to_check(), imitated_plugin()])


def test_systems_that_agree_pass(checks):
    assert [row.max_absolute for row in checks[0].against_reference] == [0.0] * 18
    for one in checks:
        assert one.passed
        names = [row.name for row in one.against_reference]
        assert (names[0], names[-1], len(names)) == ("3 steps' losses", "logits", 18)
        assert len(one.outcome.losses) == len(one.outcome.step_seconds) == STEPS
        assert one.sample == checks[0].sample
        assert len(one.sample) == selfcheck.SAMPLE_TOKENS


def test_bfloat16_has_its_own_tolerance(checks):
    found = check(systems_to_check("bfloat16"))
    assert all(one.passed for one in found)
    for one in found:  # each was computed in bfloat16
        [in_float32, in_bfloat16] = (outcome.grads[0]["wte"] for outcome in (checks[0].outcome, one.outcome))
        assert np.abs(in_bfloat16 - in_float32).max() > 1e-5 * np.abs(in_float32).max()


def test_the_reference_is_plain_xla_and_the_custom_calls_are_checked_too():
    systems = systems_to_check()
    products = [system.plan.linear.name for system in systems]
    assert (products[0], systems[0].device.platform) == ("xla", "cpu")
    assert products[1:] != []
    assert "xla" not in products[1:]
    # Nothing but XLA computes the reference, and no product of any system is of a shorter format.
    assert {choice.name for _, choice in systems[0].plan.choices()} <= {"xla", "concatenate"}
    assert {system.plan.matmul_precision for system in systems} == {"highest"}


@pytest.mark.torch
def test_pytorch_is_a_witness(checks):
    for one in checks:
        assert len(one.against_pytorch) == 16
        assert all(row.passed and row.max_absolute > 0 for row in one.against_pytorch)


@pytest.mark.parametrize("wrong_first", [True, False])
def test_a_wrong_gradient_fails_and_is_shown_by_its_tensor(checks, monkeypatch, wrong_first):
    outcomes = [one.outcome for one in checks]
    grads = outcomes[-1].grads[0]
    wrong = grads | {"lnfb": grads["lnfb"] * np.float32(1.01)}
    outcomes[-1] = dataclasses.replace(outcomes[-1], grads=(wrong, grads) if wrong_first else (grads, wrong))
    monkeypatch.setattr(selfcheck, "_train", lambda system, *_: {o.system.name: o for o in outcomes}[system.name])
    monkeypatch.setattr(selfcheck, "_sample", lambda *_: (np.zeros(3, np.float32), [1]))
    found = check([outcome.system for outcome in outcomes])
    assert [one.passed for one in found] == [True] * (len(found) - 1) + [False]
    shown = selfcheck_report.rows_to_show(found[-1].against_reference)
    assert [label for label, row in shown if not row.passed] == ["grad lnfb"]
    shown = selfcheck_report.rows_to_show(found[0].against_reference)
    assert [label for label, _ in shown][:2] == ["3 steps' losses", "logits"]
    assert shown[2][0].startswith("16 grads, worst ")


def report_of(checks, **changes):
    outcome = dataclasses.replace(checks[-1].outcome, losses=[float("nan"), 1.0, 2.0])
    reported = [*checks[:-1], dataclasses.replace(checks[-1], outcome=outcome)]
    return selfcheck_report.report_of([selfcheck.OfDtype("float32", reported, **changes)], TINY)


def test_the_report_is_json_that_names_nobody(checks, tmp_path):
    path = tmp_path / "selfcheck.json"
    selfcheck_report.write_report(path, report_of(checks))
    text = path.read_text(encoding="utf-8")
    report = json.loads(text)
    assert report["passed"]
    assert report["versions"]["jax"] == jax.__version__
    systems = report["dtypes"][0]["systems"]
    assert (systems[0]["name"], systems[-1]["name"]) == ("cpu, xla", "imitated")
    assert systems[-1]["losses"] == [None, 1.0, 2.0]
    assert systems[0]["median_step_seconds"] == np.median(systems[0]["step_seconds"])
    assert systems[0]["repeats_bits"]
    for private in (str(tmp_path), str(REPOSITORY), platform.node()):
        assert private not in text


def test_the_report_for_an_issue(checks):
    operations = {"mps.gelu": 1, "mps.addmm": 8}
    found = selfcheck_report.markdown(report_of(checks, operations=operations, expected_operations={"mps.gelu": 2}))
    assert found.startswith("### selfcheck: all agree within tolerance\n")
    assert f"jax {jax.__version__}" in found
    table = [line for line in found.splitlines() if line.startswith("| float32")]
    assert len(table) == len(checks)
    assert table[0].startswith("| float32 | cpu, xla |")
    assert all(line.endswith("| yes |") for line in table)
    assert "mps.gelu 1 of 2, mps.addmm 8" in found
    assert "not within" not in found
    wrong = dataclasses.replace(checks[0].against_reference[1], used_tolerance=float("nan"))
    bad = dataclasses.replace(checks[0], against_reference=[wrong])
    results = [selfcheck.OfDtype("float32", [bad]), selfcheck.OfDtype("bfloat16", [], failure="RuntimeError: no bf16")]
    found = selfcheck_report.markdown(selfcheck_report.report_of(results, TINY))
    assert found.startswith("### selfcheck: FAILED\n")
    assert f"- float32, cpu, xla against cpu, xla: {wrong.name} differs by" in found
    assert "- bfloat16: RuntimeError: no bf16" in found


def test_a_dtype_that_the_device_cannot_compute_is_told_and_fails(monkeypatch):
    def cannot(*_):
        raise RuntimeError("UNIMPLEMENTED: bf16\nand more")

    monkeypatch.setattr(selfcheck, "check_systems", cannot)
    found = selfcheck.check_dtype(systems_to_check("bfloat16"), np.zeros(9), None)
    assert (found.passed, found.failure) == (False, "RuntimeError: UNIMPLEMENTED: bf16")
    assert list(selfcheck_report.text_lines(found, TINY)) == ["\nbfloat16: FAILED: RuntimeError: UNIMPLEMENTED: bf16"]


def test_the_plugins_operations_are_counted_in_the_step_that_it_compiled(checks, tmp_path, monkeypatch):
    """As jax-mps writes its programs: the longest is the step."""
    variable = "JAX_MPS_DUMP_OPTIMIZED_IR"
    monkeypatch.delenv(variable, raising=False)
    calls = "  %1 = stablehlo.custom_call @mps.gelu(%0)\n  %2 = stablehlo.custom_call @mps.gelu_bwd(%0, %1)\n"

    def compiles(*_):
        (folder / "module_0.mlir").write_text("stablehlo.custom_call @mps.softmax(%0)\n")
        (folder / "module_1.mlir").write_text(2 * calls)
        return checks

    monkeypatch.setattr(selfcheck, "check_systems", compiles)
    on_apple = selfcheck.System("jax-mps", jax.devices("cpu")[0], plan_of_kind("apple"))
    with selfcheck.compiled_programs(APPLE) as folder:
        assert os.environ[variable] == str(folder)
        assert selfcheck.recognised(folder) == {}
        (folder / "module_7.mlir").write_text(9 * calls)  # of the dtype before
        found = selfcheck.check_dtype([systems_to_check()[0], on_apple], np.zeros(9), folder)
    assert found.operations == {"mps.gelu": 2, "mps.gelu_bwd": 2}
    assert found.expected_operations["mps.layer_norm_bwd"] == 2 * TINY.num_layers + 1
    assert found.expected_operations["mps.addmm"] == 4 * TINY.num_layers
    assert any("mps.gelu 2 of 2" in line for line in selfcheck_report.text_lines(found, TINY))
    assert selfcheck.expected_operations(plan_of()) == {}
    assert variable not in os.environ


@pytest.mark.parametrize(("backend", "value"), [(CPU, ""), (APPLE, "a folder of the user's")])
def test_no_programs_are_read_where_there_are_none_or_others_too(backend, value, monkeypatch):
    monkeypatch.setenv("JAX_MPS_DUMP_OPTIMIZED_IR", value)
    with selfcheck.compiled_programs(backend) as folder:
        assert folder is None
    assert os.environ["JAX_MPS_DUMP_OPTIMIZED_IR"] == value


@pytest.mark.parametrize(
    ("learning_rate", "status", "last"),
    [("1e-3", 0, "all agree within tolerance"), ("float('nan')", 1, "FAILED: cpu, xla in float32; cpu, xla in bfloat16")],
)
def test_the_status_of_the_script_can_be_trusted(tmp_path, learning_rate, status, last):
    """With a smaller model on one system; a loss that is not a number agrees with nothing."""
    program = (
        "import dataclasses, os, runpy, sys; os.environ['JAX_PLATFORMS'] = 'cpu'; from gpt2_jax import selfcheck; "
        "small = dataclasses.replace(selfcheck.SMALL_MODEL, max_sequence_length=8, num_layers=1, num_heads=2, channels=16); "
        f"selfcheck.SMALL_MODEL, selfcheck.LEARNING_RATE, selfcheck.SAMPLE_TOKENS = small, {learning_rate}, 4; "
        "every = selfcheck.systems_to_check; selfcheck.systems_to_check = lambda *about: every(*about)[:1]; "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    script = str(REPOSITORY / "scripts" / "selfcheck.py")
    command = [sys.executable, "-c", program, script, "--backend", "cpu", "--output", str(tmp_path / "report.json")]
    home = tmp_path / "home" / "janedoe"
    home.mkdir(parents=True)
    names = {"HOME": str(home), "USER": "janedoe", "LOGNAME": "janedoe", "HOSTNAME": "janes-box"}
    flags = f"{os.environ['XLA_FLAGS']} --xla_dump_to={home}/janes-box"
    kept = {name: value for name, value in os.environ.items() if name not in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME")}
    environment = kept | names | {"XLA_FLAGS": flags}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert ended.returncode == status, ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1] == last
    text = (tmp_path / "report.json").read_text()
    assert json.loads(text)["passed"] == (status == 0)
    assert [each["dtype"] for each in json.loads(text)["dtypes"]] == ["float32", "bfloat16"]
    assert json.loads(text)["environment"]["XLA_FLAGS"].endswith(" --xla_dump_to=<path>")
    for private in (str(tmp_path), "home", *names.values()):
        assert private not in text
