"""LayerNorm folded into the linear layer behind it, for NVIDIA GPUs: with XLA's fusions, and with kernels of our own.

The linear layer of gain * n + shift is that of n with the weight times gain, and the bias plus the weight times shift. So
the gradients of gain and shift come out of the weight's and need no sum over tokens; and the parts (q, k and v) are
products of their own, so that nothing is split or joined.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial, reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gpt2_jax.ops.cuda import kernels, libraries
from gpt2_jax.ops.layer_norm import LAYERNORM_EPSILON, normed
from gpt2_jax.ops.matmul import ON_NVIDIA_ONLY, weight_gradient
from gpt2_jax.ops.summed import Summed
from gpt2_jax.ops.threaded import Site, Slots, ThreadedOp, WeightView, rounded, threaded
from gpt2_jax.ops.writer import refuses_updates, write_gradient

if TYPE_CHECKING:
    from gpt2_jax.compute.plan import Plan

_FLOAT32 = jnp.dtype(jnp.float32)


class _Passes(NamedTuple):
    """What the folded implementation computes around its products: over the rows of tokens, and over those of weights."""

    # (x (..., C)) -> its norm in x's dtype, 1 / deviation (..., 1) float32
    normalize: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
    # (norm, 1 / deviation, parts of the norm's cotangent (M, C), cotangent that reaches x around the norm) -> that of x,
    # with its column sums where the pass makes them
    dx: Callable[[jax.Array, jax.Array, list[jax.Array], jax.Array], Summed | jax.Array]
    # (site, flat_N, dtype of products) -> the folded weight (P, C) and bias (P,) of each part
    fold: Callable[[Site, jax.Array, jnp.dtype], list[tuple[jax.Array, jax.Array]]]
    # (site, flat_N, gradient_N, gradients of each part's folded weight and bias) -> the buffer, the slots' cotangents
    unfold: Callable[[Site, jax.Array, jax.Array, list[tuple[jax.Array, jax.Array]]], tuple[jax.Array, Slots]]


# The norm, 1 / deviation, and the folded weights, which are made anew where weights are gathered for every op.
_Saved = tuple[jax.Array, jax.Array, list[jax.Array] | None]


def _folded_forward(
    passes: _Passes, site: Site, x: jax.Array, flat_N: jax.Array
) -> tuple[tuple[jax.Array, tuple[jax.Array, ...]], _Saved]:
    n, rstd = passes.normalize(x)
    n_MC = n.reshape(-1, x.shape[-1])
    folded = passes.fold(site, flat_N, x.dtype)
    parts = []
    for w_PC, b_P in folded:
        y_MP = lax.dot_general(n_MC, w_PC, (((1,), (1,)), ((), ())), preferred_element_type=x.dtype) + b_P[None]
        parts.append(y_MP.reshape(*x.shape[:-1], -1))
    return (x, tuple(parts)), (n, rstd, [w_PC for w_PC, _ in folded] if site.plan.zero < 3 else None)


def _folded_backward(
    passes: _Passes,
    site: Site,
    saved: _Saved,
    flat_N: jax.Array,
    dy: tuple[Summed, tuple[Summed, ...]],
    gradient_N: jax.Array,
) -> tuple[Summed | jax.Array, jax.Array, Slots]:
    (n, rstd, folded), (dresidual, dparts) = saved, dy
    if folded is None:
        folded = [w_PC for w_PC, _ in passes.fold(site, flat_N, n.dtype)]
    n_MC = n.reshape(-1, n.shape[-1])
    dns, gradients = [], []
    for dpart, w_PC in zip(dparts, folded, strict=True):
        dpart_MP = dpart.value.reshape(-1, dpart.value.shape[-1])
        gradients.append((weight_gradient(site.plan, dpart_MP, n_MC), dpart.sums))
        dns.append(lax.dot_general(dpart_MP, w_PC, (((1,), (0,)), ((), ())), preferred_element_type=n.dtype))
    gradient_N, slots = passes.unfold(site, flat_N, gradient_N, gradients)
    return passes.dx(n, rstd, dns, dresidual.value), gradient_N, slots


def _xla_normalize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    n, rstd = normed(x)
    # Without the barrier XLA computes the norm anew in the backward.
    return lax.optimization_barrier((n.astype(x.dtype), rstd))


def _xla_dx(n: jax.Array, rstd: jax.Array, dns: list[jax.Array], dresidual: jax.Array) -> jax.Array:
    dn_MC = reduce(operator.add, dns)  # in the dtype of products: cuBLAS adds it to the next part's itself
    wide, d = n.astype(_FLOAT32), dn_MC.reshape(n.shape).astype(_FLOAT32)
    dx = (d - jnp.mean(d, axis=-1, keepdims=True) - wide * jnp.mean(d * wide, axis=-1, keepdims=True)) * rstd
    return dresidual + dx.astype(n.dtype)


def _xla_fold(site: Site, flat_N: jax.Array, dtype: jnp.dtype) -> list[tuple[jax.Array, jax.Array]]:
    gain_C, shift_C, w_OC, b_O = (site.view(flat_N, name).array() for name in site.names)
    return [
        (rounded(w_PC * gain_C[None], dtype), rounded(b_P + jnp.sum(w_PC * shift_C[None], axis=1), dtype))
        for w_PC, b_P in zip(jnp.split(w_OC, site.parts), jnp.split(b_O, site.parts), strict=True)
    ]


def _xla_unfold(
    site: Site, flat_N: jax.Array, gradient_N: jax.Array, parts: list[tuple[jax.Array, jax.Array]]
) -> tuple[jax.Array, Slots]:
    gain_C, shift_C, w_OC, _ = (site.view(flat_N, name).array() for name in site.names)
    dfolded_OC, db_O = (jnp.concatenate(each).astype(_FLOAT32) for each in zip(*parts, strict=True))
    dgain_C, dshift_C = jnp.sum(dfolded_OC * w_OC, axis=0), jnp.sum(db_O[:, None] * w_OC, axis=0)
    dw_OC = dfolded_OC * gain_C[None] + db_O[:, None] * shift_C[None]
    slots = {}
    for name, gradient in zip(site.names, (dgain_C, dshift_C, dw_OC, db_O), strict=True):
        gradient_N, slots[name] = write_gradient(site, gradient_N, name, gradient)
    return gradient_N, slots


# By kernels of our own: one pass each, in place of XLA's two or more.

_MOST_CHANNELS = 2048  # of a row that a warp's registers hold
_BLOCKS_OF_SUMS = 4  # a multiprocessor: few enough that their column sums are soon added up
_FOLD_THREADS = 256
_FOLD_COLUMNS = 32  # of a cluster of blocks
_CLUSTER, _CLUSTERS_FROM = 8, (9, 0)  # blocks that add up with one another, and the first GPUs on which they can


def _kernel_normalize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    results = (_like(x), jax.ShapeDtypeStruct((*x.shape[:-1], 1), _FLOAT32))
    return kernels.call("layer_norm", results, x, **_rows_of_warps(x))


def _kernel_dx(n: jax.Array, rstd: jax.Array, dns: list[jax.Array], dresidual: jax.Array) -> Summed:
    dx, sums_BSC = _call_dx(n, rstd, dns, dresidual)
    return Summed(dx, jnp.sum(sums_BSC, axis=0)[0])


def _call_dx(
    n: jax.Array, rstd: jax.Array, dns: list[jax.Array], dresidual: jax.Array, *gain: WeightView
) -> tuple[jax.Array, jax.Array]:
    """dx, and each block's column sums (blocks, 1, C), or (blocks, 3, C) with a gain."""
    launch = _rows_of_warps(n, PARTS=len(dns), AFFINE=len(gain))
    launch["blocks"] = min(launch["blocks"], _BLOCKS_OF_SUMS * libraries.device().multiprocessors)
    sums_BSC = jax.ShapeDtypeStruct((launch["blocks"], 3 if gain else 1, n.shape[-1]), _FLOAT32)
    return kernels.call("layer_norm_backward", (_like(n), sums_BSC), n, rstd, dresidual, *gain, *dns, **launch)


