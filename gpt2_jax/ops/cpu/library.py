"""The shared library of custom calls: found, loaded with ctypes, registered with XLA's CPU backend."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gpt2_jax
from gpt2_jax import jax_compat
from gpt2_jax.cpu_quota import available_cpus, cpu_quota
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.names import nearest
from gpt2_jax.ops.table import Fallback

if TYPE_CHECKING:
    from gpt2_jax.compute.plan import Plan

# The library's XLA FFI handlers; custom_calls/src/custom_calls.h has their arguments.
MATMUL = "gpt2_jax_matmul"
MATMUL_BIAS = "gpt2_jax_matmul_bias"
MATMUL_INTO = "gpt2_jax_matmul_into"
WRITE_INTO = "gpt2_jax_write_into"
ADD_ROWS_INTO = "gpt2_jax_add_rows_into"
BARRIER = "gpt2_jax_barrier"
SUMS_OF_SQUARES = "gpt2_jax_sums_of_squares"
ATTENTION = "gpt2_jax_attention"
ATTENTION_BACKWARD = "gpt2_jax_attention_backward"
CACHED_ATTENTION = "gpt2_jax_cached_attention"
LAYER_NORM = "gpt2_jax_layer_norm"
LAYER_NORM_BACKWARD = "gpt2_jax_layer_norm_backward"
GELU = "gpt2_jax_gelu"
GELU_BACKWARD = "gpt2_jax_gelu_backward"
SOFTMAX_CROSS_ENTROPY = "gpt2_jax_softmax_cross_entropy"
COLUMN_SUMS = "gpt2_jax_column_sums"
ADAMW = "gpt2_jax_adamw"
_TARGETS = (
    *(MATMUL, MATMUL_BIAS, MATMUL_INTO, WRITE_INTO, ADD_ROWS_INTO, BARRIER),
    *(ATTENTION, ATTENTION_BACKWARD, CACHED_ATTENTION),
    *(LAYER_NORM, LAYER_NORM_BACKWARD, GELU, GELU_BACKWARD, SOFTMAX_CROSS_ENTROPY, COLUMN_SUMS),
    *(SUMS_OF_SQUARES, ADAMW),
)
INTERFACE = 1  # GPT2_JAX_INTERFACE of custom_calls/src/custom_calls.h
_SUFFIX = "dylib" if sys.platform == "darwin" else "so"
_FILE_NAME = f"libgpt2_jax_custom_calls.{_SUFFIX}"
_ACCELERATE = "/System/Library/Frameworks/Accelerate.framework/Accelerate"


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
        _check_interface(library, path)
        handlers = {target: getattr(library, target) for target in _TARGETS}
        use_openblas = library.gpt2_jax_use_openblas
    except (OSError, AttributeError) as error:
        raise NotImplementedError(f"{path} cannot be loaded: {error}") from None
    openblas = openblas_library()
    if openblas is not None:
        use_openblas(os.fsencode(openblas))
    ffi = jax_compat.ffi_module()
    for target, handler in handlers.items():
        ffi.register_ffi_target(target, ffi.pycapsule(handler), platform="cpu")
    return library


def _check_interface(library: ctypes.CDLL, path: Path) -> None:
    """Refuse a library that an earlier build left behind: its handlers may take other arguments, or mean other things."""
    found = library.gpt2_jax_custom_calls_interface() if hasattr(library, "gpt2_jax_custom_calls_interface") else "none"
    if found != INTERFACE:
        raise NotImplementedError(
            f"{path} is of another version: expected interface {INTERFACE}, found {found} (pip install -e . builds it anew)"
        )


def openblas_library() -> Path | None:
    """The shared library in the package scipy-openblas32, found without importing it; None when it is not installed."""
    spec = importlib.util.find_spec("scipy_openblas32")
    folders = spec.submodule_search_locations if spec is not None else None
    return next((path for folder in folders or () for path in Path(folder).glob(f"lib/libscipy_openblas*.{_SUFFIX}")), None)


@cache
def description() -> dict[str, Any]:
    """The library's own description of itself and of this machine; custom_calls/src/custom_calls.h has the keys."""
    describe = load().gpt2_jax_custom_calls_describe
    describe.restype = ctypes.c_char_p
    result: dict[str, Any] = json.loads(describe())
    return result


