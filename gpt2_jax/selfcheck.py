"""Training on this machine's devices against XLA on the CPU: the numbers first, the speed beside them.

What the tests cannot do for a device that the project's authors do not have: one command trains the same small model
from the same state on the device and on the CPU, and says whether they agree. selfcheck_report.py tells it.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.compute import metal_plugins
from gpt2_jax.compute.backend import Backend, cpu_backend
from gpt2_jax.compute.forward import next_token_logits
from gpt2_jax.compute.plan import Plan, make_plan
from gpt2_jax.compute.step import accumulated_gradient, compile_step, create_state
from gpt2_jax.config import ComputeSettings, OptimizerSettings
from gpt2_jax.data.corpus import encode_documents
from gpt2_jax.data.kjv import kjv_chapters
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2_VOCAB_SIZE, GPT2Config
from gpt2_jax.generate import generate
from gpt2_jax.gradient_check import Comparison, compare_gradients, compare_logits, compare_losses
from gpt2_jax.interop.pytorch import make_pytorch_model, pytorch_gradients, pytorch_loss
from gpt2_jax.models.initialize import initialize_parameters

SMALL_MODEL = GPT2Config(max_sequence_length=64, vocab_size=GPT2_VOCAB_SIZE, num_layers=4, num_heads=4, channels=128)
BATCH_SIZE = 4
STEPS = 20
LEARNING_RATE = 3e-4
WEIGHT_DECAY = 0.1
SAMPLE_TOKENS = 32


@dataclass(frozen=True)
class System:
    """One way to compute on one device."""

    name: str
    device: jax.Device
    plan: Plan


@dataclass(frozen=True)
class Outcome:
    """The results of training on one system."""

    system: System
    losses: list[float]
    # Of the first batch at the first weights, computed twice: a plugin's kernel was once wrong in one run of ten.
    grads: tuple[dict[str, np.ndarray], dict[str, np.ndarray]]
    params: np.ndarray  # the last
    compile_seconds: float
    step_seconds: list[float]

    @property
    def median_seconds(self) -> float:
        return float(np.median(self.step_seconds))

    @property
    def repeats_bits(self) -> bool:
        """Whether both gradients have the same bits."""
        return all(np.array_equal(first, self.grads[1][name], equal_nan=True) for name, first in self.grads[0].items())


@dataclass(frozen=True)
class Check:
    """A system's results against others': `sample` is what it generates from the reference's last weights."""

    outcome: Outcome
    against_reference: list[Comparison]
    against_pytorch: list[Comparison]  # empty without PyTorch
    sample: list[int]

    @property
    def passed(self) -> bool:
        return all(row.passed for row in (*self.against_reference, *self.against_pytorch))


@dataclass(frozen=True)
class OfDtype:
    """All systems in one dtype."""

    dtype: str
    checks: list[Check]
    failure: str = ""  # what ended it, without results
    operations: dict[str, int] = dataclasses.field(default_factory=dict)  # jax-mps's own in the compiled step, by name
    expected_operations: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return not self.failure and all(check.passed for check in self.checks)


@contextmanager
def compiled_programs(backend: Backend) -> Iterator[Path | None]:
    """A folder that the backend's plugin writes its programs to from now on; None where it writes none. Call this before jax
    starts."""
    variable = metal_plugins.plugin_named(backend.plugin).programs_variable if backend.plugin else ""
    if not variable or os.environ.get(variable):  # the user's own folder may hold other programs
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ[variable] = folder
        try:
            yield Path(folder)
        finally:
            del os.environ[variable]


def check_dtype(systems: list[System], tokens: np.ndarray, programs: Path | None) -> OfDtype:
    """Check systems of one dtype, of which the second is the device's; what ends it is said in the result."""
    dtype = systems[0].plan.dtype
    for old in programs.glob("*") if programs else ():
        old.unlink()
    try:
        checks = check_systems(systems, tokens)
    except (RuntimeError, NotImplementedError) as error:  # what jax and its plugins raise
        return OfDtype(dtype, [], failure=f"{type(error).__name__}: {str(error).splitlines()[0]}")
    if programs is None:
        return OfDtype(dtype, checks)
    return OfDtype(dtype, checks, "", recognised(programs), expected_operations(systems[1].plan))


def systems_to_check(backend: Backend, config: GPT2Config, dtype: Literal["float32", "bfloat16"]) -> list[System]:
    """The reference, XLA on the CPU, then the backend's device, then the CPU with the custom calls that serve best.

    float32 products are full float32, not TF32.
    """
    auto = ComputeSettings(dtype=dtype, matmul_precision="highest")
    on_cpu = cpu_backend("the reference")
    cpu = jax.devices("cpu")[0]
    systems = [System("cpu, xla", cpu, make_plan(dataclasses.replace(auto, matmul="xla"), on_cpu, config))]
    if backend.name != "cpu":
        systems.append(System(backend.plugin or backend.name, jax.devices()[0], make_plan(auto, backend, config)))
    choice = make_plan(auto, on_cpu, config).linear
    refused = dict(choice.refusals)
    # Accelerate wherever it is there, as the report is to compare the CPU with and without it.
    names: list[Literal["amx", "threaded", "accelerate"]] = ["amx", "threaded", "accelerate"]
    for name in names:
        if name not in refused and name in ("accelerate", choice.name):
            plan = make_plan(dataclasses.replace(auto, matmul=name), on_cpu, config)
            systems.append(System(f"cpu, {name}", cpu, plan))
    return systems


