"""LayerNorm, alone and joined with the linear layer behind it.

The op of a norm also returns its input, the residual stream: its backward then adds the cotangent that reaches the stream
around the norm in the same pass. A norm in front of a linear layer is one seam with it, since some devices do best when
the gain is folded into the weight. The result comes in `site.parts` equal parts (q, k and v), where the consumer wants so.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial, reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gpt2_jax.ops.apple import fused, plugin
from gpt2_jax.ops.cpu import library
from gpt2_jax.ops.cuda import kernels, libraries
from gpt2_jax.ops.linear import linear
from gpt2_jax.ops.matmul import ON_NVIDIA_ONLY, weight_gradient
from gpt2_jax.ops.plain import plain
from gpt2_jax.ops.summed import Summed, is_summed
from gpt2_jax.ops.table import Implementation, always
from gpt2_jax.ops.threaded import Site, Slots, ThreadedOp, rounded, threaded
from gpt2_jax.ops.writer import write_gradient

if TYPE_CHECKING:
    from gpt2_jax.compute.plan import Plan

LAYERNORM_EPSILON = 1e-5
_FLOAT32 = jnp.dtype(jnp.float32)
Parts = tuple[jax.Array, ...]


class Norms(NamedTuple):
    """The two threaded ops of one implementation."""

    norm: ThreadedOp  # names: gain, shift; x (..., C) -> (x, its norm)
    norm_linear: ThreadedOp  # names: gain, shift, weight, bias; x (..., C) -> (x, the linear layer of its norm in parts)
    # (bytes of an activation): those that norm_linear keeps of a channel for its backward, of input and norm
    keeps: Callable[[int], int] = lambda s: 2 * s


def norms_of(plan: Plan) -> Norms:
    return next(row.functions for row in TABLE if row.name == plan.norm_linear.name)


def layer_norm(x: jax.Array, gain_C: jax.Array, shift_C: jax.Array) -> jax.Array:
    """(x - mean) / sqrt(variance + 1e-5) * gain + shift over the channels, in float32, returned in x's dtype."""
    leading = (1,) * (x.ndim - 1)
    normed, _ = _normed(x)
    return (normed * gain_C.reshape(*leading, -1) + shift_C.reshape(*leading, -1)).astype(x.dtype)


