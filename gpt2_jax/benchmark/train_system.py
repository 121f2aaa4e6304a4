"""One system's training steps, timed, in a process of its own: what bench_train.py starts for each.

python -m gpt2_jax.benchmark.train_system REQUEST    REQUEST: the JSON object of a `Request`

After its first step, and after each turn, it prints TURN and the bytes of memory that it has needed, and waits for a line:
the steps and the seconds of the next turn; there is none at the end of its input. Prints one JSON object last: the fields
of a `Result`, or {"refused": the reason}.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gpt2_jax.buffer.layout import ParameterLayout
from gpt2_jax.compute.backend import open_device, select_backend
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.machine import keep_freed_memory, process_peak
from gpt2_jax.ops.cpu import library as custom_calls

SYSTEMS = ("gpt2_jax", "jax_plain", "pytorch", "pytorch_compiled")
DTYPES = ("float32", "bfloat16")
TURN = "waits for its turn, having needed bytes: "
_LEARNING_RATE, _WEIGHT_DECAY = 3e-4, 0.1


@dataclass(frozen=True)
class Request:
    name: str  # of SYSTEMS
    matmul: str  # an implementation or 'auto', of gpt2_jax only
    dtype: str
    matmul_precision: str  # default, or a value of --matmul-precision
    backend: str
    model: dict[str, int]  # the sizes of a GPT2Config
    batch_size: int
    sequence_length: int
    steps: int


@dataclass(frozen=True)
class Result:
    matmul: str
    seconds: list[float]  # of each timed step
    compile_seconds: float
    peak_memory_bytes: int
    losses: list[float]  # of every step from the first
    device: str
    precision: str  # of the products
    weight_gradient_precision: str  # of those that are the gradient of a weight
    estimated_bytes: int | None = None  # of gpt2_jax only, as the next
    compiled_bytes: int | None = None
    plan: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # who computes what, as the start table has it


# A function that runs one step to its end and returns its loss, and what is known of the Result by then.
_Prepared = tuple[Callable[[], float], dict[str, Any]]


class Turn(NamedTuple):
    steps: int
    seconds: float  # after which no step begins but the first two


def measure_system(request: Request, await_turn: Callable[[], Turn | None] = lambda: Turn(1 << 30, math.inf)) -> Result:
    """Steps on one batch of random tokens from the same random weights in every system, in turns until there is none.

    NotImplementedError with the reason for a system that cannot be had.
    """
    config = GPT2Config(**request.model)
    shape = (2, request.batch_size, request.sequence_length)
    x_BT, y_BT = np.random.default_rng(0).integers(0, config.vocab_size, shape).astype(np.int32)
    prepare = {"gpt2_jax": _gpt2_jax, "jax_plain": _jax_plain}.get(request.name, _pytorch)
    step, result = prepare(request, config, random_parameters(config.layout), x_BT, y_BT)
    losses: list[float] = []

    def time_step() -> float:
        started = time.perf_counter()
        losses.append(step())
        return time.perf_counter() - started

    # PyTorch compiles in the first.
    first = [time_step() for _ in range(2 if request.name == "pytorch_compiled" else 1)]
    timed: list[float] = []
    while len(timed) < request.steps and (turn := await_turn()):
        # Not timed: a library may have to take memory anew that it gave back, and the caches hold another's.
        spent = last = time_step()
        for number in range(min(turn.steps, request.steps - len(timed))):
            if number > 0 and spent + last > turn.seconds:
                break
            last = time_step()
            spent += last
            timed.append(last)
    timed = timed or first[-1:]  # when there was no time for more
    precision = "BF16_BF16_F32" if request.dtype == "bfloat16" else "F32_F32_F32"
    result = {"precision": precision, "weight_gradient_precision": precision, **result}
    if request.name == "pytorch_compiled":
        result["compile_seconds"] = first[0] - statistics.median(timed)
    return Result(**{"seconds": timed, "losses": losses, "peak_memory_bytes": _peak(request), **result})


def random_parameters(layout: ParameterLayout) -> np.ndarray:
    """A flat buffer like a fresh model's: normals times 0.02, LayerNorm gains 1, biases 0, padding rows 0."""
    # One block of normals, repeated: drawing them all takes seconds. Its length is a prime, so no row is another's twin.
    params = np.resize(0.02 * np.random.default_rng(1).standard_normal(1_048_583, dtype=np.float32), layout.num_parameters)
    for name, tensor in layout.views(params).items():
        if name.endswith("b"):
            tensor[...] = 0.0
        elif name in ("ln1w", "ln2w", "lnfw"):
            tensor[...] = 1.0
    params[slice(*layout["wte"].padding_span)] = 0.0
    return params


