"""The forward pass with a cache of keys and values: a text goes on without computing anew what was computed before.

The model's code is that of training; only attention and the embedding know of the cache. One function serves both phases,
prefill (T tokens at position 0) and decode (one token at position `start`), and is compiled once for each pair of lengths.

Further dimensions: L layers, S positions of the cache, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from gpt2_jax.buffer.weights import Weights
from gpt2_jax.compute.plan import Plan
from gpt2_jax.models import gpt2 as model
from gpt2_jax.ops.attention import attention, by_heads
from gpt2_jax.ops.classifier import logits
from gpt2_jax.ops.summed import Summed, summed
from gpt2_jax.ops.threaded import Site
from gpt2_jax.ops.writer import AllSlots, empty_slots

Cache = tuple[tuple[jax.Array, jax.Array], ...]  # of each layer its keys and its values, (B, S, H, D) in the dtype of products


def empty_cache(plan: Plan, batch_size: int, length: int) -> Cache:
    """A cache for texts of up to `length` tokens; at most the model's positions."""
    shape = (batch_size, length, plan.config.num_heads, plan.config.channels // plan.config.num_heads)

    def zeros() -> jax.Array:
        return jnp.zeros(shape, plan.compute_dtype)

    return tuple((zeros(), zeros()) for _ in range(plan.config.num_layers))


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def extend(
    plan: Plan, params_N: jax.Array, cache: Cache, x_BT: jax.Array, start: jax.Array, last: jax.Array
) -> tuple[jax.Array, Cache]:
    """Logits (B, vocab_size) float32 of the token after x[:, last], and the cache with keys and values of x.

    x (int32) stands at the positions from `start` on, both int32 scalars; start + T must not exceed the cache's length.
    What the cache holds behind `start` + `last` is never read before it is overwritten, so x may be padded.
    """
    with plan.precision():
        weights = _CachedWeights(plan, params_N, list(cache), start)
        h_BTC = model.hidden_states(weights, x_BT)
        h_BC = lax.dynamic_index_in_dim(h_BTC, last, axis=1, keepdims=False)
        logits_BV = logits(Site(plan, (model.CLASSIFIER,)), h_BC, params_N)
        return logits_BV[:, : plan.config.vocab_size], tuple(weights.cache)


class _CachedWeights(Weights):
    """The weights of a model, or of one of its layers, that reads and writes the cache from position `start` on."""

    def __init__(
        self, plan: Plan, flat_N: jax.Array, cache: list[tuple[jax.Array, jax.Array]], start: jax.Array, layer: int = 0
    ):
        slots: AllSlots = {name: (of_layers[min(layer, len(of_layers) - 1)],) for name, of_layers in empty_slots(plan).items()}
        super().__init__(plan, flat_N, slots, layer=layer)
        self.cache, self._start = cache, start

    @property
    def attention_parts(self) -> int:
        return 3

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

    def attention(self, *qkv: Summed) -> Summed:
        """Attention (B, T, C) of q over the cache, into which k and v are written first."""
        q, k, v = (by_heads(self.plan, x.value) for x in qkv)
        keys, values = (
            lax.dynamic_update_slice_in_dim(old, new, self._start, axis=1)
            for old, new in zip(self.cache[self._layer], (k, v), strict=True)
        )
        self.cache[self._layer] = keys, values
        seen_TS = _seen(q.shape[1], keys.shape[1], self._start)
        return summed(attention(q, keys, values, seen_TS).reshape(qkv[0].value.shape))

    def layers(self, block: Callable[[Weights, Summed], Summed], x: Summed) -> Summed:
        for layer in range(self.plan.config.num_layers):
            with jax.named_scope(f"layer_{layer}"):
                x = block(_CachedWeights(self.plan, self.flat_N, self.cache, self._start, layer), x)
        return x


def _seen(T: int, S: int, start: jax.Array) -> jax.Array:
    """Which of S cached positions each of T new ones sees: those up to its own."""
    own_TS = start + lax.broadcasted_iota(jnp.int32, (T, S), 0)
    return lax.broadcasted_iota(jnp.int32, (T, S), 1) <= own_TS
