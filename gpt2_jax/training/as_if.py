"""What a run would need on a Mac that is not here: from the record of a plugin for the Apple GPU, without a timed step."""

from __future__ import annotations

import re

from gpt2_jax.compute import memory
from gpt2_jax.compute.backend import metal_backend
from gpt2_jax.compute.metal_plugins import METAL_PLUGIN_NAMES, METAL_PLUGINS, MetalPlugin
from gpt2_jax.compute.plan import Plan, make_plan
from gpt2_jax.config import RunConfig
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.machine import gigabytes
from gpt2_jax.models.weights import model_config_from_settings
from gpt2_jax.report.display import Display

_MACS = (8, 16, 24, 36)  # GB


def print_as_if(config: RunConfig, machine: str) -> None:
    """Print the memory of a step by kind, and the largest batch, on a Mac given as 'PLUGIN, N GB'."""
    plugin, size = read_machine(machine)
    if not config.run.dry_run:
        raise Gpt2JaxError("--as-if: expected a dry run, found none", f'--dry-run --backend metal --as-if "{machine}"')
    if config.compute.backend not in ("metal", "mps"):
        raise Gpt2JaxError(f"--as-if: expected --backend metal, found {config.compute.backend}", "--backend metal")
    model = model_config_from_settings(config.model)
    if model is None:
        raise Gpt2JaxError(f"--as-if: expected a model by its descriptor, found the file {config.model.init}", "--init d12")
    backend = metal_backend(plugin, f"as if it were here, with {size} GB")
    plan = make_plan(config.compute, backend, model, optimizer=config.optimizer)
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
    """The largest --batch-size whose estimate fits; memory grows in proportion to it."""
    sizes = [memory.estimate(plan, B, T, num_micro_batches=num_micro_batches).total for B in (1, 2)]
    if sizes[0] > limit:
        return f"none: a batch of 1 needs {gigabytes(sizes[0])}"
    return f"--batch-size {1 + (limit - sizes[0]) // (sizes[1] - sizes[0])} at --sequence-length {T}"
