"""On what a bench ran: the machine, the threads that every library gets, the versions."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt2_jax.machine import processor_name
from gpt2_jax.ops.cpu import library as custom_calls
from gpt2_jax.sharing import anonymous

_STARTED = time.monotonic()
_QUIET_CPUS = 0.1  # If others keep more of them busy, the figures show it.
_THREAD_VARIABLES = (
    "NPROC",  # XLA and the custom calls
    "OMP_NUM_THREADS",  # PyTorch
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",  # numpy
    "VECLIB_MAXIMUM_THREADS",  # numpy on macOS
)


def seconds_running() -> float:
    """Seconds since this module was imported; a bench imports it first of all."""
    return time.monotonic() - _STARTED


def limit_threads() -> int:
    """Give every library of this process and its children the threads that XLA gets: the CPUs this process may run on,
    or NPROC if that is less. Call it before numpy or anything that imports it."""
    threads = custom_calls.num_threads()
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    return threads


def free_of_vm_stat(text: str) -> int | None:
    """Bytes that macOS's vm_stat calls free or inactive; None for a text that is not vm_stat's."""
    size = re.search(r"page size of (\d+) bytes", text)
    pages = re.findall(r"^Pages (?:free|inactive): +(\d+)\.$", text, re.MULTILINE)
    return int(size[1]) * sum(map(int, pages)) if size and len(pages) == 2 else None


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still get without swapping: the less of what the machine and this container have free.

    Read from Linux's files under `root`, or on macOS from vm_stat: pages that are free or were not used for a while. None on
    other systems.
    """
    if sys.platform == "darwin":
        try:
            return free_of_vm_stat(subprocess.run(["vm_stat"], capture_output=True, text=True, check=True).stdout)
        except (OSError, subprocess.SubprocessError):
            return None
    try:
        lines = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
        free = [1024 * int(lines["MemAvailable"].removesuffix("kB"))]
    except (OSError, KeyError):
        return None
    for folder, limit, used in (
        ("", "memory.max", "memory.current"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        group = root / "sys/fs/cgroup" / folder
        with contextlib.suppress(OSError, ValueError, KeyError):
            cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["inactive_file"]
            free.append(int((group / limit).read_text()) - int((group / used).read_text()) + int(cached))
    return min(free)


@dataclass(frozen=True)
class Load:
    """The work of others on this machine, measured while the bench waits."""

    busy_cpus: float | None  # how many CPUs others keep busy; None where nobody tells
    average: float | None  # runnable processes, over the last minute

    def __str__(self) -> str:
        busy = "unknown" if self.busy_cpus is None else f"{self.busy_cpus:.2f}"
        average = "" if self.average is None else f", load average {self.average:.2f}"
        return f"{busy} of {os.cpu_count()} CPUs busy with other work{average}"

    @property
    def disturbs(self) -> bool:
        return self.busy_cpus is not None and self.busy_cpus > _QUIET_CPUS


def measure_load(seconds: float = 0.5, root: Path = Path("/")) -> Load:
    """Look at the machine for so long, in which the caller does nothing."""
    before = _busy_and_all(root)
    time.sleep(seconds)
    after = _busy_and_all(root)
    busy = None
    if before is not None and after is not None and after[1] > before[1]:
        busy = (after[0] - before[0]) / (after[1] - before[1]) * (os.cpu_count() or 1)
    return Load(busy, os.getloadavg()[0] if hasattr(os, "getloadavg") else None)


class OthersWork:
    """The work of others while the bench itself works: counted from when this is made."""

    def __init__(self, root: Path = Path("/")):
        self._root = root
        self._start = self._now()

    def _now(self) -> tuple[float, float, float] | None:
        """CPU seconds of everybody, those of this process and of its children that have ended, and the time."""
        ticks = _busy_and_all(self._root)
        own = sum(os.times()[:4])
        return None if ticks is None else (ticks[0] / os.sysconf("SC_CLK_TCK"), own, time.monotonic())

    def others(self) -> float | None:
        """How many CPUs others kept busy on average; None where nobody tells."""
        start, end = self._start, self._now()
        if start is None or end is None or end[2] <= start[2]:
            return None
        everybody, own, seconds = (later - earlier for later, earlier in zip(end, start, strict=True))
        return max(0.0, (everybody - own) / seconds)


def load_lines(before: Load, others: float | None, after: Load) -> list[str]:
    """The loads before and after a bench, and the CPUs that others kept busy during it, for the lines below its table."""
    during = "unknown" if others is None else f"{others:.2f}"
    lines = [
        f"load before: {before}",
        f"load during: {during} of {os.cpu_count()} CPUs busy with other work, on average",
        f"load after:  {after}",
    ]
    if before.disturbs or after.disturbs or Load(others, None).disturbs:
        lines.append("THE MACHINE WAS BUSY WITH OTHER WORK: these figures are no measure of the implementations.")
    return lines


def spread(seconds: Sequence[float]) -> float | None:
    """(longest - shortest) / median of the rounds' seconds; None for a single round."""
    return None if len(seconds) < 2 else (max(seconds) - min(seconds)) / statistics.median(seconds)


def ratio(dividend: float, divisor: float, ranges: tuple[Sequence[float], Sequence[float]]) -> str:
    """The ratio of two medians, '~' before it when the ranges of their rounds overlap: either may be the larger."""
    first, second = ranges
    overlap = min(first) <= max(second) and min(second) <= max(first)
    return f"{'~' if overlap else ''}{dividend / divisor:.2f}"


def percent(share: float | None) -> str:
    return "single" if share is None else f"{share:.0%}"


def _busy_and_all(root: Path) -> tuple[int, int] | None:
    """Ticks of all CPUs together that were not idle, and all ticks, as Linux counts them."""
    try:
        ticks = [int(tick) for tick in (root / "proc/stat").read_text().splitlines()[0].split()[1:9]]
    except (OSError, ValueError, IndexError):
        return None
    idle = ticks[3] + ticks[4]  # the second waits for a disk
    return sum(ticks) - idle, sum(ticks)


def describe_machine() -> dict[str, str | int]:
    """CPU, its features that matter to matrix products, threads, system, versions of what is compared."""
    try:
        features = " ".join(custom_calls.description()["cpu_features"]["allowed"])
    except NotImplementedError:
        features = ""
    versions = ("jax", "jaxlib", "numpy", "torch")
    return {
        "cpu": anonymous(processor_name()),
        "features": features,
        "threads": custom_calls.num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        **{name: version for name in versions if (version := _version(name)) is not None},
    }


def machine_line(machine: dict[str, str | int]) -> str:
    """The description in one line, for people."""
    features = f" ({machine['features']})" if machine["features"] else ""
    versions = ", ".join(f"{name} {machine[name]}" for name in ("jax", "numpy", "torch") if name in machine)
    return f"{machine['cpu']}{features}, {machine['threads']} thread(s), {machine['system']}; {versions}"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_rates_lines(rates: dict[str, float]) -> list[str]:
    """What the CPU can do at most, as `library.rates` measured it in this run."""
    products = ", ".join(f"{rates[precision]:,.0f} in {precision}" for precision in ("F32_F32_F32", "BF16_BF16_F32"))
    return [
        f"peak of this CPU: {products} GFLOP/s by its fastest kernel on operands in L1, with the threads of a custom call;",
        f"  memory: {rates['memory']:.1f} GB/s read and written together. Measured in this run, over CPU time.",
    ]
