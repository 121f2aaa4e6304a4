"""What jax-mps would be given, on this machine: the Python of its wheel for macOS, downloaded once, makes jax's programs.

The plugin's Python says what a program holds; nothing of its machine code runs here. It replaces functions of jax for the
whole process, so `python -m tests.jax_mps` is a process of its own, which prints what it found as one JSON object.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

VERSION = "0.11.1"
_SECONDS = 120
_MODULE = "jax_plugins.mps.ops"


class UnavailableError(Exception):
    """The wheel is not here and cannot be downloaded, or is for another jax."""


def load_operations() -> ModuleType:
    """Import the wheel's module of operations under its own name, give jax its forms for the platform mps, and let it
    replace jax.nn's functions, as it does when jax loads the plugin; once a process, which is then no good for other
    tests. UnavailableError where the wheel cannot be had."""
    # The platform's name, which jax checks where a form is registered; the client is never made.
    from jax._src import xla_bridge

    xla_bridge.register_backend_factory("mps", lambda: None, priority=-1000)
    source = _wheel_folder() / "jax_plugins" / "mps" / "ops.py"
    spec = importlib.util.spec_from_file_location(_MODULE, source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise UnavailableError(f"jax-mps {VERSION} is for a newer jax: {error}") from None
    module.register_fused_ops()
    module.patch_jax_functions()
    return module


def _wheel_folder() -> Path:
    """Where the Python of the wheel lies; downloaded when it is not there yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gpt2_jax" / "tests"
    folder = cache / f"jax_mps-{VERSION}"
    if folder.exists():
        return folder
    with tempfile.TemporaryDirectory() as downloads:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--platform=macosx_14_0_arm64", "--python-version=3.12", f"--dest={downloads}", f"jax-mps=={VERSION}"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
        except (subprocess.SubprocessError, OSError) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
            raise UnavailableError(f"jax-mps {VERSION}: expected to download its wheel for macOS, found: {reason}") from None
        (wheel,) = Path(downloads).glob("*.whl")
        unpacked = Path(downloads) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked, [name for name in archive.namelist() if name.endswith((".py", "METADATA"))])
        cache.mkdir(parents=True, exist_ok=True)
        # Two processes of the tests may download at the same time; the first wins.
        try:
            unpacked.rename(folder)
        except OSError:
            if not folder.exists():
                shutil.copytree(unpacked, folder, dirs_exist_ok=True)
    return folder


def use_twins(operations: ModuleType) -> None:
    """From now on, programs for the platform mps hold each operation's plain definition in place of the call."""
    import jax
    from jax.interpreters import mlir

    def as_it_is(definition: Callable[..., Any]) -> Callable[..., Any]:
        def promoting(*arguments: Any, **options: Any) -> Any:
            with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
                return definition(*arguments, **options)

        return promoting

    for name in ("sdpa_causal", "sdpa_causal_bwd", "layer_norm", "layer_norm_bwd", "gelu", "gelu_bwd"):
        primitive = getattr(operations, f"_{name}_p")
        plain = mlir.lower_fun(as_it_is(primitive.impl), multiple_results=primitive.multiple_results)
        mlir.register_lowering(primitive, plain, platform="mps")


