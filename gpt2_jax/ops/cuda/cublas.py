"""Products of cuBLASLt's that XLA does not offer, through the library of custom calls."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax import jax_compat
from gpt2_jax.ops.cpu import library
from gpt2_jax.ops.cuda import libraries
from gpt2_jax.ops.table import Fallback

if TYPE_CHECKING:
    from gpt2_jax.compute.plan import Plan

_TARGET = "gpt2_jax_cublas_gelu_backward"
_WORKSPACE_BYTES = 32 << 20  # NVIDIA's advice for Hopper


def refusal(plan: Plan) -> str | None:
    """Why these products cannot serve this plan; None when they can."""
    try:
        if reason := libraries.refusal(plan):
            return reason
        _load()
    except NotImplementedError as error:
        return Fallback(str(error))
    return None


def gelu_backward(plan: Plan, dy_MO: jax.Array, w_OI: jax.Array, x_MI: jax.Array) -> jax.Array:
    """(dy w) * gelu'(x), (M, I) bfloat16: the cotangent of x in y = gelu(x) wᵀ. All are bfloat16, O and I multiples of 8."""
    if not plan.deterministic:
        _tune(x_MI.shape[0], *w_OI.shape, plan.devices)
    return _call(dy_MO, w_OI, x_MI, tune=not plan.deterministic)


def _call(dy_MO: jax.Array, w_OI: jax.Array, x_MI: jax.Array, *, tune: bool = True) -> jax.Array:
    _load()
    results = (jax.ShapeDtypeStruct(x_MI.shape, x_MI.dtype), jax.ShapeDtypeStruct((_WORKSPACE_BYTES,), jnp.uint8))
    return jax_compat.ffi_call(_TARGET, results, dy_MO, w_OI, x_MI, tune=np.int64(tune))[0]


@cache
def _tune(M: int, O: int, I: int, devices: int) -> None:
    """Call the product once on each device outside of XLA's CUDA graphs, where the library can time cuBLASLt's algorithms,
    which it does for every GPU."""
    for device in jax.local_devices()[:devices]:
        with jax.ensure_compile_time_eval(), jax.default_device(device):
            zeros = [jnp.zeros(shape, jnp.bfloat16) for shape in ((M, O), (O, I), (M, I))]
            jax.block_until_ready(jax.jit(_call)(*zeros))


@cache
def _load() -> None:
    path = libraries.find("libcublasLt", "nvidia-cublas")
    load = library.load().gpt2_jax_cublas_load
    load.restype, load.argtypes = ctypes.c_char_p, [ctypes.c_char_p] * 2
    if problem := load(libraries.DRIVER.encode(), path.encode()):
        raise NotImplementedError(f"cuBLASLt: {problem.decode()}")
    ffi = jax_compat.ffi_module()
    ffi.register_ffi_target(_TARGET, ffi.pycapsule(getattr(library.load(), _TARGET)), platform="CUDA")
