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


def stat(folder, busy, idle):
    (folder / "proc").mkdir(exist_ok=True)
    (folder / "proc" / "stat").write_text(f"cpu  {busy} 0 0 {idle} 0 0 0 0 0 0\ncpu0 1 1 1 1\n")


def test_how_many_cpus_others_keep_busy(tmp_path, monkeypatch):
    stat(tmp_path, 1000, 9000)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(machine.time, "sleep", lambda seconds: stat(tmp_path, 1050, 9150))
    load = machine.measure_load(root=tmp_path)
    assert load.busy_cpus == pytest.approx(1.0)
    assert str(load).startswith("1.00 of 4 CPUs busy with other work")
    assert load.disturbs
    assert machine.load_lines(load, None, load)[-1].startswith("THE MACHINE WAS BUSY")


def test_a_system_that_does_not_tell_is_no_disturbance(tmp_path):
    load = machine.measure_load(0.0, tmp_path)
    assert load.busy_cpus is None
    assert not load.disturbs
    assert str(load).startswith("unknown of ")
    assert len(machine.load_lines(load, None, load)) == 3


@pytest.mark.parametrize(("seconds", "found"), [([2.0], "single"), ([2.0, 1.0, 3.0], "100%"), ([1.0, 1.0], "0%")])
def test_by_how_much_rounds_differ(seconds, found):
    assert machine.percent(machine.spread(seconds)) == found


def test_work_of_others_while_the_bench_works(tmp_path, monkeypatch):
    """All CPUs were busy for 8 s of 2 s, of which the bench and its children used 3 s."""
    ticks = os.sysconf("SC_CLK_TCK")
    times = iter([(1.0, 0.0, 1.0, 0.0, 0.0), (2.0, 1.0, 1.5, 0.5, 0.0)])
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(machine.os, "times", lambda: next(times))
    monkeypatch.setattr(machine.time, "monotonic", lambda: next(clock))
    stat(tmp_path, 100 * ticks, 100)
    work = machine.OthersWork(tmp_path)
    stat(tmp_path, 108 * ticks, 100)
    others = work.others()
    assert others == pytest.approx((8 - 3) / 2)
    quiet = machine.Load(0.0, 0.0)
    assert machine.load_lines(quiet, others, quiet)[1].startswith("load during: 2.50 of ")
    assert machine.load_lines(quiet, others, quiet)[-1].startswith("THE MACHINE WAS BUSY")


def test_a_system_that_does_not_tell_has_no_work_of_others(tmp_path):
    assert machine.OthersWork(tmp_path).others() is None


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [([2.0, 3.0], [1.0, 1.5], "2.00"), ([1.0, 3.0], [1.5, 1.6], "~2.00"), ([1.0, 1.1], [1.1, 9.0], "~2.00")],
)
def test_a_ratio_of_overlapping_rounds_is_marked(first, second, found):
    assert machine.ratio(4.0, 2.0, (first, second)) == found
    assert machine.ratio(4.0, 2.0, (second, first)) == found
