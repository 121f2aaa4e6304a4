"""A training step that is a Python function: nothing is compiled, and the state stays as it is."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from gpt2_jax.compute.stability import Verdict
from gpt2_jax.compute.step import Metrics


class Scalar:
    """A float on a device: reading it before it is ready is noted, as it makes the program wait."""

    def __init__(self, value: float, ready: bool):
        self.value, self.ready = value, ready

    def is_ready(self) -> bool:
        return self.ready

    def __float__(self) -> float:
        return self.value


@dataclass
class FakeStep:
    """In place of a compiled step: counts its calls, and returns the losses that it was given."""

    happened: list[str] = field(default_factory=list)
    losses: dict[int, float] = field(default_factory=dict)
    ready: bool = False
    seeds: list[tuple[np.ndarray, ...]] = field(default_factory=list)
    calls: int = 0

    def __call__(self, state, x_ABT, y_ABT, *seeds):
        self.calls += 1
        self.seeds.append(seeds)
        self.happened.append(f"step {self.calls}")
        loss = self.losses.get(self.calls, 3.0)
        verdict = Verdict(np.bool_(np.isfinite(loss)), np.bool_(np.isfinite(loss)), np.zeros(2, np.float32))
        metrics = Metrics(Scalar(loss, self.ready), np.float32(1), np.float32(1e-3), np.full(16, loss, np.float32), verdict)
        return state, metrics

    def memory_analysis(self) -> None:
        """What a compiler would count; it is not known."""
