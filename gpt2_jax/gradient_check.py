"""Loss, logits, all gradients and ten optimizer steps of this project against PyTorch's, with tolerances."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.buffer.adamw import BETA1, BETA2, EPSILON, GRADIENT_CLIP
from gpt2_jax.compute.forward import all_logits
from gpt2_jax.compute.plan import Plan
from gpt2_jax.compute.step import accumulated_gradient, compile_step, create_state
from gpt2_jax.config import OptimizerSettings
from gpt2_jax.families.family import FamilyConfig
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.interop.pytorch import clip_gradients, make_pytorch_model, pytorch_gradients, pytorch_loss

if TYPE_CHECKING:
    import torch

STEPS = 10
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 10.0  # strong, so that a tensor that wrongly decays, or does not, shows in ten steps' losses


@dataclass(frozen=True)
class Comparison:
    """One quantity: the largest differences, and the largest share of the tolerance that any element uses."""

    name: str
    max_absolute: float
    max_relative: float  # largest difference over the largest reference value
    used_tolerance: float

    @property
    def passed(self) -> bool:
        return self.used_tolerance <= 1.0  # false for NaN too


def check_gradients(plan: Plan, params: np.ndarray, x_BT: np.ndarray, y_BT: np.ndarray) -> list[Comparison]:
    """Compare what the plan's training step computes with PyTorch in float32 on the CPU: one Comparison each for the loss,
    the logits, the gradient of every tensor, and the losses of ten AdamW steps on the batch.

    float32 tolerances: loss 1e-5, logits 1e-3 (llm.c's), gradients 1e-6 + 1e-3 |ref|, ten-step losses 1e-4.
    bfloat16 has 8 bits and about 10 L roundings from a weight to its gradient, taken as independent: an error of
    e = 2^-8 sqrt(10 L) of the largest value in every tensor and in the logits. Every update then points wrongly by as
    much, and so does what the loss falls by in ten of them: e times that fall. The loss itself: llm.c's 0.05.
    """
    config, layout, dtype = plan.config, plan.layout, plan.dtype
    assert isinstance(config, GPT2Config)  # as PyTorch's model is
    reference = make_pytorch_model(config, params)
    reference_logits, reference_loss = pytorch_loss(reference, x_BT, y_BT)
    reference_loss.backward()
    reference_grads = layout.views(pytorch_gradients(reference, config))
    reference_losses = pytorch_training_losses(
        reference, x_BT, y_BT, steps=STEPS, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY
    )

    x, y = jnp.asarray(x_BT), jnp.asarray(y_BT)
    # Over garbage, which the gradient must replace.
    garbage = jnp.full(layout.num_parameters, jnp.nan) if plan.writes_in_place else None
    loss, grads_N, _ = jax.jit(partial(accumulated_gradient, plan))(jnp.asarray(params), garbage, x[None], y[None])
    logits_BTV = jax.jit(partial(all_logits, plan))(jnp.asarray(params), x)
    grads, losses = layout.views(np.asarray(grads_N)), _training_losses(plan, params, x, y)

    return [
        _compare("loss", np.asarray(loss), np.asarray(reference_loss.detach()), 1e-5 if dtype == "float32" else 0.05),
        compare_logits(np.asarray(logits_BTV), reference_logits.detach().numpy(), config, dtype),
        *compare_gradients(grads, reference_grads, config, dtype),
        compare_losses(losses, reference_losses, config, dtype),
    ]


def compare_gradients(
    grads: dict[str, np.ndarray], reference: dict[str, np.ndarray], config: FamilyConfig, dtype: str
) -> list[Comparison]:
    """The gradient of each tensor against the reference's, with check_gradients' tolerances."""

    def tolerance(expected: np.ndarray) -> np.ndarray:
        if dtype == "float32":
            return 1e-6 + 1e-3 * np.abs(expected)
        return np.full_like(expected, _bfloat16_error(config) * np.abs(expected).max())

    return [_compare(f"grad {name}", grads[name], expected, tolerance(expected)) for name, expected in reference.items()]


def compare_logits(logits: np.ndarray, reference: np.ndarray, config: FamilyConfig, dtype: str) -> Comparison:
    """Logits against the reference's, with check_gradients' tolerance."""
    tolerance = 1e-3 if dtype == "float32" else _bfloat16_error(config) * np.abs(reference).max()
    return _compare("logits", logits, reference, tolerance)


def compare_losses(losses: list[float], reference: list[float], config: FamilyConfig, dtype: str) -> Comparison:
    """The losses of training steps against the reference's, with check_gradients' tolerance."""
    tolerance = 1e-4 if dtype == "float32" else _bfloat16_error(config) * (max(reference) - min(reference))
    return _compare(f"{len(losses)} steps' losses", np.array(losses), np.array(reference), tolerance)


def _bfloat16_error(config: FamilyConfig) -> float:
    return 2.0**-8 * math.sqrt(10 * config.num_layers)


def pytorch_training_losses(
    model: torch.nn.Module, x_BT: np.ndarray, y_BT: np.ndarray, *, steps: int, learning_rate: float, weight_decay: float
) -> list[float]:
    """The losses of `steps` updates on one batch with torch.optim.AdamW and llm.c's clipping; the model is changed."""
    import torch

    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=learning_rate,
        betas=(BETA1, BETA2),
        eps=EPSILON,
    )
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = pytorch_loss(model, x_BT, y_BT)[1]
        loss.backward()
        losses.append(float(loss.detach()))
        clip_gradients(parameters, GRADIENT_CLIP)
        optimizer.step()
    return losses


def _training_losses(plan: Plan, params: np.ndarray, x_BT: jax.Array, y_BT: jax.Array) -> list[float]:
    settings = OptimizerSettings(schedule="constant", learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    step = compile_step(plan, settings, STEPS, (1, *x_BT.shape))
    state = create_state(plan, params)
    losses = []
    for _ in range(STEPS):
        state, metrics = step(state, x_BT[None], y_BT[None])
        losses.append(float(metrics.loss))
    return losses


def _compare(name: str, found: np.ndarray, expected: np.ndarray, tolerance: np.ndarray | float) -> Comparison:
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    largest = float(np.abs(expected).max())
    return Comparison(
        name=name,
        max_absolute=float(difference.max()),
        max_relative=float(difference.max()) / largest if largest else 0.0,
        used_tolerance=float((difference / tolerance).max()),
    )
