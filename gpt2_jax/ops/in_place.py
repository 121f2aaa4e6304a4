"""Loss and gradient with every gradient written straight to its place in the flat buffer; and the forward pass alone.

The same mathematics as differentiating model.loss, which it is tested against, by the CPU's custom calls: weights are
read where they lie in the parameter buffer, a weight's gradient is written there by the product that makes it, and what
happens row by row between the products is one pass each.
Each function of the forward pass returns its value and its backward: from the cotangent of the value to that of the
input, with the gradients of its parameters given to the _Gradient on the way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gpt2_jax import jax_compat
from gpt2_jax.buffer.layout import ParameterLayout
from gpt2_jax.buffer.views import WeightView, weight_view
from gpt2_jax.compute.memory import CLASSIFIER_ROWS
from gpt2_jax.compute.stability import squared_norms
from gpt2_jax.models.gpt2 import RECOMPUTED
from gpt2_jax.ops.cpu import library as custom_calls
from gpt2_jax.ops.linear import matmul, matmul_into, rung_precision

_Backward = Callable[[jax.Array], jax.Array]
_FLOAT32 = jnp.dtype(jnp.float32)


def writes_in_place(matmul: str) -> bool:
    """Whether the gradient is written in place: by the custom calls, with a jax that can alias them (from 0.4.38 on)."""
    return custom_calls.serve(matmul) and jax_compat.ffi_call_can_alias()


class _Gradient:
    """The gradient buffer while the backward pass fills it: whoever writes to it takes it and leaves a new one.

    That makes one chain of custom calls in one memory. XLA's own updates of a slice stay out of it, since it may fuse
    them into loops over the whole buffer; small gradients wait and are written by one call at the end.
    """

    def __init__(self, buffer_N: jax.Array, layout: ParameterLayout, implementation: str, accumulate: bool):
        self._buffer_N, self._layout = buffer_N, layout
        self._implementation, self._accumulate = implementation, accumulate
        self._pieces: list[tuple[int, jax.Array]] = []
        self._awaited = 0  # so many of them by the last barrier
        # The sums of squares of what the products wrote, by its place.
        self._squares: dict[tuple[str, int], jax.Array] = {}

    def write_product(self, name: str, layer: int, dy_MO: jax.Array, x_MI: jax.Array, *, more: bool = False) -> None:
        """dyᵀ x, the gradient of a weight (O, I), or with `more` the rest of it."""
        self._buffer_N, self._squares[name, layer] = matmul_into(
            weight_view(self._buffer_N, self._layout, name, layer),
            dy_MO,
            x_MI,
            transpose_a=True,
            accumulate=self._accumulate or more,
            implementation=self._implementation,
            precision=rung_precision(self._implementation, x_MI.dtype, weight_gradient=True),
        )

    def barrier(self, x: jax.Array, *others: jax.Array) -> jax.Array:
        """x, but not before the others and all gradients so far are there, so that what they are made of is free.

        lax.optimization_barrier is gone when XLA's CPU compiler orders the calls.
        """
        gradients = [piece for _, piece in self._pieces[self._awaited :]]
        self._awaited = len(self._pieces)
        return jax_compat.ffi_call(custom_calls.BARRIER, _like(x), x, self._buffer_N, *gradients, *others, aliases={0: 0})

    def add_rows(self, name: str, indices: jax.Array, rows: jax.Array) -> None:
        """Add rows (..., C) to those of a matrix that `indices` (...) name, after its product was written."""
        buffer_N = self._buffer_N
        self._buffer_N, change = jax_compat.ffi_call(
            custom_calls.ADD_ROWS_INTO,
            (_like(buffer_N), jax.ShapeDtypeStruct((), _FLOAT32)),
            buffer_N,
            indices,
            rows,
            aliases={0: 0},
            out_offset=np.int64(self._layout[name].offset),
        )
        # Where rows cancel, roundings may leave less than nothing.
        self._squares[name, 0] = jnp.maximum(self._squares[name, 0] + change, 0.0)

    def write(self, name: str, layer: int, gradient: jax.Array) -> None:
        """The float32 gradient of a small tensor."""
        self._pieces.append((self._layout[name].layer_offset(layer), gradient))

    def finish(self) -> tuple[jax.Array, jax.Array]:
        """The buffer with everything in its place, and its squared_norms: only small tensors are read again for them."""
        offsets, pieces = zip(*self._pieces, strict=True)
        buffer_N = jax_compat.ffi_call(
            custom_calls.WRITE_INTO,
            _like(self._buffer_N),
            self._buffer_N,
            *pieces,
            aliases={0: 0},
            offsets=np.array(offsets, dtype=np.int64),
            accumulate=np.int64(self._accumulate),
        )
        written = {name for name, _ in self._squares}
        small = [tensor for tensor in self._layout.tensors if tensor.name not in written]
        of_small = dict(zip((tensor.name for tensor in small), squared_norms(buffer_N, small, custom_call=True), strict=True))
        of_layers = {name: [square for (of, _), square in self._squares.items() if of == name] for name in written}
        squares = [
            jnp.sum(jnp.stack(of_layers[tensor.name])) if tensor.name in written else of_small[tensor.name]
            for tensor in self._layout.tensors
        ]
        return buffer_N, jnp.stack(squares)


class _Pass(NamedTuple):
    """What the functions of one forward and backward pass share."""

    params_N: jax.Array
    layout: ParameterLayout
    implementation: str  # of the matrix products
    gradient: _Gradient
    recompute: str

    def view(self, name: str, layer: int = 0) -> WeightView:
        return weight_view(self.params_N, self.layout, name, layer)


def loss_and_gradient(
    params_N: jax.Array,
    grads_N: jax.Array,
    x_BT: jax.Array,
    y_BT: jax.Array,
    layout: ParameterLayout,
    *,
    dtype: jnp.dtype,
    matmul: str,
    recompute: str = "none",
    scale: float = 1.0,
    accumulate: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`scale` times the mean loss, float32; `grads_N` (num_parameters,) float32 overwritten by its gradient, or with
    `accumulate` that added to it; and squared_norms of what is there then.

    Arguments and loss as model.loss's; `matmul` is one of the custom calls.
    """
    custom_calls.load()
    gradient = _Gradient(grads_N, layout, matmul, accumulate)
    this = _Pass(params_N, layout, matmul, gradient, recompute)
    h_BTC, backward = _hidden_states(this, x_BT, dtype)
    loss, dh_BTC = _classify(this, h_BTC, y_BT, scale)
    backward(dh_BTC)
    return loss, *gradient.finish()


