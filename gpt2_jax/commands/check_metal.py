"""Check that jax's plugins for the Apple GPU can take the compiled functions of a run; needs no Mac and no plugin.

  python scripts/check_metal.py                          GPT-2 124M, two micro-batches, in both dtypes, for every plugin
  python scripts/check_metal.py --size d48 --dtype bfloat16 --plugin jax-metal
  python scripts/check_metal.py --config demo --patterns   also what a plugin makes faster forms of, and why not of others

Exit status 1 when an operation is used that the plugin does not know, or in a way that it cannot take. Each plugin's
operations are in gpt2_jax/assets/*_operations.toml, with the version that they were read from.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from gpt2_jax.commands.command_line import parse
from gpt2_jax.compute.backend import metal_backend, select_backend
from gpt2_jax.compute.metal_plugins import METAL_PLUGINS, MetalPlugin, newer_than_its_table
from gpt2_jax.compute.metal_tables import table_of
from gpt2_jax.config import RunConfig, find_config, load_config
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import config_from_descriptor
from gpt2_jax.files import FilePath
from gpt2_jax.models.weights import model_config_from_settings

if TYPE_CHECKING:
    from gpt2_jax.compute.metal_check import CheckedFunction


@dataclass(frozen=True)
class Arguments:
    size: str | None = None
    """Descriptor of a model, by default d12, with two micro-batches of the default run's size: d6, d48, gpt3:c768 ..."""
    config: FilePath | None = None
    """TOML file with a run's settings, or a preset's name, to check instead."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of products and activations; by default the TOML file's, and both for --size."""
    plugin: Literal["jax-mps", "metaljax", "jax-graft", "jax-metal"] | None = None
    """One plugin only."""
    patterns: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print what each plugin makes a faster form of, what of it it does not recognise, and why."""


def main(words: list[str]) -> None:
    arguments = parse(Arguments, __doc__, words)
    select_backend("cpu")  # before anything imports jax

    import jax

    from gpt2_jax.compute.metal_check import check_functions

    jax.devices()  # jax loads the plugins that are installed, and jax-mps its operations, whatever the platform is
    if arguments.config and arguments.size:
        raise Gpt2JaxError("expected --size or --config, found both")
    size = arguments.size or "d12"
    config = load_config(find_config(arguments.config)) if arguments.config else two_micro_batches_of(size)
    model = model_config_from_settings(config.model) if arguments.config else config_from_descriptor(size)
    if model is None:
        raise Gpt2JaxError(f"--config: expected a model by its descriptor, found the file {config.model.init}", "--size d12")
    dtypes: list[Literal["float32", "bfloat16"]]
    dtypes = [arguments.dtype] if arguments.dtype else [config.compute.dtype] if arguments.config else ["float32", "bfloat16"]
    print(f"{arguments.config or size} as jax {jax.__version__} lowers it for")
    print(
        f"{'plugin':<11}{'platform':<10}{'dtype':<10}{'function':<19}{'operations':>11}{'kinds':>7}{'bytes':>10}{'seconds':>9}"
    )
    num_violations = 0
    for plugin in METAL_PLUGINS:
        if arguments.plugin not in (None, plugin.name):
            continue
        if newer := newer_than_its_table(plugin):
            print(newer)
        if arguments.patterns:
            print(f"{plugin.name} makes faster forms of: {table_of(plugin.name)['patterns']}")
        for dtype in dtypes:
            config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, dtype=dtype))
            for function in check_functions(config, model, metal_backend(plugin, "to be checked")):
                portable = f"{len(function.portable):,}" if function.portable else ""
                print(
                    f"{plugin.name:<11}{plugin.platform:<10}{dtype:<10}{function.name:<19}"
                    f"{function.operations.total():>11,}{len(function.operations):>7}{portable:>10}{function.seconds:>9.2f}",
                    flush=True,
                )
                num_violations += len(function.violations)
                for violation in function.violations:
                    print(f"    {violation}")
                if arguments.patterns and plugin.fuses:
                    print("\n".join(f"    {line}" for line in pattern_lines(function, plugin)))
    print("bytes: of the module in the old StableHLO that jax-metal reads; seconds: to trace and lower it")
    print(f"{num_violations} violations")
    sys.exit(1 if num_violations else 0)


def pattern_lines(function: CheckedFunction, plugin: MetalPlugin) -> list[str]:
    """What the plugin recognises in a function: first its own functions, then by form, with the reasons."""
    own = {name: count for name, count in function.custom_calls.items() if name.startswith("mps.")}
    of_its_own = ", ".join(f"{count} {name}" for name, count in sorted(own.items()))
    absent = f"none, since {plugin.name} is not here, and jax's own forms stand for them"
    lines = [f"functions of {plugin.name}: {of_its_own or absent}"]
    for kind in sorted({part.kind for part in function.parts}):
        parts = {part: count for part, count in function.parts.items() if part.kind == kind}
        taken = sum(count for part, count in parts.items() if not part.refused)
        lines.append(f"{kind}: {taken} of {sum(parts.values())} recognised")
        lines += [f"  {count} not, at {part.place}: {part.refused}" for part, count in parts.items() if part.refused]
        lines += [f"  {count} at {part.place}: {part.remark}" for part, count in parts.items() if part.remark]
    return lines


def two_micro_batches_of(size: str) -> RunConfig:
    """The default run with a model of this size, and with gradients accumulated."""
    config = RunConfig()
    model = dataclasses.replace(config.model, init=size)
    data = dataclasses.replace(config.data, total_batch_size=2 * config.tokens_per_step)
    return dataclasses.replace(config, model=model, data=data)