def rates() -> dict[str, float] | None:
    """What this machine can do at most with the threads that a custom call may use, measured in about a second.

    GFLOP/s of the fastest kernel in "F32_F32_F32" and "BF16_BF16_F32", and GB/s of "memory", read and written together. None
    where the library cannot be had, or memory or threads are lacking.
    """
    try:
        measure = load().gpt2_jax_custom_calls_rates
    except NotImplementedError:
        return None
    measure.argtypes, measure.restype = [ctypes.c_int], ctypes.c_char_p
    text = measure(num_threads())
    return None if text is None else json.loads(text)


def check_features() -> None:
    """Gpt2JaxError when GPT2_JAX_CPU_FEATURES names a feature that the library does not know; it would go without."""
    try:
        features = description()["cpu_features"]
    except NotImplementedError:
        return
    if unknown := features["unknown"]:
        meant = dict.fromkeys(
            name for typed in features["mask"].split(",") for name in nearest(typed.strip(), features["seen"])
        )
        instead = f"GPT2_JAX_CPU_FEATURES={','.join(meant)}   (or unset GPT2_JAX_CPU_FEATURES)"
        raise Gpt2JaxError(
            f"GPT2_JAX_CPU_FEATURES: expected none, or some of {', '.join(features['seen'])}, found {', '.join(unknown)}",
            instead if meant else "unset GPT2_JAX_CPU_FEATURES",
        )


def implementation(name: str) -> dict[str, Any]:
    """Whether a custom call is available here, why not, and in which precisions it multiplies float32.

    NotImplementedError with the reason where the library cannot be had; one implementation is then served by `ctypes_blas`.
    """
    try:
        rows = description()["implementations"]
    except NotImplementedError:
        if name != _name_for_ctypes():
            raise
        return {"name": name, "available": True, "reason": "", "precisions": ["F32_F32_F32"]}
    return next(row for row in rows if row["name"] == name)


def refusal(plan: Plan) -> str | None:
    """Why the library does not run attention, LayerNorm, GELU, the loss and AdamW of this plan; None when it does."""
    if "custom_calls" in plan.backend.lacks:
        return f"custom calls run on the CPU, not on {plan.backend.name}"
    if plan.linear.name == "xla":
        return "XLA makes the matrix products"
    try:
        description()
    except NotImplementedError as error:
        return Fallback(str(error))
    return None


def serves(plan: Plan) -> bool:
    """True when the library also runs attention, LayerNorm, GELU, the loss and AdamW."""
    return refusal(plan) is None


def is_built() -> bool:
    """Whether the library can be had."""
    try:
        description()
    except NotImplementedError:
        return False
    return True


def load_products() -> None:
    """Register MATMUL and MATMUL_BIAS: the library's or, where it cannot be had, those of `ctypes_blas`."""
    if is_built() or _name_for_ctypes() is None:
        load()
    else:
        _register_ctypes_products(MATMUL, MATMUL_BIAS)


def _name_for_ctypes() -> str | None:
    if sys.platform == "darwin":
        return "accelerate"
    return None if openblas_library() is None else "openblas"


@cache
def _register_ctypes_products(*targets: str) -> Any:
    """The handler, which must live as long as the process: the cache keeps it."""
    from gpt2_jax.ops.cpu import ctypes_blas  # numpy comes with it, and benches set its threads before

    if sys.platform == "darwin":
        sgemm = ctypes_blas.load_sgemm(_ACCELERATE, "cblas_sgemm$NEWLAPACK", "cblas_sgemm")
    else:
        sgemm = ctypes_blas.load_sgemm(str(openblas_library()), "scipy_cblas_sgemm")
    handler = ctypes_blas.matmul_handler(sgemm)
    ffi = jax_compat.ffi_module()
    for target in targets:
        ffi.register_ffi_target(target, ffi.pycapsule(handler), platform="cpu")
    return handler


def call(target: str, result: Any, *operands: Any, aliases: dict[int, int] | None = None, **attributes: Any) -> Any:
    """Call a handler of the library with all threads that it may use; `result` is its shape, or a tuple of shapes."""
    import numpy as np  # here, since benches set the threads of numpy's libraries before it is imported

    load()
    threads = np.int64(num_threads())
    return jax_compat.ffi_call(target, result, *operands, aliases=aliases, num_threads=threads, **attributes)


def num_threads() -> int:
    """Threads that a custom call may use: NPROC, else what a container's CPU quota allows. The process's CPUs bound both."""
    available = available_cpus()
    nproc = os.environ.get("NPROC", "")
    if nproc.isdigit() and int(nproc) > 0:
        return min(available, int(nproc))
    return min(available, cpu_quota() or available)