def _gpt2_jax(request: Request, config: GPT2Config, params: np.ndarray, x_BT: np.ndarray, y_BT: np.ndarray) -> _Prepared:
    import jax
    import jax.numpy as jnp

    from gpt2_jax.compute import memory
    from gpt2_jax.compute.plan import make_plan
    from gpt2_jax.compute.step import compile_step, create_state
    from gpt2_jax.config import ComputeSettings, OptimizerSettings

    backend = select_backend(request.backend)
    if backend.platform == "cpu":
        keep_freed_memory()
    device = open_device(backend)
    asked = {"dtype": request.dtype, "matmul": request.matmul, "matmul_precision": request.matmul_precision}
    compute: dict[str, Any] = asked
    try:
        plan = make_plan(ComputeSettings(**compute), backend, config)
    except Gpt2JaxError as error:
        raise NotImplementedError(str(error).splitlines()[0]) from None
    settings = OptimizerSettings(schedule="constant", learning_rate=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    x_ABT, y_ABT = jnp.asarray(x_BT[None]), jnp.asarray(y_BT[None])
    started = time.perf_counter()
    compiled = compile_step(plan, settings, request.steps, x_ABT.shape)
    compile_seconds = time.perf_counter() - started
    state = create_state(plan, params)

    def step() -> float:
        nonlocal state
        state, metrics = jax.block_until_ready(compiled(state, x_ABT, y_ABT))
        return float(metrics.loss)

    precision = {}
    if plan.product_precision is not None:
        precision = {"precision": plan.product_precision, "weight_gradient_precision": plan.weight_gradient_precision}
    counted = memory.compiled_memory(plan, compiled)
    return step, {
        **precision,
        "matmul": plan.linear.name,
        "plan": plan.rows(),
        "compile_seconds": compile_seconds,
        "device": device,
        "estimated_bytes": memory.estimate(plan, request.batch_size, request.sequence_length).total,
        "compiled_bytes": None if counted is None else counted.total,
    }


def _jax_plain(request: Request, config: GPT2Config, params: np.ndarray, x_BT: np.ndarray, y_BT: np.ndarray) -> _Prepared:
    import jax
    import jax.numpy as jnp

    from gpt2_jax.benchmark import plain_jax

    device = open_device(select_backend(request.backend))
    optimizer = plain_jax.make_optimizer(_LEARNING_RATE, _WEIGHT_DECAY)
    tree = plain_jax.parameters_from_buffer(params, config.layout)
    state = optimizer.init(tree)
    cudnn = request.backend == "cuda" and request.dtype == "bfloat16"
    train_step = plain_jax.make_train_step(
        optimizer,
        num_heads=config.num_heads,
        dtype=jnp.dtype(request.dtype),
        attention="cudnn" if cudnn else None,
        unroll=request.backend == "cuda",
    )
    x, y = jnp.asarray(x_BT), jnp.asarray(y_BT)
    started = time.perf_counter()
    compiled = train_step.lower(tree, state, x, y).compile()
    compile_seconds = time.perf_counter() - started

    def step() -> float:
        nonlocal tree, state
        tree, state, loss = jax.block_until_ready(compiled(tree, state, x, y))
        return float(loss)

    return step, {"matmul": "xla", "compile_seconds": compile_seconds, "device": device}


def _pytorch(request: Request, config: GPT2Config, params: np.ndarray, x_BT: np.ndarray, y_BT: np.ndarray) -> _Prepared:
    try:
        import torch
    except ImportError:
        raise NotImplementedError("PyTorch is not installed: pip install -e '.[test]'") from None
    from gpt2_jax.benchmark import pytorch_model

    if request.backend == "metal":
        raise NotImplementedError("PyTorch is compared with on the CPU and on NVIDIA GPUs")
    if request.backend == "cuda" and not torch.cuda.is_available():
        raise NotImplementedError("this PyTorch sees no NVIDIA GPU")
    device = torch.device(request.backend)
    torch.set_num_threads(custom_calls.num_threads())
    if request.backend == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, which is XLA's default there
    model = pytorch_model.model_from_buffer(params, config).to(device)
    optimizer = pytorch_model.make_optimizer(model, _LEARNING_RATE, _WEIGHT_DECAY)
    forward = torch.compile(model) if request.name == "pytorch_compiled" else model
    x, y = (torch.from_numpy(tokens).long().to(device) for tokens in (x_BT, y_BT))
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=request.dtype == "bfloat16")

    def step() -> float:
        with autocast:
            loss = forward(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), pytorch_model.GRADIENT_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return float(loss.detach())

    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return step, {"matmul": "pytorch", "compile_seconds": 0.0, "device": name}


def _peak(request: Request) -> int:
    """Bytes: of the device's allocator on an accelerator, else of the process, whose libraries are counted too."""
    if not request.name.startswith("pytorch"):
        from gpt2_jax.compute.memory import measured_peak

        return measured_peak()[0]
    import torch

    return int(torch.cuda.max_memory_allocated()) if request.backend == "cuda" else process_peak()


def _await_turn() -> Turn | None:
    print(f"{TURN}{process_peak()}", flush=True)
    line = sys.stdin.readline().split()
    return Turn(int(line[0]), float(line[1])) if line else None


def main() -> None:
    request = Request(**json.loads(sys.argv[1]))
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # compile times are measured
    try:
        answer = dataclasses.asdict(measure_system(request, _await_turn))
    except NotImplementedError as error:
        answer = {"refused": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