def _normed(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(x - mean) / deviation, and 1 / deviation, float32."""
    x = x.astype(_FLOAT32)
    centered = x - jnp.mean(x, axis=-1, keepdims=True)
    rstd = lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + LAYERNORM_EPSILON)
    return centered * rstd, rstd


# The reference.


def _residual_and_norm(site: Site, x: jax.Array, gain_C: jax.Array, shift_C: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, layer_norm(x, gain_C, shift_C)


# By custom calls, on the CPU.


def _call_forward(site: Site, x: jax.Array, flat_N: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    gain_C, shift_C = (site.view(flat_N, name).array() for name in site.names)
    return (x, library.call(library.LAYER_NORM, _like(x), x, gain_C, shift_C)), x


def _call_backward(
    site: Site, x: jax.Array, flat_N: jax.Array, dy: tuple[jax.Array, jax.Array], gradient_N: jax.Array
) -> tuple[jax.Array, jax.Array, Slots]:
    dresidual, dh = dy
    gain, shift = site.names
    gain_C = site.view(flat_N, gain).array()
    results = (_like(x), _like(gain_C), _like(gain_C))
    dx, dgain_C, dshift_C = library.call(library.LAYER_NORM_BACKWARD, results, x, gain_C, dh, dresidual)
    gradient_N, gain_slot = write_gradient(site, gradient_N, gain, dgain_C)
    gradient_N, shift_slot = write_gradient(site, gradient_N, shift, dshift_C)
    return dx, gradient_N, {gain: gain_slot, shift: shift_slot}


def _followed_by_linear(
    norm: ThreadedOp, site: Site, x: Any, flat_N: jax.Array, slots: Slots
) -> tuple[tuple[Any, tuple[Any, ...]], jax.Array]:
    (x, h), flat_N = norm(site.over(*site.names[:2]), x, flat_N, {name: slots[name] for name in site.names[:2]})
    y, flat_N = linear(site.over(*site.names[2:]), h, flat_N, {name: slots[name] for name in site.names[2:]})
    return (x, _split(y, site.parts)), flat_N


def _split(y: Any, parts: int) -> tuple[Any, ...]:
    """Equal parts by the last axis, of an array or a Summed."""
    if parts == 1:
        return (y,)
    if is_summed(y):
        return tuple(map(Summed, jnp.split(y.value, parts, axis=-1), jnp.split(y.sums, parts)))
    return tuple(jnp.split(y, parts, axis=-1))


# On GPUs: the linear layer of gain * n + shift is that of n with the weight times gain, and the bias plus the weight times
# shift. So the gradients of gain and shift come out of the weight's and need no sum over tokens; and the parts are
# products of their own, so that nothing is split or joined.


class _Passes(NamedTuple):
    """The passes over the rows that the folded implementation makes between its products."""

    # (x (..., C)) -> its norm in x's dtype, 1 / deviation (..., 1) float32
    normalize: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
    # (norm, 1 / deviation, parts of the norm's cotangent (M, C), cotangent that reaches x around the norm) -> that of x,
    # with its column sums where the pass makes them
    dx: Callable[[jax.Array, jax.Array, list[jax.Array], jax.Array], Summed | jax.Array]


def _folded_forward(
    passes: _Passes, site: Site, x: jax.Array, flat_N: jax.Array
) -> tuple[tuple[jax.Array, Parts], tuple[jax.Array, jax.Array]]:
    normed, rstd = passes.normalize(x)
    n_MC = normed.reshape(-1, x.shape[-1])
    gain_C, shift_C, w_OC, b_O = (site.view(flat_N, name).array() for name in site.names)
    parts = []
    for w_PC, b_P in zip(jnp.split(w_OC, site.parts), jnp.split(b_O, site.parts), strict=True):
        bias_P = rounded(b_P + jnp.sum(w_PC * shift_C[None], axis=1), x.dtype)
        folded_PC = rounded(w_PC * gain_C[None], x.dtype)
        y_MP = lax.dot_general(n_MC, folded_PC, (((1,), (1,)), ((), ())), preferred_element_type=x.dtype) + bias_P[None]
        parts.append(y_MP.reshape(*x.shape[:-1], -1))
    return (x, tuple(parts)), (normed, rstd)


def _folded_backward(
    passes: _Passes,
    site: Site,
    saved: tuple[jax.Array, jax.Array],
    flat_N: jax.Array,
    dy: tuple[Summed, tuple[Summed, ...]],
    gradient_N: jax.Array,
) -> tuple[Summed | jax.Array, jax.Array, Slots]:
    (normed, rstd), (dresidual, dparts) = saved, dy
    dtype, C = normed.dtype, normed.shape[-1]
    n_MC = normed.reshape(-1, C)
    gain_C, shift_C, w_OC, _ = (site.view(flat_N, name).array() for name in site.names)
    dgain_C, dshift_C = jnp.zeros((C,), _FLOAT32), jnp.zeros((C,), _FLOAT32)
    dns, dws, dbs = [], [], []
    for dpart, w_PC in zip(dparts, jnp.split(w_OC, site.parts), strict=True):
        dpart_MP = dpart.value.reshape(-1, dpart.value.shape[-1])
        dfolded_PC = weight_gradient(site.plan, dpart_MP, n_MC).astype(_FLOAT32)
        dws.append(dfolded_PC * gain_C[None] + dpart.sums[:, None] * shift_C[None])
        dbs.append(dpart.sums)
        dgain_C += jnp.sum(dfolded_PC * w_PC, axis=0)
        dshift_C += jnp.sum(dpart.sums[:, None] * w_PC, axis=0)
        folded_PC = rounded(w_PC * gain_C[None], dtype)
        dns.append(lax.dot_general(dpart_MP, folded_PC, (((1,), (0,)), ((), ())), preferred_element_type=dtype))
    gradients = (dgain_C, dshift_C, jnp.concatenate(dws), jnp.concatenate(dbs))
    slots = {}
    for name, gradient in zip(site.names, gradients, strict=True):
        gradient_N, slots[name] = write_gradient(site, gradient_N, name, gradient)
    return passes.dx(normed, rstd, dns, dresidual.value), gradient_N, slots


def _xla_normalize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    normed, rstd = _normed(x)
    # Without the barrier XLA computes the norm anew in the backward.
    return lax.optimization_barrier((normed.astype(x.dtype), rstd))


def _xla_dx(normed: jax.Array, rstd: jax.Array, dns: list[jax.Array], dresidual: jax.Array) -> jax.Array:
    dn_MC = reduce(operator.add, dns)  # in the dtype of products: cuBLAS adds it to the next part's itself
    n, d = normed.astype(_FLOAT32), dn_MC.reshape(normed.shape).astype(_FLOAT32)
    dx = (d - jnp.mean(d, axis=-1, keepdims=True) - n * jnp.mean(d * n, axis=-1, keepdims=True)) * rstd
    return dresidual + dx.astype(normed.dtype)


# By kernels of our own: one pass over the rows each, in place of XLA's two.

_KERNEL_PARTS = 3  # addresses that the kernel takes
_MOST_CHANNELS = 2048  # of a row that a warp's registers hold
_BLOCKS_OF_SUMS = 4  # a multiprocessor: few enough that their column sums are soon added up


def _kernel_normalize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    results = (_like(x), jax.ShapeDtypeStruct((*x.shape[:-1], 1), _FLOAT32))
    return kernels.call("layer_norm", results, x, **_rows_of_warps(x))


def _kernel_dx(normed: jax.Array, rstd: jax.Array, dns: list[jax.Array], dresidual: jax.Array) -> Summed:
    filled = [*dns, *dns[:1] * (_KERNEL_PARTS - len(dns))]
    launch = _rows_of_warps(normed, PARTS=len(dns))
    launch["blocks"] = min(launch["blocks"], _BLOCKS_OF_SUMS * libraries.device().multiprocessors)
    results = (_like(normed), jax.ShapeDtypeStruct((launch["blocks"], normed.shape[-1]), _FLOAT32))
    dx, sums = kernels.call("layer_norm_backward", results, normed, rstd, dresidual, *filled, **launch)
    return Summed(dx, jnp.sum(sums, axis=0))


def _rows_of_warps(x: jax.Array, **constants: int) -> dict[str, Any]:
    """How a kernel is launched that has a warp for each row of x."""
    C = x.shape[-1]
    rows, threads = x.size // C, 256 if C <= 1024 else 128
    all_constants = {"LAYER_NORM": 1, "C": C, "ROWS": rows, "EPSILON": f"{LAYERNORM_EPSILON}f", "PARTS": 1, **constants}
    return {"constants": all_constants, "blocks": -(-rows // (threads // 32)), "threads": threads}


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _refuses_kernel(plan: Plan) -> str | None:
    if reason := kernels.refusal(plan):
        return reason
    C = plan.config.channels
    return None if C % 8 == 0 and C <= _MOST_CHANNELS else f"rows of a multiple of 8 up to {_MOST_CHANNELS} channels, not {C}"


def _refuses_folded(plan: Plan) -> str | None:
    return ON_NVIDIA_ONLY if "cuda_libraries" in plan.backend.lacks else None


def _folded(passes: _Passes) -> ThreadedOp:
    return threaded(partial(_folded_forward, passes), partial(_folded_backward, passes), knows_sums=True)


_plugin = fused.layer_norm_op(layer_norm)
_reference, _custom_call = plain(_residual_and_norm), threaded(_call_forward, _call_backward)
TABLE = (
    Implementation(
        "custom_call",
        library.refusal,
        "one pass over the rows",
        functions=Norms(_custom_call, partial(_followed_by_linear, _custom_call)),
    ),
    Implementation(
        "folded_kernel",
        _refuses_kernel,
        "gain and shift become part of the weight, a norm is one pass",
        functions=Norms(_reference, _folded(_Passes(_kernel_normalize, _kernel_dx)), keeps=lambda s: s),
    ),
    Implementation(
        "folded",
        _refuses_folded,
        "gain and shift become part of the weight",
        functions=Norms(_reference, _folded(_Passes(_xla_normalize, _xla_dx)), keeps=lambda s: s),
    ),
    Implementation(
        "apple",
        plugin.refuses("layer_norm"),
        "one operation, keeps its input only",
        functions=Norms(
            _plugin,
            partial(_followed_by_linear, _plugin),
            keeps=lambda s: 2 * s + (4 if s < 4 else 0),  # the input in float32 as well
        ),
    ),
    Implementation(
        "xla",
        always,
        "the reference, on every device",
        functions=Norms(_reference, partial(_followed_by_linear, _reference)),
    ),
)
