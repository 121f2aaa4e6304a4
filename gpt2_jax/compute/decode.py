"""The forward pass with a cache of keys and values: a text goes on without computing anew what was computed before.

The model's code is that of training; attention and the embedding know of the cache, and products may read a copy of their
weights. One function serves both phases, prefill (T tokens at position 0) and decode (one token at position `start`), and
is compiled once for each pair of lengths.

Further dimensions: L layers, S positions of the cache, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from gpt2_jax.buffer.weights import Weights
from gpt2_jax.compute.plan import Plan
from gpt2_jax.models import gpt2 as model
from gpt2_jax.ops.activation import activation_of
from gpt2_jax.ops.attention import attention_of, by_heads
from gpt2_jax.ops.matmul import CUSTOM_CALLS, product
from gpt2_jax.ops.summed import Summed, summed
from gpt2_jax.ops.threaded import WeightView, rounded
from gpt2_jax.ops.writer import AllSlots, empty_slots

Cache = tuple[tuple[jax.Array, jax.Array], ...]  # of each layer its keys and its values, (B, H, S, D) in the dtype of products


@struct.dataclass
class DecodingWeights:
    """What a text is made from: the flat buffer, and the weights of products as they are read for every token."""

    flat_N: jax.Array
    # By tensor, one flat array for each layer, in the dtype of products; empty where products read the buffer itself.
    products: dict[str, tuple[jax.Array, ...]]


def decoding_weights(plan: Plan, params_N: jax.Array) -> DecodingWeights:
    """The weights of a model, with what would otherwise be made anew for each token.

    A custom call reads a float32 weight where it lies. Anything else wants an array of its own, in the dtype of products:
    a weight that is cut out of the buffer, or rounded, for every token costs more than the product itself.
    """
    reads_in_place = plan.linear.name in CUSTOM_CALLS and params_N.dtype == plan.compute_dtype
    if reads_in_place or not plan.backend.caches_keys:
        return DecodingWeights(params_N, {})
    return DecodingWeights(params_N, _weights_of_products(plan, params_N))


@partial(jax.jit, static_argnums=0)
def _weights_of_products(plan: Plan, params_N: jax.Array) -> dict[str, tuple[jax.Array, ...]]:
    def weight(offset: int, size: int) -> jax.Array:
        return rounded(lax.slice(params_N, (offset,), (offset + size,)), plan.compute_dtype)

    return {
        tensor.name: tuple(weight(tensor.layer_offset(layer), tensor.layer_size) for layer in range(tensor.num_layers))
        for tensor in plan.layout.tensors
        if tensor.multiplies
    }


def empty_cache(plan: Plan, batch_size: int, length: int) -> Cache:
    """A cache for texts of up to `length` tokens; ValueError for more than the model's positions."""
    if length > plan.config.max_sequence_length:
        raise ValueError(f"empty_cache: expected at most {plan.config.max_sequence_length} positions, found {length}")
    shape = (batch_size, plan.config.num_heads, length, plan.config.channels // plan.config.num_heads)

    def zeros() -> jax.Array:
        return jnp.zeros(shape, plan.compute_dtype)

    return tuple((zeros(), zeros()) for _ in range(plan.config.num_layers))


def extend(
    plan: Plan, weights: DecodingWeights, cache: Cache, x_BT: np.ndarray, *, start: int, last: int
) -> tuple[jax.Array, Cache]:
    """Logits (B, vocab_size) float32 of the token after x[:, last], and the cache with keys and values of x; the old cache
    is gone.

    x (int32) stands at the positions from `start` on. ValueError where it ends behind the cache: XLA would move it to the
    front until it fits, and say nothing. What the cache holds behind `start` + `last` is never read before it is
    overwritten, so x may be padded.
    """
    (B, T), S = x_BT.shape, cache[0][0].shape[2]
    if not 0 <= start <= S - T or not 0 <= last < T:
        raise ValueError(f"extend: expected {T} tokens within {S} cached positions, found the position {start}, last {last}")
    if cache[0][0].shape[0] != B:
        raise ValueError(f"extend: expected {cache[0][0].shape[0]} texts, found {B}")
    return _extend(plan, weights, cache, x_BT, np.int32(start), np.int32(last))


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _extend(
    plan: Plan, weights: DecodingWeights, cache: Cache, x_BT: jax.Array, start: jax.Array, last: jax.Array
) -> tuple[jax.Array, Cache]:
    with plan.precision():
        cached = _CachedWeights(plan, weights, list(cache), start)
        h_BTC = model.hidden_states(cached, x_BT)
        h_BC = lax.dynamic_index_in_dim(h_BTC, last, axis=1, keepdims=False)
        logits_BV = product(plan, h_BC, cached.weight(model.CLASSIFIER), None, jnp.dtype(jnp.float32))
        return logits_BV[:, : plan.config.vocab_size], tuple(cached.cache)


class _CachedWeights(Weights):
    """The weights of a model, or of one of its layers, that reads and writes the cache from position `start` on."""

    def __init__(
        self,
        plan: Plan,
        weights: DecodingWeights,
        cache: list[tuple[jax.Array, jax.Array]],
        start: jax.Array,
        layer: int = 0,
    ):
        slots: AllSlots = {name: (of_layers[min(layer, len(of_layers) - 1)],) for name, of_layers in empty_slots(plan).items()}
        super().__init__(plan, weights.flat_N, slots, layer=layer)
        self.cache, self._weights, self._start = cache, weights, start

    @property
    def attention_parts(self) -> int:
        return 3

    def weight(self, name: str) -> WeightView:
        """The weight of a product."""
        if name not in self._weights.products:
            return self._site(name).view(self.flat_N, name)
        of_layers = self._weights.products[name]
        return WeightView(of_layers[min(self._layer, len(of_layers) - 1)], 0, self.plan.layout[name].shape)

    def embedding(self, tokens: str, positions: str, x_BT: jax.Array) -> Summed:
        """As that of training, with the position table read from `start` on."""
        C = self.plan.config.channels
        wte, wpe = self.plan.layout[tokens], self.plan.layout[positions]
        rows = lax.GatherDimensionNumbers(offset_dims=(2,), collapsed_slice_dims=(), start_index_map=(0,))
        # Rows are gathered from the buffer itself: a slice of the table would be a copy of it.
        places_BT1 = (x_BT * C + wte.offset)[..., None]
        tokens_BTC = lax.gather(self.flat_N, places_BT1, rows, (C,), mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS)
        T = x_BT.shape[1]
        positions_TC = lax.dynamic_slice(self.flat_N, (wpe.offset + self._start * C,), (T * C,)).reshape(T, C)
        return summed((tokens_BTC + positions_TC[None]).astype(self.plan.compute_dtype))

    def norm_linear(self, norm: str, name: str, x: Summed, *, parts: int = 1) -> tuple[Summed, ...]:
        """As that of training, but never with the gain folded into the weight: that would be done for each token."""
        y = self.linear(name, summed(self.norm(norm, x))).value
        return x, *map(summed, jnp.split(y, parts, axis=-1))

    def linear(self, name: str, x: Summed) -> Summed:
        with jax.named_scope(name):
            bias = self._site(name + "b").view(self.flat_N, name + "b")
            return summed(product(self.plan, x.value, self.weight(name + "w"), bias, x.value.dtype))

    def activation_linear(self, name: str, x: Summed) -> Summed:
        return self.linear(name, summed(activation_of(self.plan).function(x.value)))

    def attention(self, *qkv: Summed) -> Summed:
        """Attention (B, T, C) of q over the cache, into which k and v are written first."""
        with jax.named_scope("attention"):
            q, k, v = (x.value for x in qkv)
            keys_BHSD, values_BHSD = (
                lax.dynamic_update_slice_in_dim(old, jnp.swapaxes(by_heads(self.plan, new), 1, 2), self._start, axis=2)
                for old, new in zip(self.cache[self._layer], (k, v), strict=True)
            )
            self.cache[self._layer] = keys_BHSD, values_BHSD
            return summed(attention_of(self.plan).cached(self.plan, q, keys_BHSD, values_BHSD, self._start))

    def layers(self, block: Callable[[Weights, Summed], Summed], x: Summed) -> Summed:
        for layer in range(self.plan.config.num_layers):
            with jax.named_scope(f"layer_{layer}"):
                x = block(_CachedWeights(self.plan, self._weights, self.cache, self._start, layer), x)
        return x
