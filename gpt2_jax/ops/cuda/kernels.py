"""Kernels of our own for NVIDIA GPUs: CUDA C++ that NVRTC compiles for the model's sizes and this machine's GPU.

NVRTC is a part of every installation of jax for CUDA, so neither a toolkit nor a compiler is needed. The library of
custom calls launches the kernels on XLA's stream.
"""

from __future__ import annotations

import ctypes
import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from gpt2_jax import jax_compat
from gpt2_jax.ops.cpu import library
from gpt2_jax.ops.cuda import libraries
from gpt2_jax.ops.table import Fallback
from gpt2_jax.ops.threaded import WeightView

if TYPE_CHECKING:
    from gpt2_jax.compute.plan import Plan

_SOURCE = Path(__file__).with_name("kernels.cu")
_TARGET = "gpt2_jax_cuda_launch"


def refusal(plan: Plan) -> str | None:
    """Why the kernels cannot serve this plan; None when they can."""
    try:
        if reason := libraries.refusal(plan):
            return reason
        if not jax_compat.ffi_call_can_alias():
            return Fallback("this jax cannot alias a custom call's argument and result")
        _nvrtc()
        _load_function()
    except NotImplementedError as error:
        return Fallback(str(error))
    return None


def call(
    kernel: str,
    result: Any,
    *operands: jax.Array | WeightView,
    constants: dict[str, str | int | float],
    blocks: int,
    threads: int,
    shared_bytes: int = 0,
    aliases: dict[int, int] | None = None,
) -> Any:
    """Launch a kernel of kernels.cu, compiled with these constants and THREADS; `result` is its shape, or a tuple of them.

    Its parameters are the addresses of the operands, then those of the results; a view's is that of its place in the buffer,
    also where the buffer is written over as a result (`aliases`: operand -> result).
    """
    constants = {**constants, "THREADS": threads}
    name = _loaded(kernel, tuple(sorted((key, str(value)) for key, value in constants.items())))
    buffers, offsets = zip(*map(_placed, operands), strict=True)
    of_results = [0] * (len(result) if isinstance(result, tuple) else 1)
    for operand, number in (aliases or {}).items():
        of_results[number] = offsets[operand]
    attributes = {"blocks": np.int64(blocks), "threads": np.int64(threads), "shared_bytes": np.int64(shared_bytes)}
    places = np.array([*offsets, *of_results], dtype=np.int64)
    return jax_compat.ffi_call(_TARGET, result, *buffers, aliases=aliases, kernel=name, offsets=places, **attributes)


def _placed(operand: jax.Array | WeightView) -> tuple[jax.Array, int]:
    """The buffer that holds an operand, and the byte that it begins at."""
    if isinstance(operand, WeightView):
        return operand.buffer, operand.offset * operand.buffer.dtype.itemsize
    return operand, 0


@cache
def _loaded(kernel: str, constants: tuple[tuple[str, str], ...]) -> str:
    """The name by which the library knows the compiled kernel: the same in every process, as compiled programs keep it."""
    source = _SOURCE.read_bytes()
    architecture = "sm_{}{}".format(*libraries.device().capability)
    name = f"{kernel}_{hashlib.sha256(repr((source, constants, architecture)).encode()).hexdigest()[:16]}"
    image = compile_kernels(source, dict(constants), architecture)
    problem = _load_function()(libraries.DRIVER.encode(), name.encode(), kernel.encode(), image)
    if problem is not None:
        raise RuntimeError(f"{kernel}: expected to load, found {problem.decode()}")
    return name


def compile_kernels(source: bytes, constants: dict[str, str], architecture: str) -> bytes:
    """Machine code of the kernels, for a GPU such as sm_90. RuntimeError with the compiler's log when it refuses."""
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"kernels.cu", 0, None, None))
    options = [f"--gpu-architecture={architecture}", "--std=c++17", *(f"-D{key}={value}" for key, value in constants.items())]
    failure = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*map(str.encode, options)))
    if failure:
        raise RuntimeError(f"NVRTC: expected kernels.cu to compile, found\n{_text(program, 'ProgramLog').decode()}")
    image = _text(program, "CUBIN")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return image


def _text(program: ctypes.c_void_p, what: str) -> bytes:
    nvrtc, size = _nvrtc(), ctypes.c_size_t()
    _check(getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(nvrtc, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(failure: int) -> None:
    if failure:
        raise RuntimeError(f"NVRTC: expected success, found its error {failure}")


@cache
def _nvrtc() -> ctypes.CDLL:
    return ctypes.CDLL(libraries.find("libnvrtc", "nvidia-cuda-nvrtc"))


@cache
def _load_function() -> Any:
    load = library.load().gpt2_jax_cuda_load
    load.restype = ctypes.c_char_p
    load.argtypes = [ctypes.c_char_p] * 3 + [ctypes.c_char_p]
    ffi = jax_compat.ffi_module()
    ffi.register_ffi_target(_TARGET, ffi.pycapsule(getattr(library.load(), _TARGET)), platform="CUDA")
    return load