def token_losses(
    params_N: jax.Array, x_BT: jax.Array, y_BT: jax.Array, layout: ParameterLayout, *, dtype: jnp.dtype, matmul: str
) -> jax.Array:
    """Cross-entropy of every target, (B, T) float32, in nats; arguments as loss_and_gradient's."""
    this = _forward_alone(params_N, layout, matmul)
    h_BTC, _ = _hidden_states(this, x_BT, dtype)
    losses: list[jax.Array] = []
    for h_RC, y_R in _classifier_chunks(h_BTC, y_BT):
        if losses:
            h_RC = this.gradient.barrier(h_RC, losses[-1])
        losses.append(_row_losses(this, h_RC, y_R, 1.0)[0])
    return jnp.concatenate(losses).reshape(y_BT.shape)


def logits_at(
    params_N: jax.Array, x_BT: jax.Array, position: jax.Array, layout: ParameterLayout, *, dtype: jnp.dtype, matmul: str
) -> jax.Array:
    """Logits (B, vocab_size) float32 of the token after `position` (int32 scalar); other arguments as
    loss_and_gradient's."""
    this = _forward_alone(params_N, layout, matmul)
    h_BTC, _ = _hidden_states(this, x_BT, dtype)
    h_BC = lax.dynamic_index_in_dim(h_BTC, position, axis=1, keepdims=False)
    return _logits(this, h_BC)[:, : layout.config.vocab_size]


def _forward_alone(params_N: jax.Array, layout: ParameterLayout, matmul: str) -> _Pass:
    """A pass of which no backward is called, so that no gradient is written."""
    custom_calls.load()
    return _Pass(params_N, layout, matmul, _Gradient(jnp.zeros((0,), jnp.float32), layout, matmul, False), "none")


def _hidden_states(this: _Pass, x_BT: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, Callable[[jax.Array], None]]:
    """What the classifier reads, (B, T, C)."""
    residual_BTC, backward = _embed(this, x_BT, dtype)
    backwards = [backward]
    for layer in range(this.layout.config.num_layers):
        residual_BTC, backward = _part(this, "block", partial(_block, this, layer), residual_BTC)
        backwards.append(backward)
    h_BTC, norm_backward = _layer_norm(this, "lnf", 0, residual_BTC)

    def all_backward(dh_BTC: jax.Array) -> None:
        dresidual_BTC = norm_backward(dh_BTC, jnp.zeros_like(residual_BTC))
        for backward in reversed(backwards):
            dresidual_BTC = backward(dresidual_BTC)

    return h_BTC, all_backward