def main() -> dict[str, Any]:
    import gpt2_jax  # noqa: F401  before jax
    from gpt2_jax.compute import metal_check
    from gpt2_jax.compute.backend import metal_backend
    from gpt2_jax.compute.metal_plugins import METAL_PLUGINS
    from gpt2_jax.config import load_config
    from gpt2_jax.models.weights import model_config_from_settings
    from tests.compute.test_metal_check import PRESETS, SMALL, small_run

    try:
        operations = load_operations()
    except UnavailableError as reason:
        return {"unavailable": str(reason)}
    backend = metal_backend(METAL_PLUGINS[0], "test")
    runs = [(path.stem, load_config(path)) for path in PRESETS]
    small = small_run()
    one = dataclasses.replace(small, data=dataclasses.replace(small.data, total_batch_size=0))
    runs += [("small", small), ("small, one micro-batch", one)]
    found: dict[str, Any] = {"programs": []}
    for name, config in runs:
        model = SMALL if name.startswith("small") else model_config_from_settings(config.model)
        assert model is not None
        for dtype in ("float32", "bfloat16"):
            for recompute in ("none", "gelu", "layernorm", "block") if name in ("small", "demo") else ("none",):
                compute = dataclasses.replace(config.compute, dtype=dtype, recompute=recompute)
                run = dataclasses.replace(config, compute=compute)
                for function in metal_check.check_functions(run, model, backend):
                    found["programs"].append(
                        {
                            "run": name,
                            "layers": model.num_layers,
                            "dtype": dtype,
                            "recompute": recompute,
                            "micro_batches": config.num_micro_batches,
                            "function": function.name,
                            "lines": function.lines,
                            "seconds": function.seconds,
                            "violations": function.violations,
                            "custom_calls": dict(function.custom_calls),
                        }
                    )
    found["residual_bytes"] = residual_bytes(backend)
    use_twins(operations)
    found["differences"] = {dtype: differences(dtype) for dtype in ("float32", "bfloat16")}
    return found


def residual_bytes(backend: Any) -> int:
    """Bytes of the arrays that the 12 blocks of GPT-2 124M keep for the backward pass, B=4 T=1024 in float32, each once."""
    import jax
    import jax.numpy as jnp

    from gpt2_jax.buffer.weights import Weights
    from gpt2_jax.compute.plan import make_plan
    from gpt2_jax.config import ComputeSettings
    from gpt2_jax.families.gpt2 import config_from_descriptor
    from gpt2_jax.models.gpt2 import block
    from gpt2_jax.ops.summed import summed, value_of
    from gpt2_jax.ops.writer import empty_slots

    plan = make_plan(ComputeSettings(dtype="float32"), backend, config_from_descriptor("d12"))
    sizes: list[int] = []

    def blocks(flat_N: jax.Array, x_BTC: jax.Array) -> jax.Array:
        def forward(flat_N: jax.Array, x_BTC: jax.Array, slots: Any) -> tuple[jax.Array, jax.Array]:
            weights = Weights(plan, flat_N, slots)
            return value_of(plan, weights.layers(block, summed(x_BTC))), weights.flat_N

        (y_BTC, _), pull_back = jax.vjp(forward, flat_N, x_BTC, empty_slots(plan))
        kept = {id(leaf): leaf for leaf in jax.tree.leaves(pull_back) if isinstance(leaf, jax.Array) and leaf is not flat_N}
        sizes.extend(leaf.size * leaf.dtype.itemsize for leaf in kept.values() if leaf.shape != flat_N.shape)
        return y_BTC

    flat_N = jax.ShapeDtypeStruct((plan.layout.num_parameters,), jnp.float32)
    jax.eval_shape(blocks, flat_N, jax.ShapeDtypeStruct((4, 1024, plan.config.channels), jnp.float32))
    return sum(sizes)


def interpret(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function as jax-mps would be given it, run by StableHLO's interpreter. Booleans come back as integers:
    in some versions of jaxlib they end the process."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import stablehlo

    from gpt2_jax.compute import metal_check

    def without_booleans(*arguments: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.int32) if leaf.dtype == bool else leaf, function(*arguments))

    module = metal_check.lower(jax.jit(without_booleans).trace(*arguments), "mps")
    with module.context:
        inputs = [ir.DenseElementsAttr.get(np.array(leaf, order="C")) for leaf in jax.tree.leaves(arguments)]
        outputs = [np.array(output) for output in stablehlo.eval_module(module, inputs)]
    return jax.tree.unflatten(jax.tree.structure(jax.eval_shape(function, *arguments)), outputs)