def built_in_tokens(count: int) -> np.ndarray:
    """The first tokens of the built-in text."""
    return np.asarray(encode_documents(kjv_chapters()[:40]))[:count]


def check_systems(
    systems: list[System], tokens: np.ndarray, *, steps: int = STEPS, batch_size: int = BATCH_SIZE
) -> list[Check]:
    """Train on every system from llm.c's initialization with the same batches, and compare with the first of them.

    `tokens` are steps * batch_size * max_sequence_length + 1. All systems are of one model and one dtype.
    """
    config, dtype = systems[0].plan.config, systems[0].plan.dtype
    assert isinstance(config, GPT2Config)  # PyTorch's model is one
    params = initialize_parameters(config)
    shape = (steps, batch_size, config.max_sequence_length)
    x_SBT, y_SBT = (tokens[start : start + math.prod(shape)].reshape(shape).astype(np.int32) for start in (0, 1))
    pytorch = _pytorch_gradients(config, params, x_SBT[0], y_SBT[0])
    outcomes = [_train(system, params, x_SBT, y_SBT) for system in systems]
    reference = outcomes[0]
    results = [_sample(outcome.system, reference.params, x_SBT[0, :1]) for outcome in outcomes]
    return [
        Check(
            outcome,
            [
                compare_losses(outcome.losses, reference.losses, config, dtype),
                *_compare_both(outcome, reference.grads[0], config, dtype),
                compare_logits(logits, results[0][0], config, dtype),
            ],
            _compare_both(outcome, pytorch, config, dtype) if pytorch else [],
            sample,
        )
        for outcome, (logits, sample) in zip(outcomes, results, strict=True)
    ]


def recognised(folder: Path) -> dict[str, int]:
    """How often jax-mps's own operations stand in the training step, by name, as it wrote its programs to `folder`; empty
    where there is no program. The step is the longest."""
    programs = [path.read_text(encoding="utf-8", errors="replace") for path in folder.glob("*.mlir")]
    longest = max(programs, key=len, default="")
    return dict(sorted(Counter(re.findall(r"@(mps\.\w+)", longest)).items()))


def expected_operations(plan: Plan) -> dict[str, int]:
    """What `recognised` must find for a step of one micro-batch by this plan."""
    L = plan.config.num_layers
    of_parts = {"sdpa_causal": (plan.attention, L), "gelu": (plan.activation, L), "layer_norm": (plan.norm_linear, 2 * L + 1)}
    counts = {
        f"mps.{name}{direction}": count
        for name, (choice, count) in of_parts.items()
        if choice.name == "apple"
        for direction in ("", "_bwd")
    }
    return counts | ({"mps.addmm": 4 * L} if plan.linear.name == "apple" else {})


def _compare_both(outcome: Outcome, reference: dict[str, np.ndarray], config: GPT2Config, dtype: str) -> list[Comparison]:
    """For each tensor the worse of both gradients."""
    pairs = zip(*(compare_gradients(grads, reference, config, dtype) for grads in outcome.grads), strict=True)
    return [next((row for row in pair if not row.passed), max(pair, key=lambda row: row.used_tolerance)) for pair in pairs]


def _train(system: System, params: np.ndarray, x_SBT: np.ndarray, y_SBT: np.ndarray) -> Outcome:
    plan = system.plan
    settings = OptimizerSettings(schedule="cosine", learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    with jax.default_device(system.device):
        gradient = jax.jit(lambda params_N, x_ABT, y_ABT: accumulated_gradient(plan, params_N, None, x_ABT, y_ABT)[1])
        first, second = (plan.layout.views(np.asarray(gradient(params, x_SBT[:1], y_SBT[:1]))) for _ in range(2))
        started = time.perf_counter()
        step = compile_step(plan, settings, len(x_SBT), (1, *x_SBT.shape[1:]))
        compile_seconds = time.perf_counter() - started
        state = create_state(plan, params)
        losses, seconds = [], []
        for x_BT, y_BT in zip(x_SBT, y_SBT, strict=True):
            started = time.perf_counter()
            state, metrics = step(state, x_BT[None], y_BT[None])
            # Some plugins do not wait in block_until_ready; a value on the host is there when the step is done.
            losses.append(float(np.asarray(metrics.loss)))
            seconds.append(time.perf_counter() - started)
        return Outcome(system, losses, (first, second), np.asarray(state.params), compile_seconds, seconds)


def _sample(system: System, params: np.ndarray, x_1T: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """The logits after a row of tokens, and what is generated after its first half, both with the same weights; no token
    where a logit is not finite."""
    with jax.default_device(system.device):
        params_N = jnp.array(params)
        logits = next_token_logits(system.plan, params_N, x_1T, np.int32(x_1T.shape[1] - 1))
        logits_V = np.asarray(logits)[0]
        if not np.isfinite(logits_V).all():  # no token can be chosen from them
            return logits_V, []
        prompt = [int(token) for token in x_1T[0, : x_1T.shape[1] // 2]]
        return logits_V, list(generate(system.plan, params_N, prompt, SAMPLE_TOKENS))


def _pytorch_gradients(config: GPT2Config, params: np.ndarray, x_BT: np.ndarray, y_BT: np.ndarray) -> dict[str, np.ndarray]:
    """The third witness; empty where PyTorch is not installed."""
    try:
        model = make_pytorch_model(config, params)
    except Gpt2JaxError:
        return {}
    pytorch_loss(model, x_BT, y_BT)[1].backward()
    return config.layout.views(pytorch_gradients(model, config))
