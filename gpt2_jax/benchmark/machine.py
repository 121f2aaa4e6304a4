"""On what a bench ran: the machine, the threads that every library gets, the versions."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import time
from pathlib import Path

from gpt2_jax.machine import processor_name
from gpt2_jax.ops.cpu import library as custom_calls
from gpt2_jax.sharing import anonymous

_STARTED = time.monotonic()
_THREAD_VARIABLES = (
    "NPROC",  # XLA and the custom calls
    "OMP_NUM_THREADS",  # PyTorch
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",  # numpy
    "VECLIB_MAXIMUM_THREADS",  # numpy on macOS
)


def seconds_running() -> float:
    """Since this module was imported, which a bench does first of all."""
    return time.monotonic() - _STARTED


def limit_threads() -> int:
    """Give every library of this process and its children the threads that XLA gets: the CPUs this process may run on,
    or NPROC if that is less. Call it before numpy or anything that imports it."""
    threads = custom_calls.num_threads()
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    return threads


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that could be had without swapping, of the machine and of this container; None where nobody tells, in the
    files that Linux has under `root`."""
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
    """The same for people."""
    features = f" ({machine['features']})" if machine["features"] else ""
    versions = ", ".join(f"{name} {machine[name]}" for name in ("jax", "numpy", "torch") if name in machine)
    return f"{machine['cpu']}{features}, {machine['threads']} thread(s), {machine['system']}; {versions}"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
