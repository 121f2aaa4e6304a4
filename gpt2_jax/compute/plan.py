"""The plan: one record of how a run computes, resolved once from settings and backend.

A plan is frozen and hashable, and the static argument of every compiled function. Nobody else asks who computes what.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from gpt2_jax import jax_compat
from gpt2_jax.buffer import adamw
from gpt2_jax.buffer.layout import ParameterLayout
from gpt2_jax.compute.backend import Backend
from gpt2_jax.config import ComputeSettings, OptimizerSettings
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.family import FamilyConfig
from gpt2_jax.ops import activation, attention, classifier, embedding, matmul, norm, recompute, writer
from gpt2_jax.ops.apple.classifier import ON_MLX_ONLY
from gpt2_jax.ops.apple.plugin import ON_JAX_MPS_ONLY
from gpt2_jax.ops.cpu import library
from gpt2_jax.ops.cuda.compiler_options import COMPILER_OPTIONS, DETERMINISTIC_COST, DETERMINISTIC_OPTIONS
from gpt2_jax.ops.table import Choice, Implementation, check_switched_off, choose

# In the order of choosing: `accepts` may ask for the choices before its own.
SEAMS: dict[str, tuple[Implementation, ...]] = {
    "linear": matmul.TABLE,
    "norm_linear": norm.TABLE,
    "attention": attention.TABLE,
    "activation": activation.TABLE,
    "writer": writer.TABLE,
    "classifier": classifier.TABLE,
    "embedding": embedding.TABLE,
    "adamw": adamw.TABLE,
    "barrier": recompute.TABLE,
}
_UNDECIDED = Choice("", "not chosen yet")
# jax's switches that a run cannot heed, and why.
_UNUSABLE_SWITCHES = {
    "jax_disable_jit": "the training step is compiled ahead of time",
    "jax_debug_nans": "the outlier windows hold nan until 128 steps are done; --nonfinite raise names the tensor and the batch",
    "jax_enable_x64": "all buffers are float32",
}


@dataclass(frozen=True)
class Plan:
    """How everything is computed: where, for which model, in which precision, and by which implementation of every seam."""

    backend: Backend
    config: FamilyConfig
    dtype: str  # of products and activations: float32 or bfloat16
    recompute: str  # of ops.recompute.RECOMPUTED
    matmul_precision: str | None  # of float32 products, by jax's names; None is jax's default
    deterministic: bool = False  # the same bits in every run
    devices: int = 1  # that train together
    processes: int = 1  # that have so many of these devices each
    zero: int = 0  # what of a state each of them keeps: compute/parallel.py's stages
    dropout: float = 0.0  # probability, below 1, with which a training step drops an element (ops/dropout.py)
    frozen: tuple[str, ...] = ()  # names of tensors that no step changes
    linear: Choice = _UNDECIDED
    norm_linear: Choice = _UNDECIDED
    attention: Choice = _UNDECIDED
    activation: Choice = _UNDECIDED
    classifier: Choice = _UNDECIDED
    embedding: Choice = _UNDECIDED
    writer: Choice = _UNDECIDED
    adamw: Choice = _UNDECIDED
    barrier: Choice = _UNDECIDED
    # By the names of jax.lax.DotAlgorithmPreset; None where XLA decides.
    product_precision: str | None = None
    weight_gradient_precision: str | None = None

    @cached_property
    def layout(self) -> ParameterLayout:
        """The model's, in which frozen tensors are marked."""
        return self.config.layout.frozen(self.frozen) if self.frozen else self.config.layout

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)

    @property
    def writes_in_place(self) -> bool:
        """Whether a step fills the last step's gradient buffer, rather than making a new one."""
        return writer.writer_of(self).writes_at_once

    def precision(self) -> AbstractContextManager[None]:
        """In it jax traces products of the plan's precision."""
        return jax.default_matmul_precision(self.matmul_precision)

    def describe_precision(self) -> str:
        """The precision of products, for people."""
        if self.product_precision is None:
            return f"XLA's {self.matmul_precision or 'default'}"
        if self.product_precision == self.weight_gradient_precision:
            return self.product_precision
        return f"{self.product_precision}, weights' gradients {self.weight_gradient_precision}"

    def choices(self) -> Iterator[tuple[str, Choice]]:
        """Every seam with what was chosen for it."""
        return ((seam, getattr(self, seam)) for seam in SEAMS)

    def rows(self) -> list[tuple[str, str]]:
        """Names and values for people: the implementation of each seam with the reason, and the refusals, one line a reason."""
        precision = self.matmul_precision or "default"
        rows = [
            ("compute", f"{self.dtype}, matmul precision {precision}, jax {jax.__version__}"),
            ("matmul", f"{self.linear.name} in {self.describe_precision()}: {self.linear.reason}"),
        ]
        if self.deterministic:
            cost = "" if "cuda_libraries" in self.backend.lacks else f"; {DETERMINISTIC_COST}"
            rows.append(("deterministic", f"the same bits in every run on this machine{cost}"))
        others: dict[tuple[str, str], list[str]] = {}
        refused: dict[str, list[str]] = {}
        for seam, choice in self.choices():
            if seam != "linear":
                others.setdefault((choice.name, choice.reason), []).append(seam)
            for name, reason in choice.refusals:
                # Nobody misses an implementation for another kind of device.
                if reason not in (matmul.ON_NVIDIA_ONLY, ON_JAX_MPS_ONLY, ON_MLX_ONLY):
                    refused.setdefault(reason, []).append(name if seam == "linear" else f"{seam}:{name}")
        rows += [("ops", f"{name} for {', '.join(seams)}: {reason}") for (name, reason), seams in others.items()]
        return rows + [("", f"not {', '.join(names)}: {reason}") for reason, names in refused.items()]

    def fallbacks(self) -> list[str]:
        """The better implementations that were refused for a cause that the user can mend, each with the cause."""
        found = [reason for _, choice in self.choices() for reason in choice.fallbacks]
        if self.recompute != "none" and not recompute.saves_memory(self):
            found.append(f"recompute: {self.saves_nothing()}")
        return found

    def saves_nothing(self) -> str:
        """Why --recompute saves no memory where it does not."""
        compiler = self.backend.plugin or f"XLA for {self.backend.name}"
        return f"{compiler} keeps all the same what is to be computed anew, so little or no memory is saved"

    def compiler_options(self) -> dict[str, str | bool]:
        """XLA's options for this device; gpt2_jax/ops/cuda has the reason for each."""
        if "cuda_libraries" in self.backend.lacks:
            return {}
        options = COMPILER_OPTIONS + (DETERMINISTIC_OPTIONS if self.deterministic else ())
        return {name: value if isinstance(value, bool) else str(value) for name, value, _ in options}