def _embed(this: _Pass, x_BT: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, _Backward]:
    T, C = x_BT.shape[1], this.layout.config.channels
    wpe = this.view("wpe")
    # Rows of wte are gathered from the buffer itself, which begins with it: no copy of the whole matrix.
    tokens_BTC = lax.gather(
        this.params_N,
        (x_BT * C)[..., None],
        lax.GatherDimensionNumbers(offset_dims=(2,), collapsed_slice_dims=(), start_index_map=(0,)),
        (C,),
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )
    residual_BTC = (tokens_BTC + dataclasses.replace(wpe, shape=(T, C)).array()[None]).astype(dtype)

    def backward(dresidual_BTC: jax.Array) -> jax.Array:
        this.gradient.add_rows("wte", x_BT, dresidual_BTC)
        dpositions_TC = jnp.sum(dresidual_BTC.astype(jnp.float32), axis=0)
        unused_positions = jnp.zeros((wpe.shape[0] - T, C), jnp.float32)
        this.gradient.write("wpe", 0, jnp.concatenate([dpositions_TC, unused_positions]))
        return dresidual_BTC

    return residual_BTC, backward


def _part(this: _Pass, name: str, part: Callable[[jax.Array], tuple[jax.Array, Any]], x: jax.Array) -> tuple[jax.Array, Any]:
    """A part's value at x and its backward, which computes the part anew, from x alone, if its name is to be."""
    value, backward = part(x)
    if name not in RECOMPUTED[this.recompute]:
        return value, backward

    def backward_anew(*cotangents: jax.Array) -> jax.Array:
        # Without a barrier XLA would find both computations equal, and keep the first one's values after all.
        return part(this.gradient.barrier(x, *cotangents))[1](*cotangents)

    return value, backward_anew


def _block(this: _Pass, layer: int, residual_BTC: jax.Array) -> tuple[jax.Array, _Backward]:
    residual_BTC, attention_backward = _attention_half(this, layer, residual_BTC)
    residual_BTC, mlp_backward = _mlp_half(this, layer, residual_BTC)
    return residual_BTC, lambda dresidual_BTC: attention_backward(mlp_backward(dresidual_BTC))


def _attention_half(this: _Pass, layer: int, residual_BTC: jax.Array) -> tuple[jax.Array, _Backward]:
    B, T, _ = residual_BTC.shape
    H = this.layout.config.num_heads
    options = {
        "num_heads": np.int64(H),
        "implementation": this.implementation,
        "precision": rung_precision(this.implementation, residual_BTC.dtype),
    }
    qkv, qkv_backward = _part(this, "layer_norm", partial(_normed_linear, this, "ln1", "qkv", layer), residual_BTC)
    results = (_like(residual_BTC), jax.ShapeDtypeStruct((B, H, T), _FLOAT32))
    attention_BTC, log_sums_BHT = _call(custom_calls.ATTENTION, results, qkv, **options)
    out_BTC, projection_backward = _linear(this, "attproj", layer, attention_BTC)

    def backward(dresidual_BTC: jax.Array) -> jax.Array:
        dattention_BTC = projection_backward(dresidual_BTC)
        operands = (qkv, attention_BTC, log_sums_BHT, dattention_BTC)
        dqkv = _call(custom_calls.ATTENTION_BACKWARD, _like(qkv), *operands, **options)
        return qkv_backward(dqkv, dresidual_BTC)

    return residual_BTC + out_BTC, backward


def _mlp_half(this: _Pass, layer: int, residual_BTC: jax.Array) -> tuple[jax.Array, _Backward]:
    hidden, fc_backward = _part(this, "layer_norm", partial(_normed_linear, this, "ln2", "fc", layer), residual_BTC)
    out_BTC, projection_backward = _part(this, "gelu", partial(_gelu_linear, this, "fcproj", layer), hidden)

    def backward(dresidual_BTC: jax.Array) -> jax.Array:
        return fc_backward(projection_backward(dresidual_BTC), dresidual_BTC)

    return residual_BTC + out_BTC, backward


def _normed_linear(
    this: _Pass, norm: str, linear: str, layer: int, residual_BTC: jax.Array
) -> tuple[jax.Array, Callable[[jax.Array, jax.Array], jax.Array]]:
    """A linear layer of a LayerNorm; its backward is as _layer_norm's."""
    h_BTC, norm_backward = _layer_norm(this, norm, layer, residual_BTC)
    y, linear_backward = _linear(this, linear, layer, h_BTC)
    return y, lambda dy, dresidual_BTC: norm_backward(linear_backward(dy), dresidual_BTC)


def _gelu_linear(this: _Pass, linear: str, layer: int, hidden: jax.Array) -> tuple[jax.Array, _Backward]:
    active = _call(custom_calls.GELU, _like(hidden), hidden)
    y, linear_backward = _linear(this, linear, layer, active)
    return y, lambda dy: _call(custom_calls.GELU_BACKWARD, _like(hidden), hidden, linear_backward(dy))


