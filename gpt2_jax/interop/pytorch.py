"""The same GPT-2 in PyTorch, from transformers' own model class: what every gradient is checked against.

Needs the packages of the extra 'test'; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.interop.state_dict import state_dict_names

if TYPE_CHECKING:
    import torch


def make_pytorch_model(config: GPT2Config, params: np.ndarray) -> torch.nn.Module:
    """transformers' GPT2LMHeadModel in float32 on the CPU, without dropout, with the weights of the flat buffer."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise Gpt2JaxError(
            f"PyTorch reference: expected the package {error.name}, found none", "pip install -e '.[test]'"
        ) from None
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.max_sequence_length,
            n_embd=config.channels,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=config.vocab_size - 1,
            eos_token_id=config.vocab_size - 1,
            attn_implementation="eager",
        )
    )
    tensors = config.layout.views(params)
    with torch.no_grad():
        for name, parameter, select in _correspondence(model, config):
            parameter.copy_(torch.from_numpy(np.array(select(tensors[name]))))
    return model.train()


def pytorch_loss(model: torch.nn.Module, x_BT: np.ndarray, y_BT: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, T, V) and mean cross-entropy, both with their graph."""
    import torch

    logits_BTV = model(torch.from_numpy(x_BT.astype(np.int64)), use_cache=False).logits
    targets = torch.from_numpy(y_BT.astype(np.int64)).reshape(-1)
    return logits_BTV, torch.nn.functional.cross_entropy(logits_BTV.reshape(targets.numel(), -1), targets)


def pytorch_gradients(model: torch.nn.Module, config: GPT2Config) -> np.ndarray:
    """The gradients that backward() left, as a flat buffer (num_parameters,) float32 with zero padding rows."""
    layout = config.layout
    grads = np.zeros(layout.num_parameters, dtype=np.float32)
    tensors = layout.views(grads)
    for name, parameter, select in _correspondence(model, config):
        assert parameter.grad is not None  # every parameter of a GPT-2 takes part in its loss
        select(tensors[name])[...] = parameter.grad.numpy()
    return grads


def clip_gradients(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> None:
    """Scale gradients whose norm is larger down to it, as llm.c does; clip_grad_norm_ would add 1e-6 to the denominator."""
    import torch

    gradients = [parameter.grad for parameter in parameters]
    norm = torch.sqrt(sum(torch.sum(torch.square(gradient), dtype=torch.float64) for gradient in gradients))
    if norm > max_norm:
        for gradient in gradients:
            gradient *= max_norm / norm


def _correspondence(
    model: torch.nn.Module, config: GPT2Config
) -> Iterator[tuple[str, torch.nn.Parameter, Callable[[np.ndarray], np.ndarray]]]:
    """Our tensor's name, their parameter, and how to view our tensor in the shape of theirs."""
    theirs = dict(model.transformer.named_parameters())
    layout = config.layout
    for name, layer, their_name in state_dict_names(layout):

        def select(tensor: np.ndarray, name: str = name, layer: int = layer) -> np.ndarray:
            part = tensor[layer] if layout[name].stacked else tensor
            part = part[: layout[name].valid_rows]
            return part.T if layout[name].huggingface_transposed else part

        yield name, theirs[their_name], select