def differences(dtype: str) -> dict[str, float]:
    """How far the programs for jax-mps, each of its operations by its plain definition, run by StableHLO's interpreter, are
    from those of the reference by XLA: relative to the largest of their kind. Of the parameters after a step, how far they
    are from what the step's own moments make of them, in roundings."""
    import jax
    import numpy as np
    from jaxlib.mlir.dialects import stablehlo

    from gpt2_jax.compute.backend import metal_backend
    from gpt2_jax.compute.forward import make_loss_function, next_token_logits
    from gpt2_jax.compute.metal_plugins import METAL_PLUGINS
    from gpt2_jax.compute.plan import make_plan
    from gpt2_jax.compute.step import create_state, loss_and_gradient, make_step
    from gpt2_jax.config import ComputeSettings, OptimizerSettings
    from tests.compute.test_metal_check import SMALL, decays, direction, parameters_of_small
    from tests.conftest import CPU

    if not hasattr(stablehlo, "eval_module"):
        return {}
    params = parameters_of_small()
    tokens_ABT = np.random.default_rng(1).integers(0, SMALL.vocab_size, (2, 2, 9)).astype(np.int32)
    x_ABT, y_ABT = (np.ascontiguousarray(each) for each in (tokens_ABT[..., :-1], tokens_ABT[..., 1:]))
    x_BT, y_BT = x_ABT[0], y_ABT[0]
    settings = ComputeSettings(dtype=dtype, matmul="auto")  # type: ignore[arg-type]
    plan = make_plan(settings, metal_backend(METAL_PLUGINS[0], "test"), SMALL)
    reference = make_plan(ComputeSettings(dtype=dtype, matmul="xla"), CPU, SMALL)  # type: ignore[arg-type]

    def difference(found: Any, wanted: Any) -> float:
        return float(np.abs(np.asarray(found) - np.asarray(wanted)).max() / np.abs(np.asarray(wanted)).max())

    def gradient(plan: Any, flat_N: jax.Array, x: jax.Array, y: jax.Array) -> Any:
        return loss_and_gradient(plan, flat_N, None, x, y)[:2]

    def logits(plan: Any, flat_N: jax.Array, x: jax.Array) -> jax.Array:
        return next_token_logits(plan, flat_N, x, np.int32(5))

    found_loss, found_gradient = interpret(partial(gradient, plan), params, x_BT, y_BT)
    loss, wanted_gradient = jax.jit(partial(gradient, reference))(params, x_BT, y_BT)
    found = {
        "loss": difference(found_loss, loss),
        "gradient": difference(found_gradient, wanted_gradient),
        "validation": difference(
            interpret(make_loss_function(plan), params, x_BT, y_BT), make_loss_function(reference)(params, x_BT, y_BT)
        ),
        "sampling": difference(interpret(partial(logits, plan), params, x_BT[:1]), logits(reference, params, x_BT[:1])),
    }
    # Two micro-batches, clipping, AdamW.
    optimizer = OptimizerSettings(schedule="constant", learning_rate=1e-3, warmup_steps=0, weight_decay=0.1)
    state = jax.tree.map(np.asarray, create_state(plan, params))
    there, metrics_there = interpret(make_step(plan, optimizer, 10), state, x_ABT, y_ABT)
    here, metrics = make_step(reference, optimizer, 10)(create_state(reference, params), x_ABT, y_ABT)
    found |= {
        "step's loss": difference(metrics_there.loss, metrics.loss),
        "step's norm": difference(metrics_there.gradient_norm, metrics.gradient_norm),
        "step's first moment": difference(there.optimizer.m, here.optimizer.m),
        "step's second moment": difference(there.optimizer.v, here.optimizer.v) / 2,  # squares
    }
    rate = float(metrics.learning_rate)
    change = rate * direction(there.optimizer, 1)
    expected = params.astype(np.float64) * (1 - rate * optimizer.weight_decay * decays(SMALL.layout)) - change
    rounding = 2.0**-24 * (4 * np.abs(params) + 16 * np.abs(change) + 1e-30)
    return found | {"parameters, in roundings": float((np.abs(there.params - expected) / rounding).max())}


if __name__ == "__main__":
    print(json.dumps(main()))
