"""The memory and the time that a run will need, found without weights and without writing anything."""

from __future__ import annotations

import math
import time

import jax
import numpy as np

from gpt2_jax.compute import memory, parallel
from gpt2_jax.compute.flops import flops_per_token
from gpt2_jax.compute.memory import MemoryEstimate
from gpt2_jax.compute.plan import Plan
from gpt2_jax.compute.step import NUM_WISHES, arguments, compile_step, state_shapes, state_specs
from gpt2_jax.config import RunConfig
from gpt2_jax.machine import gigabytes, give_memory_back
from gpt2_jax.report.display import Display

_MOST_COMPILES = 5
_TIMED_SECONDS, _MOST_TIMED, _TIMED_TOGETHER = 1.0, 5, 2
_RELEASE_SECONDS = 0.05  # within which XLA's threads let go of arrays that nobody holds
_FORWARD = 1 / 3  # of a step's time


def dry_run(
    config: RunConfig,
    plan: Plan,
    compiled: jax.stages.Compiled,
    needed: MemoryEstimate,
    num_tokens: int,
    steps: int,
    display: Display,
    limit: int | None,
) -> None:
    """Print memory by kind, operations, the time of one step on zeros and so of the run, and the largest batch that fits into
    `limit` bytes a device (None: not known), which several processes must be given the same."""
    of_limit = "" if limit is None else f" of {gigabytes(limit)} on the device"
    flops = flops_per_token(plan.config, config.data.sequence_length) * config.tokens_per_step
    rows = [
        *(
            (f"memory, {kind}", gigabytes(getattr(needed, kind)))
            for kind in ("parameters", "gradients", "moments", "activations")
        ),
        ("memory, total", gigabytes(needed.total) + of_limit),
        ("operations", f"{flops:.3e} FLOP a step, {flops * steps:.3e} in {steps} steps"),
    ]
    if limit is None or needed.total <= limit:
        display.line("timing one step on zeros ...")
        seconds = time_step(config, plan, compiled)
        tokens = config.tokens_per_step * steps
        rows += [
            (
                "a step",
                f"{seconds * 1000:.1f} ms, {config.tokens_per_step / seconds:,.0f} tok/s, {flops / seconds / 1e12:.3f} TFLOP/s",
            ),
            ("the run", f"{seconds * steps / 3600:.2f} hours for {tokens:,} tokens ({tokens / num_tokens:.2f} epochs)"),
        ]
    else:
        rows.append(("a step", "not timed: it does not fit"))
    rows.append(("largest batch", _largest_batch(config, plan, steps, needed, limit, display)))
    display.table(rows)


def time_step(config: RunConfig, plan: Plan, compiled: jax.stages.Compiled) -> float:
    """Seconds of a step on zeros: the shortest of as many as fit into a second, but of at least one."""
    state = parallel.zeros(plan, state_shapes(plan), state_specs(plan))
    A, rows, T = config.batch_shape
    batch = np.zeros((A, rows // plan.processes, T), np.int32)
    num_tensors = len(plan.layout.tensors)
    shape = (plan.devices, num_tensors) if plan.zero else (num_tensors,)
    seeds = (np.zeros(shape, np.uint32),) if config.rounds_parameters else ()
    arguments_of_step = arguments(plan, batch, batch, (0,) * NUM_WISHES, seeds)
    times: list[float] = []
    # Several processes must take as many steps as one another, whatever their clocks say.
    most, seconds = (_MOST_TIMED, _TIMED_SECONDS) if plan.processes == 1 else (_TIMED_TOGETHER, math.inf)
    while sum(times) < seconds and len(times) < most:
        started = time.perf_counter()
        state, metrics = compiled(state, *arguments_of_step)
        float(metrics.loss)
        times.append(time.perf_counter() - started)
    # The state is needed no more: its pages must not stay beside those of the run's own.
    jax.block_until_ready(state)
    del state, metrics
    time.sleep(_RELEASE_SECONDS)
    give_memory_back()
    return min(times)


def estimate(config: RunConfig, steps: int, seconds: float) -> str:
    """How long so many steps of these seconds take, and a validation."""
    text = f"{steps} steps at {_in_units(seconds)}: about {_in_units(steps * seconds)}"
    evaluation = config.evaluation
    if evaluation.validate_every and evaluation.validation_batches > 0:
        batches = evaluation.validation_batches / config.num_micro_batches
        text += f"; a validation about {_in_units(_FORWARD * seconds * batches)}"
    return text


def share_of_travel(config: RunConfig, plan: Plan, seconds: float) -> str:
    """What travels between devices in a step of these seconds, by the bandwidth that is measured now."""
    bandwidth, sent = parallel.measured_bandwidth(plan), parallel.bytes_sent(plan, config.num_micro_batches)
    alone = sent / bandwidth
    return (
        f"between devices: {sent / 1e6:.1f} MB from each in a step, at the measured {bandwidth / 1e9:.1f} GB/s "
        f"{_in_units(alone)} or {100 * alone / seconds:.1f} % of it, unless it is hidden"
    )


def _in_units(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min"), (1, "s")):
        if seconds >= 2 * size or size == 1:
            return (
                f"{seconds / size:.{0 if seconds >= 10 * size else 1}f} {unit}" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
            )
    raise AssertionError


def _largest_batch(
    config: RunConfig, plan: Plan, steps: int, needed: MemoryEstimate, limit: int | None, display: Display
) -> str:
    """The largest --batch-size of which the compiler's count fits, narrowed down by bisection over a few compiles."""
    if limit is None:
        return "not known: this device does not say what memory it has"
    T = config.data.sequence_length
    fixed = needed.total - needed.activations
    if needed.total <= limit:
        fits, too_large = config.data.batch_size, int((limit - fixed) / (needed.activations / config.data.batch_size)) * 64
    else:
        fits, too_large = 0, config.data.batch_size
    bytes_of = {0: fixed, config.data.batch_size: needed.total}  # by batch size
    for number in range(_MOST_COMPILES):
        if too_large - fits <= 1:
            break
        # Memory grows nearly in proportion to the batch: where the line through the two sizes next to the limit meets it.
        upper = too_large if too_large in bytes_of else fits
        lower = max(size for size in bytes_of if size < upper)
        growth = max(1, bytes_of[upper] - bytes_of[lower])
        trial = upper + math.floor((limit - bytes_of[upper]) * (upper - lower) / growth)
        trial = min(max(trial, fits + 1), too_large - 1)
        display.line(f"compiling for --batch-size {trial} ({number + 1} of at most {_MOST_COMPILES}) ...")
        shape = (config.num_micro_batches, plan.devices * trial, T)
        counted = memory.compiled_memory(
            plan, compile_step(plan, config.optimizer, steps, shape, rounds=config.rounds_parameters)
        )
        if counted is None:
            return "not known: this backend does not count what a compiled step needs"
        bytes_of[trial] = counted.total
        fits, too_large = (trial, too_large) if counted.total <= limit else (fits, trial)
    if fits == 0:
        return f"none: a batch of 1 needs more than {gigabytes(limit)}"
    exact = "" if too_large - fits <= 1 else f"; more than that was not found to fit, {too_large} does not"
    return f"--batch-size {fits} at --sequence-length {T}{exact}"
