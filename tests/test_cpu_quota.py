"""The CPU quota of control groups, read from files as Linux writes them."""

from __future__ import annotations

import os

import pytest

from gpt2_jax.compute import backend
from gpt2_jax.cpu_quota import cpu_quota
from gpt2_jax.ops.cpu import library


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


V1 = "5:cpuset:/\n4:cpu,cpuacct:/docker/1f\n1:name=systemd:/docker/1f"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/"}, None),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, None),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "200000 100000"}, 2),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "150000 100000"}, 2),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "10000 100000"}, 1),
        # the outer group allows less than the inner one
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/b/cpu.max": "800000 100000",
                "sys/fs/cgroup/a/cpu.max": "300000 100000",
            },
            3,
        ),
        # version 1: no limit is -1; the path is the host's and not to be seen from inside
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            None,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            4,
        ),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "what is this"}, None),
    ],
)
def test_quota(tmp_path, files, quota):
    write(tmp_path, files)
    assert cpu_quota(tmp_path) == quota


def test_threads_respect_the_quota_unless_nproc_says_otherwise(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(library, "cpu_quota", lambda: 3)
    monkeypatch.delenv("NPROC", raising=False)
    assert library.num_threads() == 3
    monkeypatch.setenv("NPROC", "5")
    assert library.num_threads() == 5
    monkeypatch.setattr(library, "cpu_quota", lambda: None)
    monkeypatch.delenv("NPROC")
    assert library.num_threads() == 8


def test_xla_and_the_custom_calls_get_the_threads_of_the_quota_and_it_is_said(monkeypatch):
    """XLA reads NPROC when it starts, so it is set with the backend; a user's own number stays."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    # In the record only: the process of the tests keeps its own environment.
    monkeypatch.delenv("NPROC", raising=False)
    monkeypatch.setattr(backend, "cpu_quota", lambda: 3)
    chosen = backend._cpu()
    assert ("NPROC", "3") in chosen.environment
    assert "3 threads, as the container's CPU quota allows no more" in chosen.reason
    monkeypatch.setenv("NPROC", "8")
    assert "NPROC" not in dict(backend._cpu().environment)
    monkeypatch.delenv("NPROC")
    monkeypatch.setattr(backend, "cpu_quota", lambda: 8)
    assert "quota" not in backend._cpu().reason
