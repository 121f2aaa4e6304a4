"""What jax-mps brings beside its compiler: LayerNorm, GELU and attention as single operations, with their own derivatives.

Their Python lies in the plugin's module of operations. When jax loads the plugin, it also replaces jax.nn.gelu and
jax.nn.dot_product_attention. Where the plugin is not installed, a program for it can still be traced: then jax's own
forms stand for the plugin's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

from gpt2_jax.ops.table import Fallback

if TYPE_CHECKING:
    from gpt2_jax.compute.plan import Plan

ON_JAX_MPS_ONLY = "with jax-mps only"
_MODULE = "jax_plugins.mps.ops"


def loaded_operations() -> ModuleType | None:
    """The plugin's module of operations, which jax imports when it starts on the plugin; None before, and elsewhere."""
    return sys.modules.get(_MODULE)


def refuses(part: str) -> Callable[[Plan], str | None]:
    """`accepts` of an implementation that needs `part` (of metal_plugins.FUSED_PARTS) as one operation."""

    def accepts(plan: Plan) -> str | None:
        if part not in plan.backend.fuses:
            return ON_JAX_MPS_ONLY
        operations = loaded_operations()
        if operations is not None and not _is_there(part, operations):
            return Fallback(f"this version of {plan.backend.plugin} has no {part} of its own; pip install --upgrade would help")
        return None

    return accepts


def _is_there(part: str, operations: ModuleType) -> bool:
    import jax

    if part == "bias":
        return True  # by its compiler
    if part == "layer_norm":
        return hasattr(operations, "layer_norm")
    replaced = jax.nn.gelu if part == "gelu" else jax.nn.dot_product_attention
    return bool(getattr(replaced, "_mps_patched", False))  # the plugin marks what it has replaced
