"""GPT-2 in MLX as its users write it: mlx.nn's layers, mx.fast's attention, a compiled step. What bench_train.py calls mlx.

It computes what this project computes, but for the padding of the vocabulary, which is part of the softmax here unless
the true vocabulary is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx import optimizers
from mlx.utils import tree_flatten, tree_map

from gpt2_jax.families.gpt2 import GPT2Config

# As in gpt2_jax/buffer/adamw.py. Importing it would load JAX into the process whose memory is measured.
BETA1, BETA2, EPSILON = 0.9, 0.95, 1e-8
GRADIENT_CLIP = 1.0


class _Block(nn.Module):  # type: ignore[misc]
    def __init__(self, config: GPT2Config):
        super().__init__()
        C = config.channels
        self.num_heads = config.num_heads
        self.ln1, self.ln2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.attproj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.fc, self.fcproj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def __call__(self, x_BTC: mx.array) -> mx.array:
        B, T, C = x_BTC.shape
        parts = mx.split(self.qkv(self.ln1(x_BTC)), 3, axis=-1)
        q, k, v = (part.reshape(B, T, self.num_heads, -1).transpose(0, 2, 1, 3) for part in parts)
        a_BHTD = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask="causal")
        x_BTC = x_BTC + self.attproj(a_BHTD.transpose(0, 2, 1, 3).reshape(B, T, C))
        return x_BTC + self.fcproj(nn.gelu_approx(self.fc(self.ln2(x_BTC))))


class GPT2(nn.Module):  # type: ignore[misc]
    """(x, y) -> mean cross-entropy; float32 parameters. With `true_vocabulary` the padding takes no part in the softmax."""

    def __init__(self, config: GPT2Config, *, true_vocabulary: bool = False):
        super().__init__()
        self.classes = config.vocab_size if true_vocabulary else config.padded_vocab_size
        self.wte = nn.Embedding(config.padded_vocab_size, config.channels)
        self.wpe = nn.Embedding(config.max_sequence_length, config.channels)
        self.blocks = [_Block(config) for _ in range(config.num_layers)]
        self.lnf = nn.LayerNorm(config.channels)

    def __call__(self, x_BT: mx.array, y_BT: mx.array) -> mx.array:
        h_BTC = self.wte(x_BT) + self.wpe(mx.arange(x_BT.shape[1]))
        for block in self.blocks:
            h_BTC = block(h_BTC)
        logits_BTV = self.lnf(h_BTC) @ self.wte.weight[: self.classes].T
        return nn.losses.cross_entropy(logits_BTV.astype(mx.float32), y_BT, reduction="mean")


def model_from_buffer(params_N: np.ndarray, config: GPT2Config, **options: bool) -> GPT2:
    """A model with the flat buffer's values; its weights are (outputs, inputs) too."""
    model = GPT2(config, **options)
    tensors = config.layout.views(params_N)

    def of_buffer(name: str) -> mx.array:
        *path, kind = name.split(".")
        tensor = tensors[path[-1] if path[-1] in ("wte", "wpe") else path[-1] + kind[0]]
        return mx.array(tensor[int(path[1])] if path[0] == "blocks" else tensor)

    model.load_weights([(name, of_buffer(name)) for name, _ in tree_flatten(model.parameters())])
    return model


def buffer_from_tree(tree: Any, config: GPT2Config) -> np.ndarray:
    """Parameters, or their gradients, as a flat buffer; padding rows are as they are."""
    buffer_N = np.zeros(config.layout.num_parameters, np.float32)
    tensors = config.layout.views(buffer_N)
    for name, value in tree_flatten(tree):
        *path, kind = name.split(".")
        tensor = tensors[path[-1] if path[-1] in ("wte", "wpe") else path[-1] + kind[0]]
        (tensor[int(path[1])] if path[0] == "blocks" else tensor)[...] = np.array(value)
    return buffer_N


def make_loss_and_gradient(model: GPT2, dtype: mx.Dtype) -> Callable[[Any, mx.array, mx.array], tuple[mx.array, Any]]:
    """(parameters, x, y) -> loss and gradient, both float32, with activations and products in `dtype`; the model's own
    parameters are replaced."""

    def loss_of(parameters: Any, x_BT: mx.array, y_BT: mx.array) -> mx.array:
        model.update(tree_map(lambda parameter: parameter.astype(dtype), parameters))
        return model(x_BT, y_BT)

    return mx.value_and_grad(loss_of)


def make_train_step(
    model: GPT2, learning_rate: float, weight_decay: float, dtype: mx.Dtype
) -> Callable[[mx.array, mx.array], mx.array]:
    """The compiled step (x, y) -> loss, of tokens (A, B, T): gradients of A micro-batches, clipping, AdamW; matrices and
    embeddings decay. The model and the optimizer keep their state."""
    adamw = partial(optimizers.AdamW, learning_rate, betas=[BETA1, BETA2], eps=EPSILON, bias_correction=True)
    optimizer = optimizers.MultiOptimizer(
        [adamw(weight_decay=weight_decay), adamw(weight_decay=0.0)], [lambda name, parameter: parameter.ndim >= 2]
    )
    optimizer.init(model.trainable_parameters())
    loss_and_gradient = make_loss_and_gradient(model, dtype)
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(x_ABT: mx.array, y_ABT: mx.array) -> mx.array:
        parameters = model.trainable_parameters()
        A = x_ABT.shape[0]
        total, gradient = loss_and_gradient(parameters, x_ABT[0], y_ABT[0])
        for number in range(1, A):
            loss, more = loss_and_gradient(parameters, x_ABT[number], y_ABT[number])
            total, gradient = total + loss, tree_map(mx.add, gradient, more)
        gradient, _ = optimizers.clip_grad_norm(tree_map(lambda each: each / A, gradient), GRADIENT_CLIP)
        model.update(parameters)
        optimizer.update(model, gradient)
        return total / A

    def evaluated(x_ABT: mx.array, y_ABT: mx.array) -> mx.array:
        loss = step(x_ABT, y_ABT)
        mx.async_eval(loss, state)  # MLX computes nothing before it is asked to
        return loss

    return evaluated
