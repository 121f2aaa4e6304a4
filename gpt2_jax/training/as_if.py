"""What a run would need on a Mac or on GPUs that are not here: from the record of the device, without a timed step."""

from __future__ import annotations

import bisect
import dataclasses
import re
from typing import Any

from gpt2_jax.compute import memory
from gpt2_jax.compute.backend import cuda_backend, metal_backend
from gpt2_jax.compute.metal_plugins import METAL_PLUGIN_NAMES, METAL_PLUGINS, MetalPlugin
from gpt2_jax.compute.plan import Plan, make_plan
from gpt2_jax.config import RunConfig
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.machine import gigabytes
from gpt2_jax.models.weights import model_config_from_settings
from gpt2_jax.ops.table import Choice
from gpt2_jax.report.display import Display

_MACS = (8, 16, 24, 36)  # GB
_MOST_SEQUENCES = 1 << 20
_GPUS = re.compile(r"\s*(\d+)\s*GPUs?\s*,\s*(\d+)\s*GB\s*")
STAGES = (0, 1, 2, 3)
# What a GPU with this project's library has, in bfloat16, and cannot be asked for where there is none.
_KERNELS = {"norm_linear": "folded_kernel", "activation": "cublas", "classifier": "kernel"}


def print_as_if(config: RunConfig, machine: str) -> None:
    """Print the memory of a step and the largest batch on a machine given as 'PLUGIN, N GB', a Mac, or 'N GPUs, M GB'."""
    gpus = _GPUS.fullmatch(machine)
    plugin_and_size = None if gpus else read_machine(machine)
    backend = "cuda" if gpus else "metal"
    if not config.run.dry_run:
        raise Gpt2JaxError("--as-if: expected a dry run, found none", f'--dry-run --backend {backend} --as-if "{machine}"')
    if {"mps": "metal"}.get(config.compute.backend, config.compute.backend) != backend:
        raise Gpt2JaxError(f"--as-if: expected --backend {backend}, found {config.compute.backend}", f"--backend {backend}")
    model = model_config_from_settings(config.model)
    if model is None:
        raise Gpt2JaxError(f"--as-if: expected a model by its descriptor, found the file {config.model.init}", "--init d12")
    if plugin_and_size is None:
        assert gpus is not None
        _print_gpus(config, model, int(gpus[1]), int(gpus[2]))
    else:
        _print_mac(config, model, *plugin_and_size)


def _print_gpus(config: RunConfig, model: GPT2Config, number: int, size: int) -> None:
    """The gigabytes that each GPU needs, by stage and number of GPUs."""
    numbers = [count for count in range(1, number + 1) if number % count == 0 and model.channels % count == 0]
    needed = {
        (stage, count): memory.estimate(
            plan_of_gpus(config, model, count, stage),
            config.data.batch_size,
            config.data.sequence_length,
            num_micro_batches=config.num_micro_batches,
        ).total
        for stage in STAGES
        for count in numbers
    }
    rows = [("GB on each of", "  ".join(f"{count:>6}" for count in numbers) + " GPUs, estimated; * is more than it has")]
    for stage in STAGES:
        cells = [f"{needed[stage, count] / 1e9:>5.1f}{'*' if needed[stage, count] > size * 1e9 else ' '}" for count in numbers]
        rows.append((f"with --zero {stage}", "  ".join(cells)))
    for stage in STAGES:
        plan = plan_of_gpus(config, model, numbers[-1], stage)
        batch = _largest_batch(plan, size * 10**9, config.data.sequence_length, config.num_micro_batches)
        rows.append((f"largest batch, --zero {stage}", f"{batch} on each of {numbers[-1]}"))
    with Display() as display:
        display.table(rows)


def plan_of_gpus(config: RunConfig, model: GPT2Config, devices: int, zero: int) -> Plan:
    """The plan of so many GPUs that have all that this project brings for them."""
    plan = make_plan(config.compute, cuda_backend("as if it were here"), model, devices=devices, zero=zero)
    if plan.dtype != "bfloat16":
        return plan
    kernels: dict[str, Any] = {seam: Choice(name, "as if it were here") for seam, name in _KERNELS.items()}
    return dataclasses.replace(plan, **kernels)


def _print_mac(config: RunConfig, model: GPT2Config, plugin: MetalPlugin, size: int) -> None:
    plan = make_plan(config.compute, metal_backend(plugin, f"as if it were here, with {size} GB"), model)
    _, B, T = config.batch_shape
    needed = memory.estimate(plan, B, T, num_micro_batches=config.num_micro_batches)
    kinds = ("parameters", "gradients", "moments", "activations")
    rows = [
        *plan.rows(),
        *((f"memory, {kind}", gigabytes(getattr(needed, kind))) for kind in kinds),
        ("memory, total", f"{gigabytes(needed.total)} of {size} GB, which macOS and other programs share; estimated"),
        *(
            (f"largest batch, {each} GB", _largest_batch(plan, each * 10**9, T, config.num_micro_batches))
            for each in sorted({*_MACS, size})
        ),
    ]
    if config.compute.recompute != "none":
        rows += [("recompute", reason.removeprefix("recompute: ")) for reason in plan.fallbacks()]
    with Display() as display:
        display.table(rows)


def read_machine(text: str) -> tuple[MetalPlugin, int]:
    """The plugin and the gigabytes of 'PLUGIN, N GB'."""
    found = re.fullmatch(r"\s*([\w-]+)\s*,\s*(\d+)\s*GB\s*", text)
    plugin = next((plugin for plugin in METAL_PLUGINS if found and plugin.name == found[1]), None)
    if found is None or plugin is None or int(found[2]) == 0:
        names = ", ".join(METAL_PLUGIN_NAMES)
        raise Gpt2JaxError(f"--as-if: expected one of {names} and a size, found {text!r}", '--as-if "jax-mps, 16 GB"')
    return plugin, int(found[2])


def _largest_batch(plan: Plan, limit: int, T: int, num_micro_batches: int) -> str:
    """The largest --batch-size whose estimate fits."""

    def needed(B: int) -> int:
        return memory.estimate(plan, B, T, num_micro_batches=num_micro_batches).total

    if needed(1) > limit:
        return f"none: a batch of 1 needs {gigabytes(needed(1))}"
    # No batch needs less than a smaller one: the first of those that do not fit, found by halving.
    too_large = bisect.bisect_right(range(1, _MOST_SEQUENCES), limit, key=needed) + 1
    return f"--batch-size {too_large - 1} at --sequence-length {T}"