def make_plan(
    compute: ComputeSettings,
    backend: Backend,
    config: FamilyConfig,
    *,
    devices: int = 1,
    zero: int = 0,
    optimizer: OptimizerSettings | None = None,
) -> Plan:
    """Resolve how a model of these sizes is computed on so many devices of this backend. The optimizer's settings say which
    tensors are frozen, and how much is dropped; without them nothing is.

    Gpt2JaxError for a pattern that matches no tensor, for a number of devices that does not divide the model, when an
    implementation that was named cannot serve, for an unknown name in GPT2_JAX_DISABLE, for a switch of jax's that a run
    cannot heed, and with --strict for every fallback.
    """
    _check_switches()
    check_switched_off([f"{seam}:{row.name}" for seam, table in SEAMS.items() for row in table])
    if "custom_calls" not in backend.lacks:
        library.check_features()
    if compute.deterministic and "determinism" in backend.lacks:
        raise Gpt2JaxError(
            f"--deterministic: expected a device whose bits are the same in every run, found {backend.name}", "--backend cpu"
        )
    if devices > 1 and not jax_compat.serves_several_devices():
        raise Gpt2JaxError(
            f"--devices: expected jax 0.6.1 or newer for several devices, found jax {jax.__version__}", "--devices 1"
        )
    zero = zero if devices > 1 else 0
    if zero:
        _check_divides(config, devices)
    plan = Plan(
        backend,
        config,
        compute.dtype,
        compute.recompute,
        _matmul_precision(compute),
        deterministic=compute.deterministic,
        devices=devices,
        processes=max(1, compute.processes),
        zero=zero,
        dropout=0.0 if optimizer is None else optimizer.dropout,
        frozen=() if optimizer is None else config.layout.frozen(optimizer.frozen_patterns).frozen_names,
    )
    for seam, table in SEAMS.items():
        requested = compute.matmul if seam == "linear" else "auto"
        choice: dict[str, Any] = {seam: choose(seam, table, plan, requested)}
        plan = dataclasses.replace(plan, **choice)
        if seam == "linear" and plan.linear.name in matmul.CUSTOM_CALLS:
            plan = dataclasses.replace(plan, **_precisions(plan))
    if compute.strict and (fallbacks := [*plan.fallbacks(), *([backend.fallback] if backend.fallback else [])]):
        raise Gpt2JaxError(
            f"--strict: expected no fallback, found {'; '.join(fallbacks)}", "what it names, or leave --strict out"
        )
    return plan


def _matmul_precision(compute: ComputeSettings) -> str | None:
    """The setting of the run, else jax's own (JAX_DEFAULT_MATMUL_PRECISION)."""
    if compute.matmul_precision != "default":
        return compute.matmul_precision
    return jax_compat.default_matmul_precision()


def _precisions(plan: Plan) -> dict[str, Any]:
    name, dtype, setting = plan.linear.name, plan.compute_dtype, plan.matmul_precision
    return {
        "product_precision": matmul.custom_call_precision(name, dtype, setting),
        "weight_gradient_precision": matmul.custom_call_precision(name, dtype, setting, weight_gradient=True),
    }


def _check_divides(config: FamilyConfig, devices: int) -> None:
    if config.channels % devices:
        which = [number for number in range(2, min(config.channels, 64) + 1) if config.channels % number == 0]
        below = max((number for number in which if number < devices), default=1)
        raise Gpt2JaxError(
            f"--devices: expected a number that divides the model's {config.channels} channels "
            f"({', '.join(map(str, which))} ...), found {devices}",
            f"--devices {below}, or --zero 0",
        )


def _check_switches() -> None:
    for name, why in _UNUSABLE_SWITCHES.items():
        if getattr(jax.config, name):
            raise Gpt2JaxError(f"{name.upper()}: expected it to be off, found it on, but {why}", f"unset {name.upper()}")
