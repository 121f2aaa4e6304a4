"""What the doctor finds on machines, imitated, that something is wrong with."""

from __future__ import annotations

import re
import subprocess

import pytest

from gpt2_jax import doctor
from gpt2_jax.compute import metal_plugins
from gpt2_jax.ops.cpu import library

MAC = {"system": "darwin", "processor": "arm64", "macos": "15.3"}


@pytest.fixture
def patient(machine, monkeypatch):
    """As `machine`; devices open without a process of their own, and the CPU has a name."""

    def pretend(**machine_is):
        machine(**machine_is)
        monkeypatch.setattr(doctor, "version_text", metal_plugins.version_text)
        monkeypatch.setattr(doctor, "has_nvidia_driver", lambda: machine_is.get("nvidia", False))
        monkeypatch.setattr(doctor, "processor_name", lambda: "Test chip")
        monkeypatch.setattr(doctor, "open_in_a_process", lambda name: (True, f"{name} opened"))

    for name in doctor.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return pretend


def findings():
    """The report, the first finding of each subject."""
    found = {}
    for finding in doctor.examine():
        found.setdefault(finding.subject, finding)
    return found


def test_a_machine_with_nothing_wrong_has_nothing_to_do(patient):
    patient(jax="0.10.2")
    found = findings()
    assert [finding for finding in found.values() if finding.broken or finding.remedy] == []
    assert "Test chip" in found["machine"].found
    assert "jax 0.10.2" in found["packages"].found
    assert re.match(r"\w+ in .+: .+", found["matmul, CPU"].found)
    assert found["device, cpu"].found == "cpu opened"


def test_versions_that_do_not_fit_are_broken_and_the_pair_is_named(patient):
    patient(**MAC, jax_metal="0.1.1", jax="0.10.2")
    found = findings()
    assert found["Apple GPU"].broken
    assert "0.4.34 to 0.5.0" in found["Apple GPU"].found
    assert found["Apple GPU"].remedy == "pip install -e '.[metal]'"
    assert "takes cpu" in found["auto"].found


def test_a_mac_without_a_plugin_is_advised_and_not_broken(patient):
    patient(**MAC, jax="0.10.2")
    found = findings()
    assert (found["Apple GPU"].broken, "pip install" in found["Apple GPU"].remedy) == (False, True)


def test_a_mac_with_a_plugin_that_fits(patient):
    patient(**MAC, jax_mps="0.11.1", jax="0.11.2")
    found = findings()
    assert found["Apple GPU"].found == "jax-mps 0.11.1 on its platform 'mps'"
    assert found["device, metal"].found == "metal opened"


def test_jax_metallib_is_advised_against(patient):
    patient(**MAC, jax_metallib="0.10.1.0", jax="0.10.2")
    assert any("float16" in finding.found and "pip uninstall" in finding.remedy for finding in doctor.examine())


def test_an_nvidia_gpu_without_its_plugin(patient):
    patient(nvidia=True, jax="0.10.2")
    assert findings()["NVIDIA GPU"].remedy == "pip install -e '.[cuda]'"


@pytest.mark.parametrize("jax", ["0.10.0", "0.10.1", "0.4.33", "0.13.0"])
def test_harmful_and_unsupported_versions_of_jax_are_broken(patient, jax):
    patient(jax=jax)
    assert findings()["jax"].broken
    assert f"found jax {jax}" in findings()["jax"].found


@pytest.mark.parametrize(
    ("name", "value", "broken"),
    [
        ("JAX_ENABLE_X64", "1", True),
        ("JAX_ENABLE_X64", "0", False),
        ("JAX_DISABLE_JIT", "True", True),
        ("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=3", True),
        ("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=", False),
        ("MLX_ENABLE_TF32", "0", False),
    ],
)
def test_environment_variables_are_shown_and_harmful_ones_named(patient, monkeypatch, name, value, broken):
    patient(jax="0.10.2")
    monkeypatch.setenv(name, value)
    of_name = [finding for finding in doctor.examine() if finding.subject == name]
    assert value in of_name[0].found
    assert any(finding.broken for finding in of_name) == broken


def test_a_plan_that_cannot_be_made_is_broken_and_the_rest_is_told(patient, monkeypatch):
    patient(jax="0.10.2")
    monkeypatch.setenv("GPT2_JAX_DISABLE", "nobody")
    found = findings()
    assert found["plan"].broken
    assert found["plan"].remedy == "unset GPT2_JAX_DISABLE"
    assert found["device, cpu"].found == "cpu opened"


def test_a_library_that_was_not_built_is_said_as_a_fallback(patient, monkeypatch):
    def not_built():
        raise NotImplementedError("the library was not built")

    patient(jax="0.10.2")
    monkeypatch.setattr(library, "description", not_built)
    assert "the library was not built" in findings()["fallback"].found


def test_a_device_that_ends_the_process_is_reported(monkeypatch):
    def ended(command, **options):
        return subprocess.CompletedProcess(command, -6, stdout="", stderr="jax starts\nAborted (core dumped)\n")

    monkeypatch.setattr(subprocess, "run", ended)
    assert doctor.open_in_a_process("metal") == (False, "Aborted (core dumped)")

    def hangs(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hangs)
    assert doctor.open_in_a_process("metal") == (False, "did not open in 180 s")


def test_what_the_plugin_makes_one_operation_and_what_bfloat16_is_there(patient, monkeypatch):
    patient(**MAC, jax_mps="0.11.1", jax="0.11.2")
    monkeypatch.setenv("JAX_MPS_NO_OPTIMIZE", "1")
    every = [(finding.subject.strip(), finding.found) for finding in doctor.examine()]
    assert ("one operation", "attention, GELU, LayerNorm, a product and its bias") in every
    assert any(subject == "bfloat16" and "rounded to bfloat16 once" in found for subject, found in every)
    read = [found for subject, found in every if subject == "reads"]
    assert "JAX_MPS_NO_OPTIMIZE=1; 1: nothing is recognised by form" in read
    assert any(found.startswith("JAX_MPS_CACHE_LIMIT_BYTES=bound of the memory") for found in read)
    assert "table" not in dict(every)


def test_a_plugin_that_is_newer_than_the_table_of_its_operations(patient, monkeypatch):
    patient(**MAC, jax_mps="0.11.1", jax="0.11.2")
    monkeypatch.setattr(metal_plugins, "table_of", lambda name: {"plugin": f"{name} 0.11.0"})
    table = findings()["  table"]
    assert "jax-mps 0.11.1 is newer than the table of its operations, of 0.11.0" in table.found
    assert "selfcheck" in table.remedy
