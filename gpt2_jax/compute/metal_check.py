"""Whether the plugins for the Apple GPU can take what this project compiles, found out without a Mac and without a plugin.

jax lowers for any platform by its name, so the exact module that a plugin would be given can be made anywhere. Here the
training step, the losses of validation and of multiple-choice answers, and the logits of sampling are lowered as a run
makes them, every operation is held against what the plugin can convert (assets/*_operations.toml), and for jax-metal the
module is written in the version of StableHLO that it reads.
"""

from __future__ import annotations

import dataclasses
import io
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo
from jaxlib.mlir.passmanager import PassManager

from gpt2_jax.compute.backend import Backend
from gpt2_jax.compute.forward import make_loss_function, make_token_loss_function, next_token_logits
from gpt2_jax.compute.metal_patterns import Part, parts_of
from gpt2_jax.compute.metal_tables import table_of
from gpt2_jax.compute.plan import make_plan
from gpt2_jax.compute.step import make_step, state_shapes
from gpt2_jax.config import RunConfig
from gpt2_jax.families.family import FamilyConfig

JAX_METAL = "jax-metal"
# Operations that compute nothing but hold others together; the inliner removes calls.
_STRUCTURE = ("builtin.module", "func.func", "func.call", "func.return", "stablehlo.return")


@dataclass(frozen=True)
class CheckedFunction:
    """One function as a plugin would get it, and the uses of operations that the plugin cannot compile."""

    name: str
    operations: Counter[str]
    custom_calls: Counter[str]  # by target
    lines: int  # of the module's text
    portable: bytes | None  # the module in the plugin's old StableHLO; None when it has none, or cannot be written in it
    seconds: float  # for tracing and lowering
    violations: list[str]
    parts: Counter[Part]  # for jax-mps: what it looks for by form


def check_functions(config: RunConfig, model: FamilyConfig, backend: Backend) -> Iterator[CheckedFunction]:
    """Check the functions that a run with these settings compiles on `backend`, whose plugin need not be here."""
    for name, trace in _functions_of_a_run(config, model, backend).items():
        started = time.perf_counter()
        module = lower(trace(), backend.platform)
        seconds = time.perf_counter() - started
        operations = Counter(operation.name for operation in _walk(module))
        calls = Counter(_target(operation) for operation in _walk(module) if operation.name == "stablehlo.custom_call")
        lines = len(str(module.operation).splitlines())
        found = violations(module, loops=backend.loops, plugin=backend.plugin)
        parts = Counter(parts_of(module, partial(_place, calls=_calls(module)))) if backend.fuses else Counter[Part]()
        portable = None
        if version := table_of(backend.plugin).get("stablehlo_version"):
            try:
                portable = portable_module(module, version)
            except ValueError as error:
                found.append(f"cannot be written as StableHLO {version}: {error}")
        yield CheckedFunction(name, operations, calls, lines, portable, seconds, found, parts)


def lower(traced: jax.stages.Traced, platform: str) -> ir.Module:
    """The module of a traced function for a platform by jax's name for it, as jax hands it to that platform's plugin."""
    lowered = traced.lower(lowering_platforms=(platform,)).compiler_ir("stablehlo")
    stablehlo.register_stablehlo_passes()
    with lowered.context:
        # A copy, as jax keeps what it lowered.
        bytecode = io.BytesIO()
        lowered.operation.write_bytecode(bytecode)
        module = ir.Module.parse(bytecode.getvalue())
        # jax does this to every module on its way to a plugin.
        PassManager.parse("builtin.module(func.func(chlo-legalize-to-stablehlo))").run(module.operation)
    return module


def portable_module(module: ir.Module, version: str) -> bytes:
    """The module in a version of StableHLO, as jax writes it for a plugin that reads no newer one; ValueError when it has no
    such form.

    The module itself is changed by some versions of jaxlib, and of no more use.
    """
    return stablehlo.serialize_portable_artifact(module, version)


