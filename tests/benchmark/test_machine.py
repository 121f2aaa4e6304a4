"""The line that says on what a bench ran, and the threads that every library gets."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from gpt2_jax.benchmark import machine
from gpt2_jax.ops.cpu import library as custom_calls


def test_the_machine_names_cpu_threads_and_versions():
    found = machine.describe_machine()
    assert found["threads"] == custom_calls.num_threads()
    assert {"cpu", "features", "system", "jax", "numpy"} <= found.keys()
    line = machine.machine_line(found)
    assert f"{found['cpu']}" in line
    assert f"{found['threads']} thread(s)" in line
    assert f"jax {found['jax']}" in line


def test_a_machine_without_the_library_or_pytorch_is_described_too(monkeypatch):
    def missing():
        raise NotImplementedError("not built")

    monkeypatch.setattr(custom_calls, "description", missing)
    monkeypatch.setattr(machine, "_version", lambda name: None if name == "torch" else "1.0")
    found = machine.describe_machine()
    assert found["features"] == ""
    assert "torch" not in found
    assert "()" not in machine.machine_line(found)


@pytest.mark.torch
def test_all_libraries_get_the_same_threads():
    """In a process of its own: the settings are read when the libraries are imported."""
    program = (
        "from gpt2_jax.benchmark.machine import limit_threads; threads = limit_threads();"
        "import sys; assert 'numpy' not in sys.modules and 'jax' not in sys.modules;"
        "import os, torch; print(threads, torch.get_num_threads(), os.environ['OPENBLAS_NUM_THREADS'])"
    )
    environment = {**os.environ, "NPROC": "1"}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert ended.stdout.split() == ["1", "1", "1"], ended.stderr