def _rows_of_warps(x: jax.Array, **constants: int) -> dict[str, Any]:
    """How a kernel is launched that has a warp for each row of x."""
    C = x.shape[-1]
    rows, threads = x.size // C, 256 if C <= 1024 else 128
    all_constants = {"LAYER_NORM": 1, "C": C, "ROWS": rows, "EPSILON": f"{LAYERNORM_EPSILON}f", "PARTS": 1, "AFFINE": 0}
    return {"constants": {**all_constants, **constants}, "blocks": -(-rows // (threads // 32)), "threads": threads}


def _kernel_fold(site: Site, flat_N: jax.Array, dtype: jnp.dtype) -> list[tuple[jax.Array, jax.Array]]:
    gain, shift, weight, bias = (site.view(flat_N, name) for name in site.names)
    O, C = weight.shape
    weights = [jax.ShapeDtypeStruct((O // site.parts, C), dtype)] * site.parts
    biases = [jax.ShapeDtypeStruct((O // site.parts,), dtype)] * site.parts
    blocks = -(-O // (_FOLD_THREADS // 32))
    results = kernels.call("fold", (*weights, *biases), weight, bias, gain, shift, **_fold_launch(site, weight, blocks))
    return list(zip(results[: site.parts], results[site.parts :], strict=True))


def _kernel_unfold(
    site: Site, flat_N: jax.Array, gradient_N: jax.Array, parts: list[tuple[jax.Array, jax.Array]]
) -> tuple[jax.Array, Slots]:
    if refuses_updates(site.plan) or not site.plan.layout[site.names[2]].trains:
        return _xla_unfold(site, flat_N, gradient_N, parts)
    names = gain_name, shift_name, weight_name, bias_name = site.names
    gain, shift, weight, _ = (site.view(flat_N, name) for name in names)
    # bfloat16 is what cuBLAS's products give; another implementation's are float32.
    dfolded, db = [dw_PC.astype(jnp.bfloat16) for dw_PC, _ in parts], [db_P for _, db_P in parts]
    cluster = _CLUSTER if libraries.device().capability >= _CLUSTERS_FROM else 1
    per_channel = jax.ShapeDtypeStruct(gain.shape, _FLOAT32)
    gradient_N, dgain_C, dshift_C = kernels.call(
        "unfold",
        (_like(gradient_N), per_channel, per_channel),
        *(weight, gain, shift, site.view(gradient_N, weight_name)),
        *dfolded,
        *db,
        aliases={3: 0},
        **_fold_launch(site, weight, -(-weight.shape[1] // _FOLD_COLUMNS) * cluster, CLUSTER=cluster),
    )
    slots = {weight_name: jnp.zeros((), _FLOAT32)}
    for name, gradient in ((gain_name, dgain_C), (shift_name, dshift_C), (bias_name, jnp.concatenate(db))):
        gradient_N, slots[name] = write_gradient(site, gradient_N, name, gradient)
    return gradient_N, slots


def _fold_launch(site: Site, weight: WeightView, blocks: int, **constants: int) -> dict[str, Any]:
    O, C = weight.shape
    all_constants = {
        "FOLD": 1,
        "OUTPUTS": O,
        "C": C,
        "PARTS": site.parts,
        "ACCUMULATE": int(site.adds(site.names[2])),
        "CLUSTER": 1,
    }
    return {"constants": {**all_constants, **constants}, "blocks": blocks, "threads": _FOLD_THREADS}


def _kernel_forward(
    site: Site, x: jax.Array, flat_N: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    gain, shift = (site.view(flat_N, name) for name in site.names)
    results = (_like(x), jax.ShapeDtypeStruct((*x.shape[:-1], 1), _FLOAT32), _like(x))
    n, rstd, h = kernels.call("layer_norm", results, x, gain, shift, **_rows_of_warps(x, AFFINE=1))
    return (x, h), (n, rstd)


def _kernel_backward(
    site: Site, saved: tuple[jax.Array, jax.Array], flat_N: jax.Array, dy: tuple[jax.Array, jax.Array], gradient_N: jax.Array
) -> tuple[Summed, jax.Array, Slots]:
    dresidual, dh = dy
    dx, sums_BSC = _call_dx(*saved, [dh], dresidual, site.view(flat_N, site.names[0]))
    dx_C, dgain_C, dshift_C = jnp.sum(sums_BSC, axis=0)
    slots = {}
    for name, gradient in zip(site.names, (dgain_C, dshift_C), strict=True):
        gradient_N, slots[name] = write_gradient(site, gradient_N, name, gradient)
    return Summed(dx, dx_C), gradient_N, slots


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _folded(passes: _Passes) -> ThreadedOp:
    return threaded(partial(_folded_forward, passes), partial(_folded_backward, passes), knows_sums=True)


norm_linear = _folded(_Passes(_xla_normalize, _xla_dx, _xla_fold, _xla_unfold))
norm_linear_by_kernels = _folded(_Passes(_kernel_normalize, _kernel_dx, _kernel_fold, _kernel_unfold))
norm_by_kernel = threaded(_kernel_forward, _kernel_backward)


def refuses_kernels(plan: Plan) -> str | None:
    """Why the kernels cannot serve this plan; None when they can."""
    if reason := kernels.refusal(plan):
        return reason
    C = plan.config.channels
    if C % 8 != 0 or C > _MOST_CHANNELS:
        return f"rows of a multiple of 8 up to {_MOST_CHANNELS} channels, not {C}"
    return None


def refuses(plan: Plan) -> str | None:
    """Why folding cannot serve this plan; None when it can."""
    return ON_NVIDIA_ONLY if "cuda_libraries" in plan.backend.lacks else None
