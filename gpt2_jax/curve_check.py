"""Whether a run's losses follow PyTorch's: the same weights, batches and schedule, trained anew by PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import torch

from gpt2_jax.benchmark.pytorch_model import GPT2, make_optimizer, model_from_buffer
from gpt2_jax.compute.step import schedule_of
from gpt2_jax.config import RunConfig
from gpt2_jax.data.batches import open_data
from gpt2_jax.errors import announce
from gpt2_jax.files import atomic_write
from gpt2_jax.interop.pytorch import clip_gradients
from gpt2_jax.report.log import RunLog
from gpt2_jax.training.run import starting_weights


@dataclass(frozen=True)
class Curves:
    """Losses in nats a token, by step."""

    run: dict[int, float]
    pytorch: dict[int, float]

    def differences(self) -> dict[int, float]:
        """The run's loss over PyTorch's, less 1, of every step that both have."""
        return {step: self.run[step] / loss - 1.0 for step, loss in self.pytorch.items() if step in self.run}


def follow(config: RunConfig, log: RunLog, steps: int, device: str, say: Callable[[int, float, float], None]) -> Curves:
    """Train PyTorch as the run in `log` was trained, for at most so many of its steps; `say` is given each step's number
    and both losses.

    float32, or autocast to bfloat16 as the run's dtype says; parameters are float32. PyTorch computes what the run does:
    llm.c's clipping, AdamW that decays matrices and embeddings, the softmax over the true vocabulary.
    """
    of_run = {step: loss for step, loss in log.finite_values("train", "loss").items() if step <= steps}
    of_pytorch: dict[int, float] = {}
    for step, loss in zip(sorted(of_run), _losses(config, device), strict=False):
        of_pytorch[step] = loss
        say(step, of_run[step], loss)
    return Curves(of_run, of_pytorch)


def _losses(config: RunConfig, device: str) -> Iterator[float]:
    sizes, params = starting_weights(config, announce)
    data, settings = open_data(config, sizes), config.optimizer
    steps = config.run.steps or data.train.num_tokens // config.tokens_per_step
    schedule = schedule_of(settings, steps)
    model = model_from_buffer(params, sizes, true_vocabulary=True).to(device)
    optimizer = make_optimizer(model, settings.learning_rate, settings.weight_decay)
    for group in optimizer.param_groups:
        group.update(betas=(settings.beta1, settings.beta2), eps=settings.epsilon)
    for step in range(steps):
        batch = data.next_batch()
        for group in optimizer.param_groups:
            group["lr"] = float(schedule(jnp.asarray(step)))
        optimizer.zero_grad()
        loss = 0.0
        for x_BT, y_BT in zip(batch.x_ABT, batch.y_ABT, strict=True):
            loss += _add_gradient(model, x_BT, y_BT, 1.0 / len(batch.x_ABT), config.compute.dtype, device)
        clip_gradients(model.parameters(), settings.gradient_clip or math.inf)
        optimizer.step()
        yield loss


def _add_gradient(model: GPT2, x_BT: np.ndarray, y_BT: np.ndarray, scale: float, dtype: str, device: str) -> float:
    x, y = (torch.from_numpy(tokens.astype(np.int64)).to(device) for tokens in (x_BT, y_BT))
    with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = model(x, y) * scale
    loss.backward()
    return float(loss.detach())


def draw(curves: Curves, path: Path, title: str) -> None:
    """A PNG of both curves, and below them of their difference in percent."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot(list(curves.pytorch), list(curves.pytorch.values()), label="PyTorch", linewidth=2.5, alpha=0.5)
    above.plot(list(curves.run), list(curves.run.values()), label="this run", linewidth=1.0)
    differences = curves.differences()
    below.plot(list(differences), [100 * difference for difference in differences.values()], linewidth=1.0)
    above.set_title(title)
    above.set_ylabel("loss (nats per token)")
    below.set_ylabel("difference (%)")
    below.set_xlabel("step")
    above.legend()
    for axes in (above, below):
        axes.grid(alpha=0.3)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
