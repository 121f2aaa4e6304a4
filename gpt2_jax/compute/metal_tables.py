"""The operations that each plugin for the Apple GPU takes: a table a plugin, in assets/, of the version that it was read from.

Nothing here imports jax.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import Any


@cache
def table_of(plugin: str) -> dict[str, Any]:
    """The table of a plugin, by the name of its distribution:

    | key | what |
    | --- | --- |
    | plugin | the plugin and the version that the table was read from |
    | element_types | those of arrays, by MLIR's names |
    | operations | StableHLO's operations without their prefix, each with its limit; "" where there is none |
    | custom_calls | targets of custom calls; only Sharding where this is missing |
    | stablehlo_version | the version that jax writes a program in for this plugin, where that is an old one |
    | patterns | what the plugin makes faster forms of, for people |
    """
    path = resources.files("gpt2_jax") / "assets" / f"{plugin.replace('-', '_')}_operations.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))