def violations(module: ir.Module, *, loops: bool, plugin: str = JAX_METAL) -> list[str]:
    """One line, with the place in the source, for each use of an operation that the plugin cannot take.

    `loops`: the backend may be given loops.
    """
    table = table_of(plugin)
    known_to = table["plugin"]
    targets, keeps_limit = table.get("custom_calls", ["Sharding"]), _KEEPS_LIMIT[plugin]
    calls = _calls(module)
    found = []
    for operation in _walk(module):
        name = operation.name.removeprefix("stablehlo.")
        limit = table["operations"].get(name)
        if operation.name in _STRUCTURE or (loops and name == "while"):
            problem = None
        elif limit is None or not operation.name.startswith("stablehlo."):
            problem = f"not known to {known_to}"
        elif name == "custom_call":
            problem = None if _target(operation) in targets else limit
        else:
            problem = None if not limit or (name in keeps_limit and keeps_limit[name](operation)) else limit
        if problem:
            found.append(f"{operation.name} at {_place(operation, calls)}: {problem}")
        for wrong in sorted(_element_types(operation) - set(table["element_types"])):
            found.append(f"{operation.name} at {_place(operation, calls)}: element type {wrong}, not known to {known_to}")
    return list(dict.fromkeys(found))


def _functions_of_a_run(config: RunConfig, model: FamilyConfig, backend: Backend) -> dict[str, Callable[[], jax.stages.Traced]]:
    """The functions that a run compiles, by name, to be traced on shapes alone."""
    # Without its plugin jax does not know that a platform donates, and would warn; no operation depends on it.
    backend = dataclasses.replace(backend, lacks=backend.lacks | {"donation"})
    plan = make_plan(config.compute, backend, model, optimizer=config.optimizer)
    step = make_step(plan, config.optimizer, config.run.steps or 1000, seed=config.run.seed)
    state = state_shapes(plan)
    A, B, T = config.num_micro_batches, config.data.batch_size, config.data.sequence_length
    x_ABT, x_BT, x_1T = (
        jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((A, B, T), (B, T), (1, model.max_sequence_length))
    )
    position = jax.ShapeDtypeStruct((), jnp.int32)
    seeds = jax.ShapeDtypeStruct((len(plan.layout.tensors),), jnp.uint32) if config.rounds_parameters else None
    return {
        "training step": lambda: step.trace(state, x_ABT, x_ABT, seeds),
        "validation loss": lambda: make_loss_function(plan).trace(state.params, x_BT, x_BT),
        "losses of tokens": lambda: make_token_loss_function(plan).trace(state.params, x_BT, x_BT),
        "next-token logits": lambda: next_token_logits.trace(plan, state.params, x_1T, position),
    }


def _walk(module: ir.Module) -> Iterator[ir.Operation]:
    waiting = [module.operation]
    while waiting:
        operation = waiting.pop()
        yield operation
        waiting.extend(inner.operation for region in operation.regions for block in region for inner in block)


def _calls(module: ir.Module) -> dict[str, ir.Operation]:
    """By the name of a function, one that calls it."""
    return {ir.FlatSymbolRefAttr(op.attributes["callee"]).value: op for op in _walk(module) if op.name == "func.call"}


def _target(call: ir.Operation) -> str:
    return str(ir.StringAttr(call.attributes["call_target_name"]).value)


def _contracts_as_a_matmul(dot: ir.Operation) -> bool:
    numbers = stablehlo.DotDimensionNumbers(dot.attributes["dot_dimension_numbers"])
    return len(numbers.lhs_contracting_dimensions) <= 1 or not numbers.lhs_batching_dimensions


def _gathers_by_rows(gather: ir.Operation) -> bool:
    numbers = stablehlo.GatherDimensionNumbers(gather.attributes["dimension_numbers"])
    index_dimensions = ir.RankedTensorType(gather.operands[1].type).rank
    return not numbers.operand_batching_dims and numbers.index_vector_dim == index_dimensions - 1


