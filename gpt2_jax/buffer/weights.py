"""The parameter buffer as a model uses it: ops by name, with the threading of the buffer hidden."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax

from gpt2_jax.ops.activation import activation_of
from gpt2_jax.ops.attention import attention_of
from gpt2_jax.ops.embedding import embedding_of
from gpt2_jax.ops.linear import linear
from gpt2_jax.ops.norm import norms_of
from gpt2_jax.ops.recompute import recomputed_if_asked
from gpt2_jax.ops.sharded import scattering_slots
from gpt2_jax.ops.summed import Summed, mapped, summed, value_of
from gpt2_jax.ops.threaded import Site, Slots, ThreadedOp
from gpt2_jax.ops.writer import AllSlots, writer_of

if TYPE_CHECKING:
    from gpt2_jax.compute.plan import Plan


class Weights:
    """The weights of one model, or of one of its layers; every op takes `flat_N` and leaves it for the next.

    Each method applies the plan's implementation of one op, under the op's name in profiles. Arrays are (B, T, ...),
    and those between the embedding and the last norm come as `Summed`.
    """

    def __init__(self, plan: Plan, flat_N: jax.Array, slots: AllSlots, *, layer: int = 0, accumulate: bool = False):
        self.plan, self.flat_N = plan, flat_N
        self._slots, self._layer, self._accumulate = slots, layer, accumulate

    def embedding(self, tokens: str, positions: str, x_BT: jax.Array) -> Summed:
        """Rows of the token table plus rows of the position table, (B, T, C) in the dtype of products."""
        # The classifier has written its part of the tied token table's gradient.
        site = self._site(tokens, positions)._replace(added=(tokens,))
        return summed(self._apply("embedding", embedding_of(self.plan), site, x_BT))

    def norm(self, name: str, x: Summed) -> jax.Array:
        """LayerNorm over the channels."""
        return value_of(self.plan, self._apply(name, norms_of(self.plan).norm, self._site(name + "w", name + "b"), x)[1])

    def norm_linear(self, norm: str, name: str, x: Summed, *, parts: int = 1) -> tuple[Summed, ...]:
        """x itself, to go on with as the residual stream, and the linear layer of its norm in so many equal parts."""
        site = self._site(norm + "w", norm + "b", name + "w", name + "b")._replace(parts=parts)
        op = recomputed_if_asked("layer_norm", norms_of(self.plan).norm_linear, site)
        x, results = self._apply(name, op, site, x)
        return x, *results

    def linear(self, name: str, x: Summed) -> Summed:
        """x wᵀ + b."""
        return self._apply(name, linear, self._site(name + "w", name + "b"), x)

    def activation_linear(self, name: str, x: Summed) -> Summed:
        """The linear layer of the activation of x."""
        site = self._site(name + "w", name + "b")
        return self._apply(name, recomputed_if_asked("gelu", activation_of(self.plan).linear, site), site, x)

    def attention(self, *qkv: Summed) -> Summed:
        """Causal attention (B, T, C) of q, k and v, which norm_linear makes in `attention_parts` arrays."""
        with jax.named_scope("attention"):
            attention = attention_of(self.plan)
            sums = None if attention.sums is None else partial(attention.sums, self.plan)
            return mapped(self.plan, partial(attention.compute, self.plan, self._layer), *qkv, sums=sums)

    @property
    def attention_parts(self) -> int:
        return attention_of(self.plan).parts

    def layers(self, block: Callable[[Weights, Summed], Summed], x: Summed) -> Summed:
        """x through all layers, one after the other; `block` gets the weights of its layer."""
        stacked = tuple(tensor.name for tensor in self.plan.layout.tensors if tensor.stacked)

        def op(site: Site, x: Summed, flat_N: jax.Array, slots: Slots) -> tuple[Summed, jax.Array]:
            if writer_of(self.plan).scatters:
                slots = scattering_slots(self.plan, slots)
            weights = Weights(
                self.plan, flat_N, {name: (slot,) for name, slot in slots.items()}, layer=site.layer, accumulate=site.accumulate
            )
            return block(weights, x), weights.flat_N

        for layer in range(self.plan.config.num_layers):
            site = Site(self.plan, stacked, layer, accumulate=self._accumulate)
            x = self._apply(f"layer_{layer}", recomputed_if_asked("block", op, site), site, x, slot=layer)
        return x

    def _site(self, *names: str) -> Site:
        return Site(self.plan, names, self._layer, accumulate=self._accumulate)

    def _apply(self, scope: str, op: ThreadedOp, site: Site, x: Any, *, slot: int = 0) -> Any:
        with jax.named_scope(scope):
            y, self.flat_N = op(site, x, self.flat_N, {name: self._slots[name][slot] for name in site.names})
        return y
