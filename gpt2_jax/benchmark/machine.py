"""On what a bench ran: the machine, the threads that every library gets, the versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time

from gpt2_jax import custom_calls
from gpt2_jax.doctor import processor_name

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


def describe_machine() -> dict[str, str | int]:
    """CPU, its features that matter to matrix products, threads, system, versions of what is compared."""
    try:
        features = " ".join(custom_calls.description()["cpu_features"]["allowed"])
    except NotImplementedError:
        features = ""
    versions = ("jax", "jaxlib", "numpy", "torch")
    return {
        "cpu": processor_name(),
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
