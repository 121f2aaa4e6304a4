"""A second, independent GPT-2, written with flax.nnx's own layers, gives the same logits and loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt2_jax.compute.forward import all_logits, make_loss_function
from tests.conftest import TINY, plan_of

nnx = pytest.importorskip("flax.nnx")


class Block(nnx.Module):
    def __init__(self, channels, heads, rngs):
        self.ln_1 = nnx.LayerNorm(channels, epsilon=1e-5, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, channels, decode=False, rngs=rngs)
        self.ln_2 = nnx.LayerNorm(channels, epsilon=1e-5, rngs=rngs)
        self.fc = nnx.Linear(channels, 4 * channels, rngs=rngs)
        self.proj = nnx.Linear(4 * channels, channels, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.ln_1(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.proj(nnx.gelu(self.fc(self.ln_2(x)), approximate=True))


class Gpt2(nnx.Module):
    def __init__(self, config, tensors):
        rngs = nnx.Rngs(0)
        C, H = config.channels, config.num_heads
        self.wte = nnx.Embed(config.vocab_size, C, rngs=rngs)
        self.wpe = nnx.Embed(config.max_sequence_length, C, rngs=rngs)
        self.ln_f = nnx.LayerNorm(C, epsilon=1e-5, rngs=rngs)
        assign(self.wte.embedding, tensors["wte"][: config.vocab_size])
        assign(self.wpe.embedding, tensors["wpe"])
        assign(self.ln_f.scale, tensors["lnfw"])
        assign(self.ln_f.bias, tensors["lnfb"])
        self.depth = config.num_layers
        for i in range(config.num_layers):
            block = Block(C, H, rngs)
            for norm, name in ((block.ln_1, "ln1"), (block.ln_2, "ln2")):
                assign(norm.scale, tensors[name + "w"][i])
                assign(norm.bias, tensors[name + "b"][i])
            for projection, w, b in zip(
                (block.attention.query, block.attention.key, block.attention.value),
                np.split(tensors["qkvw"][i], 3),
                np.split(tensors["qkvb"][i], 3),
                strict=True,
            ):
                assign(projection.kernel, w.T.reshape(C, H, C // H))
                assign(projection.bias, b.reshape(H, C // H))
            assign(block.attention.out.kernel, tensors["attprojw"][i].T.reshape(H, C // H, C))
            assign(block.attention.out.bias, tensors["attprojb"][i])
            for layer, name in ((block.fc, "fc"), (block.proj, "fcproj")):
                assign(layer.kernel, tensors[name + "w"][i].T)
                assign(layer.bias, tensors[name + "b"][i])
            setattr(self, f"block_{i}", block)

    def __call__(self, x_BT):
        h = self.wte(x_BT) + self.wpe(jnp.arange(x_BT.shape[1]))[None]
        for i in range(self.depth):
            h = getattr(self, f"block_{i}")(h)
        return self.wte.attend(self.ln_f(h))


def assign(parameter, value):
    assert parameter.shape == value.shape
    # flax renamed the setter; the versions for the oldest jax have only the property.
    if hasattr(type(parameter), "set_value"):
        parameter.set_value(jnp.asarray(value))
    else:
        parameter.value = jnp.asarray(value)


def test_logits_and_loss_equal(tiny_layout, tiny_params, tiny_batch):
    x, y = tiny_batch
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        logits = Gpt2(TINY, tiny_layout.views(tiny_params))(x)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    ours = jax.jit(lambda params: all_logits(plan_of(), params, x))(tiny_params)
    np.testing.assert_allclose(ours, logits, rtol=0, atol=1e-5)
    assert abs(float(make_loss_function(plan_of())(tiny_params, x, y)) - float(loss)) < 1e-5
