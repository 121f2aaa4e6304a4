"""GPT-2 in PyTorch as one trains it: fused attention, tied classifier. The peer that bench_train.py calls pytorch.

It computes what this project computes, but for the padding of the vocabulary, which is part of the softmax here unless
the true vocabulary is asked for.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional

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

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        B, T, C = x_BTC.shape
        parts = self.qkv(self.ln1(x_BTC)).split(C, dim=2)
        q, k, v = (part.view(B, T, self.num_heads, C // self.num_heads).transpose(1, 2) for part in parts)
        a_BHTD = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTC = x_BTC + self.attproj(a_BHTD.transpose(1, 2).reshape(B, T, C))
        return x_BTC + self.fcproj(functional.gelu(self.fc(self.ln2(x_BTC)), approximate="tanh"))


class GPT2(nn.Module):  # type: ignore[misc]
    """(x, y) -> mean cross-entropy; float32 parameters. With `true_vocabulary` the padding takes no part in the softmax,
    which is slower; with `low_residual` the residual stream is bfloat16."""

    def __init__(self, config: GPT2Config, *, true_vocabulary: bool = False, low_residual: bool = False):
        super().__init__()
        self.low_residual = low_residual
        self.classes = config.vocab_size if true_vocabulary else config.padded_vocab_size
        self.wte = nn.Embedding(config.padded_vocab_size, config.channels)
        self.wpe = nn.Embedding(config.max_sequence_length, config.channels)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.num_layers))
        self.lnf = nn.LayerNorm(config.channels)

    def forward(self, x_BT: torch.Tensor, y_BT: torch.Tensor) -> torch.Tensor:
        h_BTC = self.wte(x_BT) + self.wpe(torch.arange(x_BT.shape[1], device=x_BT.device))
        if self.low_residual:
            h_BTC = h_BTC.to(torch.bfloat16)
        for block in self.blocks:
            h_BTC = block(h_BTC)
        logits_BTV = functional.linear(self.lnf(h_BTC), self.wte.weight[: self.classes])
        return functional.cross_entropy(logits_BTV.flatten(0, 1), y_BT.flatten())


def model_from_buffer(params_N: np.ndarray, config: GPT2Config, **options: bool) -> GPT2:
    """A model with the flat buffer's values and GPT2's options; its weights are (outputs, inputs) too."""
    model = GPT2(config, **options)
    tensors = config.layout.views(params_N)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            *path, kind = name.split(".")
            tensor = tensors[path[-1] if path[-1] in ("wte", "wpe") else path[-1] + kind[0]]
            parameter.copy_(torch.from_numpy(tensor[int(path[1])] if path[0] == "blocks" else tensor))
    return model


def make_optimizer(model: GPT2, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """Fused AdamW; matrices and embeddings decay."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(BETA1, BETA2), eps=EPSILON, fused=True)