def _layer_norm(
    this: _Pass, name: str, layer: int, x_BTC: jax.Array
) -> tuple[jax.Array, Callable[[jax.Array, jax.Array], jax.Array]]:
    """Its backward also takes the cotangent that reaches the residual stream x around it, and returns their sum."""
    gain_C, bias_C = (this.view(name + part, layer).array() for part in "wb")
    h_BTC = _call(custom_calls.LAYER_NORM, _like(x_BTC), x_BTC, gain_C, bias_C)

    def backward(dh_BTC: jax.Array, dresidual_BTC: jax.Array) -> jax.Array:
        results = (_like(x_BTC), _like(gain_C), _like(bias_C))
        dx_BTC, dgain_C, dbias_C = _call(custom_calls.LAYER_NORM_BACKWARD, results, x_BTC, gain_C, dh_BTC, dresidual_BTC)
        this.gradient.write(name + "w", layer, dgain_C)
        this.gradient.write(name + "b", layer, dbias_C)
        return dx_BTC

    return h_BTC, backward


def _linear(this: _Pass, name: str, layer: int, x: jax.Array) -> tuple[jax.Array, _Backward]:
    w_OI, b_O = this.view(name + "w", layer), this.view(name + "b", layer)
    x_MI = x.reshape(-1, x.shape[-1])
    y_MO = matmul(x_MI, w_OI, transpose_b=True, bias=b_O, out_dtype=x.dtype, implementation=this.implementation)

    def backward(dy: jax.Array) -> jax.Array:
        dy_MO = dy.reshape(y_MO.shape)
        this.gradient.write_product(name + "w", layer, dy_MO, x_MI)
        db_O = _call(custom_calls.COLUMN_SUMS, jax.ShapeDtypeStruct(b_O.shape, _FLOAT32), dy_MO)
        this.gradient.write(name + "b", layer, db_O)
        return matmul(dy_MO, w_OI, out_dtype=x.dtype, implementation=this.implementation).reshape(x.shape)

    return y_MO.reshape(*x.shape[:-1], -1), backward


def _classify(this: _Pass, h_BTC: jax.Array, y_BT: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
    """The loss and its cotangent of h; the classifier's gradient of wte is the first to be written."""
    losses: list[jax.Array] = []
    dh: list[jax.Array] = []
    for h_RC, y_R in _classifier_chunks(h_BTC, y_BT):
        if dh:
            h_RC = this.gradient.barrier(h_RC, dh[-1])
        losses_R, dlogits_RV = _row_losses(this, h_RC, y_R, scale / y_BT.size)
        this.gradient.write_product("wte", 0, dlogits_RV, h_RC, more=bool(dh))
        losses.append(losses_R)
        dh.append(matmul(dlogits_RV, this.view("wte"), out_dtype=h_RC.dtype, implementation=this.implementation))
    return scale * jnp.mean(jnp.concatenate(losses)), jnp.concatenate(dh).reshape(h_BTC.shape)


def _classifier_chunks(h_BTC: jax.Array, y_BT: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """Rows of both, few enough for their logits; without a barrier between them XLA may make those of all chunks first."""
    h_MC, y_M = h_BTC.reshape(-1, h_BTC.shape[-1]), y_BT.reshape(-1)
    M = y_M.shape[0]
    num_chunks = -(-M // CLASSIFIER_ROWS)
    bounds = [M * chunk // num_chunks for chunk in range(num_chunks + 1)]
    return [(h_MC[start:stop], y_M[start:stop]) for start, stop in pairwise(bounds)]


def _row_losses(this: _Pass, h_RC: jax.Array, y_R: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
    """The losses of some rows, and `scale` times the cotangent of the logits that their sum has."""
    logits_RV = _logits(this, h_RC)
    return _call(
        custom_calls.SOFTMAX_CROSS_ENTROPY,
        (jax.ShapeDtypeStruct(y_R.shape, _FLOAT32), jax.ShapeDtypeStruct(logits_RV.shape, h_RC.dtype)),
        logits_RV,
        y_R,
        aliases={0: 1} if h_RC.dtype == _FLOAT32 else None,
        vocab_size=np.int64(this.layout.config.vocab_size),
        scale=np.float32(scale),
    )


def _logits(this: _Pass, h_RC: jax.Array) -> jax.Array:
    """Of some rows, the vocabulary's padding too."""
    return matmul(h_RC, this.view("wte"), transpose_b=True, out_dtype=_FLOAT32, implementation=this.implementation)


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _call(target: str, result: Any, *args: jax.Array, **attributes: Any) -> Any:
    return jax_compat.ffi_call(target, result, *args, num_threads=np.int64(custom_calls.num_threads()), **attributes)
