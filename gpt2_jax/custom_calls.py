"""The shared library of custom calls: found, loaded with ctypes, registered with XLA's CPU backend."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import gpt2_jax
from gpt2_jax import jax_compat

MATMUL_TARGET = "gpt2_jax_matmul"
_FILE_NAME = f"libgpt2_jax_custom_calls.{'dylib' if sys.platform == 'darwin' else 'so'}"


@cache
def load() -> ctypes.CDLL:
    """The library, with its targets registered. Raises NotImplementedError with the reason when it cannot be had."""
    # An editable install spreads the package over two folders: the sources, and what CMake built.
    candidates = [Path(folder) / "lib" / _FILE_NAME for folder in gpt2_jax.__path__]
    path = next((candidate for candidate in candidates if candidate.exists()), None)
    if path is None:
        raise NotImplementedError(
            f"{_FILE_NAME} was not built: it needs a C++ compiler when the package is installed (pip install -e .)"
        )
    try:
        library = ctypes.CDLL(str(path))
        handler = library.gpt2_jax_matmul
    except (OSError, AttributeError) as error:
        raise NotImplementedError(f"{path} cannot be loaded: {error}") from None
    ffi = jax_compat.ffi_module()
    ffi.register_ffi_target(MATMUL_TARGET, ffi.pycapsule(handler), platform="cpu")
    return library


@cache
def description() -> dict[str, Any]:
    """What the library is and can do on this machine; custom_calls/src/custom_calls.h has the keys."""
    describe = load().gpt2_jax_custom_calls_describe
    describe.restype = ctypes.c_char_p
    result: dict[str, Any] = json.loads(describe())
    return result


def num_threads() -> int:
    """Threads that a custom call may use: what XLA's own pool has, which NPROC sets and the process's CPUs bound."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    nproc = os.environ.get("NPROC", "")
    return min(available, int(nproc)) if nproc.isdigit() and int(nproc) > 0 else available