def _scatters_by_rows(scatter: ir.Operation) -> bool:
    numbers = stablehlo.ScatterDimensionNumbers(scatter.attributes["scatter_dimension_numbers"])
    indexed = list(numbers.scattered_dims_to_operand_dims)
    leading = list(range(len(indexed)))
    return (
        len(scatter.operands) == 3
        and not numbers.input_batching_dims
        and indexed == list(numbers.inserted_window_dims) == leading
        and _body_is_one_of(("add", "multiply", "maximum", "minimum"), scatter)
    )


def _reduces_one_operand(reduce: ir.Operation) -> bool:
    reducers = ("add", "multiply", "maximum", "minimum", "and", "or")
    return len(reduce.operands) == 2 and _body_is_one_of(reducers, reduce)


def _element_type(value: ir.Value) -> str:
    return str(ir.ShapedType(value.type).element_type)


def _has_its_operands_type(dot: ir.Operation) -> bool:
    return len({_element_type(value) for value in (*dot.operands, *dot.results)}) == 1


def _multiplies_one_type(dot: ir.Operation) -> bool:
    operands, result = {_element_type(value) for value in dot.operands}, _element_type(dot.results[0])
    return len(operands) == 1 and operands <= {"f32", "f16", "bf16"} and result in {"f32", *operands}


def _scatters_one_operand(scatter: ir.Operation) -> bool:
    return len(scatter.operands) == 3


def _scatters_small_elements(scatter: ir.Operation) -> bool:
    return len(scatter.operands) == 3 and _element_type(scatter.operands[0]) in ("i32", "ui32", "f32", "f16", "bf16")


def _rounds_to_a_small_float(rounding: ir.Operation) -> bool:
    exponent, mantissa = (ir.IntegerAttr(rounding.attributes[f"{part}_bits"]).value for part in ("exponent", "mantissa"))
    return _element_type(rounding.operands[0]) in ("f32", "f16", "bf16") and 1 <= exponent <= 8 and 0 <= mantissa <= 22


# Whether a use keeps the limit that a plugin's table has for its operation.
_KEEPS_LIMIT: dict[str, dict[str, Callable[[ir.Operation], bool]]] = {
    "jax-metal": {
        "dot_general": _contracts_as_a_matmul,
        "gather": _gathers_by_rows,
        "reduce": _reduces_one_operand,
        "scatter": _scatters_by_rows,
    },
    "jax-mps": {
        "dot_general": _has_its_operands_type,
        "reduce": _reduces_one_operand,
        "scatter": _scatters_by_rows,
    },
    "metaljax": {"reduce_precision": _rounds_to_a_small_float, "scatter": _scatters_one_operand},
    "jax-graft": {"dot_general": _multiplies_one_type, "scatter": _scatters_small_elements},
}


def _body_is_one_of(names: tuple[str, ...], operation: ir.Operation) -> bool:
    (body,) = operation.regions[0]
    inner = [op.operation.name for op in body]
    return len(inner) == 2 and inner[0].removeprefix("stablehlo.") in names and inner[1] == "stablehlo.return"


def _element_types(operation: ir.Operation) -> set[str]:
    """Of an operation's results and of its regions' arguments, which are a function's parameters."""
    values = [*operation.results, *(value for region in operation.regions for block in region for value in block.arguments)]
    return {str(value.type.element_type) if hasattr(value.type, "element_type") else str(value.type) for value in values}


def _place(operation: ir.Operation, calls: dict[str, ir.Operation]) -> str:
    """The innermost line outside jax that an operation comes from, or a call of the function that it stands in."""
    lines = re.findall(r'"([^"]*\.py)":(\d+)', str(operation.location))
    for path, line in lines:
        if "site-packages" not in path:
            return f"{path.rpartition('/')[2]}:{line}"
    function: ir.Operation | None = operation
    while function is not None and function.name != "func.func":
        function = function.parent
    call = None if function is None else calls.get(ir.StringAttr(function.attributes["sym_name"]).value)
    return _place(call, calls) if call is not None else "an unknown place"
