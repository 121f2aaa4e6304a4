"""The GPU that is computed for, and the libraries of NVIDIA's that come with jax for CUDA."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax

from gpt2_jax.ops.matmul import ON_NVIDIA_ONLY

if TYPE_CHECKING:
    from gpt2_jax.compute.plan import Plan

DRIVER = "libcuda.so.1"
_OLDEST = (8, 0)  # bfloat16, and copies into shared memory that pass registers by
# CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, _MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
_MULTIPROCESSORS, _MAX_SHARED_BYTES_OF_A_BLOCK = 16, 97


class Device(NamedTuple):
    capability: tuple[int, int]
    shared_bytes: int  # that a block may have
    multiprocessors: int


def refusal(plan: Plan) -> str | None:
    """Why calls of our own into NVIDIA's libraries cannot serve this plan; None when they can.

    NotImplementedError where no GPU is found.
    """
    if "cuda_libraries" in plan.backend.lacks:
        return ON_NVIDIA_ONLY
    if plan.dtype != "bfloat16":
        return "in bfloat16 only"
    return None if device().capability >= _OLDEST else f"GPUs of compute capability {_OLDEST[0]}.{_OLDEST[1]} on"


@cache
def device() -> Device:
    """The first GPU of the process, which kernels are compiled for; NotImplementedError where there is none."""
    try:
        major, minor = map(int, jax.devices("gpu")[0].compute_capability.split("."))
        describe = ctypes.CDLL(DRIVER).cuDeviceGetAttribute
    except (RuntimeError, OSError, AttributeError) as error:
        raise NotImplementedError(f"no GPU of CUDA's was found: {str(error).splitlines()[0]}") from None
    numbers = []
    for attribute in (_MAX_SHARED_BYTES_OF_A_BLOCK, _MULTIPROCESSORS):
        found = ctypes.c_int()
        if failure := describe(ctypes.byref(found), attribute, 0):
            raise NotImplementedError(f"CUDA's driver does not describe the GPU: its error {failure}")
        numbers.append(found.value)
    return Device((major, minor), *numbers)


def find(stem: str, package: str) -> str:
    """The path or file name of one of NVIDIA's libraries, such as libnvrtc; NotImplementedError where it is not installed."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec is not None else None
    installed = [str(path) for folder in folders or () for path in Path(folder).glob(f"*/lib/{stem}.so.*")]
    for path in [*installed, f"{stem}.so.13", f"{stem}.so.12", f"{stem}.so"]:
        try:
            ctypes.CDLL(path)
        except OSError:
            continue
        return path
    raise NotImplementedError(f"{stem} is not installed: pip install {package}")
