"""The machine that this process runs on: its names, and the process's own memory."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14  # sys/mman.h


def processor_name() -> str:
    """The CPU as its maker calls it."""
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def system_name() -> str:
    """The operating system and its version."""
    return f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else f"{platform.system()} {platform.release()}"


def available_cpus() -> int:
    """How many of the CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_peak() -> int:
    """The most memory that this process has had resident, in bytes (its libraries included)."""
    if sys.platform == "win32":
        return _windows_peak()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, kibibytes on Linux


class _ProcessMemoryCounters(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS of Windows' psapi.h; sizes in bytes."""

    _fields_ = (
        ("cb", ctypes.c_uint32),
        ("page_fault_count", ctypes.c_uint32),
        ("peak_working_set_size", ctypes.c_size_t),
        ("working_set_size", ctypes.c_size_t),
        ("quota_peak_paged_pool_usage", ctypes.c_size_t),
        ("quota_paged_pool_usage", ctypes.c_size_t),
        ("quota_peak_non_paged_pool_usage", ctypes.c_size_t),
        ("quota_non_paged_pool_usage", ctypes.c_size_t),
        ("pagefile_usage", ctypes.c_size_t),
        ("peak_pagefile_usage", ctypes.c_size_t),
    )


def _windows_peak() -> int:
    """Windows' peak working set of this process, in bytes; 0 where Windows does not tell."""
    kernel32 = ctypes.windll.kernel32  # type: ignore[attr-defined]
    kernel32.GetCurrentProcess.restype = ctypes.c_void_p
    kernel32.K32GetProcessMemoryInfo.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32)
    counters = _ProcessMemoryCounters(cb=ctypes.sizeof(_ProcessMemoryCounters))
    told = kernel32.K32GetProcessMemoryInfo(kernel32.GetCurrentProcess(), ctypes.byref(counters), counters.cb)
    return int(counters.peak_working_set_size) if told else 0


def process_lives(process: int) -> bool:
    """Whether a process of this id runs on this machine, anybody's."""
    if sys.platform == "win32":
        return _windows_process_lives(process)
    try:
        os.kill(process, 0)
    except PermissionError:  # another user's
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _windows_process_lives(process: int) -> bool:
    """The same on Windows, where os.kill would end the process."""
    synchronize, wait_timeout = 0x100000, 0x102
    kernel32 = ctypes.windll.kernel32  # type: ignore[attr-defined]
    kernel32.OpenProcess.restype = ctypes.c_void_p
    handle = ctypes.c_void_p(kernel32.OpenProcess(synchronize, False, process))
    if not handle:
        return False
    try:
        return bool(kernel32.WaitForSingleObject(handle, 0) == wait_timeout)
    finally:
        kernel32.CloseHandle(handle)


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the next step, where it can (glibc); before XLA starts its threads.

    XLA frees a step's temporary memory and takes it anew: without this every page of it is mapped and zeroed again in
    every step. The pages may be huge ones. False where nothing was changed.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    mallopt = getattr(libc, "mallopt", None)
    if libc is None or mallopt is None:
        return False
    # malloc.h's M_ARENA_MAX, M_MMAP_MAX and M_TRIM_THRESHOLD: one heap for all threads, also for large blocks, never cut.
    if not all(mallopt(option, value) for option, value in ((-8, 1), (-4, 0), (-1, -1))):
        return False
    _ask_for_huge_pages(libc)
    return True


def give_memory_back() -> None:
    """Give the pages of freed memory back to the kernel, where the C library can (glibc), also those that
    keep_freed_memory has it keep."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if malloc_trim is not None:
        malloc_trim(0)


def _ask_for_huge_pages(libc: ctypes.CDLL) -> None:
    """Grow the heap by half of the machine's memory, of addresses alone, that the kernel may back by pages of 2 MiB.

    A step reads and writes its buffers from end to end: with pages of 4 KiB it waits for their addresses. Where the
    kernel has none to give, or counts addresses as if they were memory, all is as it was.
    """
    import resource

    limits = [resource.getrlimit(limit)[0] for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    try:
        counts_addresses = Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2"
    except OSError:
        counts_addresses = False
    if counts_addresses or any(limit != resource.RLIM_INFINITY for limit in limits):
        return
    libc.malloc.restype = ctypes.c_void_p
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    block = libc.malloc(ctypes.c_size_t(size))
    if block is None:
        return
    start = -(-block // _HUGE_PAGE) * _HUGE_PAGE
    libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t((block + size - start) // _HUGE_PAGE * _HUGE_PAGE), _MADV_HUGEPAGE)
    libc.free(ctypes.c_void_p(block))


def gigabytes(size: int) -> str:
    """A number of bytes as people read it: '2.26 GB', of 10^9 bytes each."""
    return f"{size / 1e9:.2f} GB"
