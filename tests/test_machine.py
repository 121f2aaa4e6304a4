"""The machine: memory of this process, measured and kept; and what Windows lacks is not asked for there."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from gpt2_jax import machine
from tests.conftest import REPOSITORY


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_is_kept_for_the_next_step():
    """In a process of its own: the 100 MB that a step needs stay resident, and the next steps touch no new page."""
    program = """
import os, resource
from gpt2_jax.machine import keep_freed_memory
assert keep_freed_memory()
import jax, jax.numpy as jnp
step = jax.jit(lambda x: jax.lax.optimization_barrier(jnp.broadcast_to(x, (5000, 5000)) + x).sum())
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(jnp.arange(5000, dtype=jnp.float32)).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = resident()
print(*(new_pages() for _ in range(12)), resident() - before)
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    *new_pages, kept = [int(number) for number in ended.stdout.split()]
    assert kept >= 90_000_000, (kept, ended.stderr)
    assert min(new_pages[2:]) < 1_000, new_pages  # with the machine busy some blocks may lie badly at first


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
@pytest.mark.skipif(not os.path.exists("/sys/kernel/mm/transparent_hugepage"), reason="this kernel has no huge pages")
def test_large_blocks_are_asked_for_in_huge_pages():
    """In a process of its own: of the mapping that a block of 100 MB lies in, the kernel notes the advice (hg)."""
    program = """
import ctypes
from gpt2_jax.machine import keep_freed_memory
assert keep_freed_memory()
block = bytearray(100_000_000)
address = ctypes.addressof(ctypes.c_char.from_buffer(block)) + len(block) // 2
for line in open("/proc/self/smaps"):
    words = line.split()
    if words[0] == "VmFlags:":
        if inside:
            print(*words)
    elif not words[0].endswith(":"):
        first, last = (int(bound, 16) for bound in words[0].split("-"))
        inside = first <= address < last
"""
    limited = "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 45, 1 << 45))"
    for before, asked in (("", True), (limited, False)):  # where addresses are limited none are taken in advance
        command = [sys.executable, "-c", before + program]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stderr
        assert ("hg" in ended.stdout.split()) == asked, ended.stdout


def test_the_peak_of_the_process_rises_with_what_it_holds():
    before = machine.process_peak()
    held = np.ones(before // 8 + 25_000_000)
    assert machine.process_peak() >= before + 100_000_000 > 100_000_000
    assert held[-1] == 1.0


@pytest.mark.parametrize("told", [True, False])
def test_the_peak_on_windows_is_the_peak_working_set(monkeypatch, told):
    """Windows is imitated: psapi.h's structure is filled by its offsets on a 64-bit system."""

    def current_process():
        return 7

    def process_memory_info(process, counters, size):
        assert (process, size) == (7, 72)
        content = (ctypes.c_uint64 * 9).from_address(ctypes.addressof(counters._obj))
        assert content[0] & 0xFFFFFFFF == 72
        content[1], content[2] = 123_456_789, 5
        return told

    kernel32 = SimpleNamespace(GetCurrentProcess=current_process, K32GetProcessMemoryInfo=process_memory_info)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel32), raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    assert machine.process_peak() == (123_456_789 if told else 0)


def test_every_module_can_be_imported_without_what_only_posix_has():
    """In a process of its own, in which those modules are missing to ours alone."""
    program = """
import builtins, importlib, pkgutil
import gpt2_jax
original = builtins.__import__
missing = {"fcntl", "grp", "posix", "pwd", "resource", "syslog", "termios"}
def lacking(name, globals=None, locals=None, fromlist=(), level=0):
    if name in missing and (globals or {}).get("__name__", "").startswith("gpt2_jax"):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return original(name, globals, locals, fromlist, level)
builtins.__import__ = lacking
imported = 0
for module in pkgutil.walk_packages(gpt2_jax.__path__, "gpt2_jax."):
    try:
        importlib.import_module(module.name)
        imported += 1
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
print(imported)
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > 50


def test_a_process_lives_until_it_has_ended():
    assert machine.process_lives(os.getpid())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert machine.process_lives(process.pid)
    assert not machine.process_lives(process.pid)
    assert not machine.process_lives(10**18)


@pytest.mark.parametrize(("handle", "waited", "lives"), [(8, 0x102, True), (8, 0, False), (0, 0x102, False)])
def test_windows_is_asked_by_a_handle_and_no_signal(monkeypatch, handle, waited, lives):
    closed = []

    def open_process(access, inherits, process):
        assert (access, inherits, process) == (0x100000, False, 77)
        return handle

    kernel32 = SimpleNamespace(
        OpenProcess=open_process,
        WaitForSingleObject=lambda handle, milliseconds: waited,
        CloseHandle=lambda handle: closed.append(handle.value),
    )
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel32), raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    assert machine.process_lives(77) == lives
    assert closed == ([8] if handle else [])
