"""One system's training steps, timed, in a process of its own: what bench_train.py starts for each.

python -m gpt2_jax.benchmark.train_system REQUEST    REQUEST: the JSON object of a `Request`

After its first step, and after each turn, it prints TURN and the bytes of memory that it has needed, and waits for a line:
the steps and the seconds of the next turn; there is none at the end of its input. Prints one JSON object last: the fields
of a `Result`, {"refused": the reason}, or {"failed": the exception, "no_memory": whether that was the reason}.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from gpt2_jax.benchmark import gpu
from gpt2_jax.buffer.layout import ParameterLayout
from gpt2_jax.compute.backend import open_device, select_backend, set_cpu_devices
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.llmc.token_shard import write_token_shard
from gpt2_jax.machine import keep_freed_memory, process_peak
from gpt2_jax.ops.cpu import library as custom_calls

# On a GPU "pytorch_compiled" is what nanoGPT does; "pytorch_best" has cuDNN's attention and a residual stream in bfloat16, and
# "pytorch_tuned" that and torch.compile's longest search, with CUDA graphs.
SYSTEMS = ("gpt2_jax", "pytorch_best", "pytorch_tuned", "llmc", "jax_plain", "pytorch", "pytorch_compiled")
COMPILED = ("pytorch_compiled", "pytorch_best", "pytorch_tuned")
WITH_CUDNN = ("pytorch_best", "pytorch_tuned")
ON_SEVERAL = ("pytorch_ddp", "pytorch_fsdp")  # a process for each device
ON_NVIDIA_IN_BFLOAT16 = (*WITH_CUDNN, "llmc")
DTYPES = ("float32", "bfloat16")
TURN = "waits for its turn, having needed bytes: "
LEARNING_RATE, WEIGHT_DECAY = 3e-4, 0.1
_STEPS_IN_A_ROW = 5  # on an accelerator, between two waits for the device, as training does not wait after each step


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
    micro_batches: int = 1  # of batch_size sequences each, in every step
    model_name: str = ""  # its descriptor
    llmc_program: str = ""  # the path of train_gpt2cu
    devices: int = 1  # that train together, each on batch_size sequences
    zero: int = 0  # of gpt2_jax on several devices: --zero


@dataclass(frozen=True)
class Result:
    matmul: str
    seconds: list[float]  # of each timed step; on an accelerator, of some in a row the mean
    compile_seconds: float
    peak_memory_bytes: int
    losses: list[float]  # of every step from the first
    device: str
    precision: str  # of the products
    weight_gradient_precision: str  # of those that are the gradient of a weight
    estimated_bytes: int | None = None  # of gpt2_jax only, as the next
    compiled_bytes: int | None = None
    plan: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # who computes what, as the start table has it


class Prepared(NamedTuple):
    step: Callable[[], Any]  # starts one step and returns its loss, of which a float must wait
    known: dict[str, Any]  # of the Result by then
    rest: Callable[[], None] = lambda: None  # at the end of a turn
    peak_bytes: Callable[[], int] = process_peak


class Turn(NamedTuple):
    steps: int
    seconds: float  # after which no step begins but the first two


def measure_system(request: Request, await_turn: Callable[[int], Turn | None] = lambda _: Turn(1 << 30, math.inf)) -> Result:
    """Steps on one batch of random tokens from the same random weights in every system, in turns until there is none;
    `await_turn` is told the bytes of memory that the system has needed.

    NotImplementedError with the reason for a system that cannot be had.
    """
    config = GPT2Config(**request.model)
    x_ABT, y_ABT = batch_of(request, config)
    several = dict.fromkeys(ON_SEVERAL, _pytorch_ranks)
    prepare = {"gpt2_jax": _gpt2_jax, "jax_plain": _jax_plain, "llmc": prepare_llmc, **several}.get(request.name, _pytorch)
    step, result, rest, peak_bytes = prepare(request, config, random_parameters(config.layout), x_ABT, y_ABT)
    in_a_row = 1 if request.backend == "cpu" else _STEPS_IN_A_ROW
    losses: list[float] = []

    def time_steps(count: int = 1) -> float:
        """Seconds of one step, the mean of so many."""
        started = time.perf_counter()
        losses.extend([float(loss) for loss in [step() for _ in range(count)]])
        return (time.perf_counter() - started) / count

    # PyTorch compiles in the first.
    first = [time_steps() for _ in range(2 if request.name in COMPILED else 1)]
    timed: list[float] = []
    rest()
    while len(timed) < request.steps and (turn := await_turn(peak_bytes())):
        # Not timed: a library may have to take memory anew that it gave back, and the caches hold another's.
        spent = last = time_steps()
        left = min(turn.steps, request.steps - len(timed))
        for number in range(0, left, in_a_row):
            count = min(in_a_row, left - number)
            if number > 0 and spent + count * last > turn.seconds:
                break
            last = time_steps(count)
            spent += count * last
            timed += [last] * count
        rest()
    timed = timed or first[-1:]  # when there was no time for more
    precision = "BF16_BF16_F32" if request.dtype == "bfloat16" else "F32_F32_F32"
    result = {"precision": precision, "weight_gradient_precision": precision, **result}
    if request.name in COMPILED:
        result["compile_seconds"] = first[0] - statistics.median(timed)
    return Result(**{"seconds": timed, "losses": losses, "peak_memory_bytes": peak_bytes(), **result})


def batch_of(request: Request, config: GPT2Config) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets (A, D * B, T) int32: the rows of all devices."""
    shape = (2, request.micro_batches, request.devices * request.batch_size, request.sequence_length)
    x_ABT, y_ABT = np.random.default_rng(0).integers(0, config.vocab_size, shape).astype(np.int32)
    return x_ABT, y_ABT


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


def _gpt2_jax(request: Request, config: GPT2Config, params: np.ndarray, x_ABT: np.ndarray, y_ABT: np.ndarray) -> Prepared:
    import jax
    import jax.numpy as jnp

    from gpt2_jax.compute import memory, parallel
    from gpt2_jax.compute.plan import make_plan
    from gpt2_jax.compute.step import compile_step, create_state
    from gpt2_jax.config import ComputeSettings, OptimizerSettings

    backend = select_backend(request.backend)
    if backend.platform == "cpu":
        keep_freed_memory()
        if request.devices > 1:
            set_cpu_devices(request.devices)
    try:
        device = open_device(backend, request.devices)
    except Gpt2JaxError as error:
        if request.devices == 1:
            raise
        raise NotImplementedError(error.problem) from None
    asked = {"dtype": request.dtype, "matmul": request.matmul, "matmul_precision": request.matmul_precision}
    compute: dict[str, Any] = asked
    try:
        plan = make_plan(ComputeSettings(**compute), backend, config, devices=request.devices, zero=request.zero)
    except Gpt2JaxError as error:
        raise NotImplementedError(str(error).splitlines()[0]) from None
    settings = OptimizerSettings(schedule="constant", learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    x, y = (
        jnp.asarray(tokens) if plan.devices == 1 else parallel.place(plan, tokens, parallel.BATCHES)
        for tokens in (x_ABT, y_ABT)
    )
    started = time.perf_counter()
    compiled = compile_step(plan, settings, request.steps, x.shape)
    compile_seconds = time.perf_counter() - started
    state = create_state(plan, params)

    def step() -> jax.Array:
        nonlocal state
        state, metrics = compiled(state, x, y)
        # The CPU's steps are waited for to their ends; on other devices the last loss of a row comes last.
        return jax.block_until_ready((state, metrics.loss))[1] if backend.platform == "cpu" else metrics.loss

    precision = {}
    if plan.product_precision is not None:
        precision = {"precision": plan.product_precision, "weight_gradient_precision": plan.weight_gradient_precision}
    counted = memory.compiled_memory(plan, compiled)
    known = {
        **precision,
        "matmul": plan.linear.name,
        "plan": plan.rows(),
        "compile_seconds": compile_seconds,
        "device": device,
        "estimated_bytes": memory.estimate(
            plan, request.batch_size, request.sequence_length, num_micro_batches=request.micro_batches
        ).total,
        "compiled_bytes": None if counted is None else counted.total,
    }
    return Prepared(step, known, peak_bytes=lambda: memory.measured_peak()[0])


def _jax_plain(request: Request, config: GPT2Config, params: np.ndarray, x_ABT: np.ndarray, y_ABT: np.ndarray) -> Prepared:
    import jax
    import jax.numpy as jnp

    from gpt2_jax.benchmark import plain_jax
    from gpt2_jax.compute import memory

    if request.micro_batches > 1:
        raise NotImplementedError("plain JAX has one micro-batch here")
    device = open_device(select_backend(request.backend))
    optimizer = plain_jax.make_optimizer(LEARNING_RATE, WEIGHT_DECAY)
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
    x, y = jnp.asarray(x_ABT[0]), jnp.asarray(y_ABT[0])
    started = time.perf_counter()
    compiled = train_step.lower(tree, state, x, y).compile()
    compile_seconds = time.perf_counter() - started

    def step() -> jax.Array:
        nonlocal tree, state
        tree, state, loss = compiled(tree, state, x, y)
        return jax.block_until_ready((tree, state, loss))[2] if request.backend == "cpu" else loss

    known = {"matmul": "xla", "compile_seconds": compile_seconds, "device": device}
    return Prepared(step, known, peak_bytes=lambda: memory.measured_peak()[0])


def _pytorch_ranks(request: Request, config: GPT2Config, params: np.ndarray, x_ABT: np.ndarray, y_ABT: np.ndarray) -> Prepared:
    try:
        from gpt2_jax.benchmark import pytorch_ranks
    except ImportError:
        raise NotImplementedError("PyTorch is not installed: pip install -e '.[test]'") from None
    return pytorch_ranks.prepare(request, config, params, x_ABT, y_ABT)


def _pytorch(request: Request, config: GPT2Config, params: np.ndarray, x_ABT: np.ndarray, y_ABT: np.ndarray) -> Prepared:
    try:
        import torch
    except ImportError:
        raise NotImplementedError("PyTorch is not installed: pip install -e '.[test]'") from None
    from gpt2_jax.benchmark import pytorch_model

    if request.backend == "metal":
        raise NotImplementedError("PyTorch is compared with on the CPU and on NVIDIA GPUs")
    if request.backend == "cuda" and not torch.cuda.is_available():
        raise NotImplementedError("this PyTorch sees no NVIDIA GPU")
    tuned = request.name in WITH_CUDNN
    if tuned and (request.backend, request.dtype) != ("cuda", "bfloat16"):
        raise NotImplementedError("cuDNN's attention is for NVIDIA GPUs, in bfloat16")
    device = torch.device(request.backend)
    torch.set_num_threads(custom_calls.num_threads())
    if request.backend == "cuda":
        # By default TF32, which is XLA's default there too.
        torch.set_float32_matmul_precision("highest" if request.matmul_precision == "highest" else "high")
    model = pytorch_model.model_from_buffer(params, config, low_residual=tuned).to(device)
    optimizer = pytorch_model.make_optimizer(model, LEARNING_RATE, WEIGHT_DECAY)
    if request.name == "pytorch_tuned" and request.micro_batches > 1:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
    forward = model
    if request.name in COMPILED:
        forward = torch.compile(model, mode="max-autotune" if request.name == "pytorch_tuned" else "default")
    x, y = (torch.from_numpy(tokens).long().to(device) for tokens in (x_ABT, y_ABT))
    cudnn = partial(torch.nn.attention.sdpa_kernel, torch.nn.attention.SDPBackend.CUDNN_ATTENTION)
    attention = cudnn if tuned else nullcontext
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=request.dtype == "bfloat16")

    def step() -> torch.Tensor:
        total = torch.zeros((), device=device)
        for x_BT, y_BT in zip(x, y, strict=True):
            with autocast, attention():
                loss = forward(x_BT, y_BT) / request.micro_batches
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), pytorch_model.GRADIENT_CLIP)
        optimizer.step()
        # CUDA graphs keep the gradients of a backward pass in memory of their own, which the next one writes over: where
        # gradients are added up, they are added to tensors that stay.
        optimizer.zero_grad(set_to_none=request.name != "pytorch_tuned" or request.micro_batches == 1)
        return total

    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    known = {"matmul": "pytorch", "compile_seconds": 0.0, "device": name}
    return Prepared(step, known, peak_bytes=torch.cuda.max_memory_allocated if device.type == "cuda" else process_peak)


def prepare_llmc(request: Request, config: GPT2Config, params: np.ndarray, x_ABT: np.ndarray, y_ABT: np.ndarray) -> Prepared:
    """llm.c's own trainer on random tokens, from its own random weights. It prints a line for each step, and is stopped
    between its turns."""
    if not request.llmc_program:
        raise NotImplementedError("llm.c's trainer is not given: --llmc-program PATH")
    if (request.backend, request.dtype) != ("cuda", "bfloat16"):
        raise NotImplementedError("llm.c's trainer is for NVIDIA GPUs, in bfloat16")
    folder = tempfile.TemporaryDirectory()
    shard = os.path.join(folder.name, "random_train.bin")
    tokens = x_ABT.size
    write_token_shard(shard, np.random.default_rng(0).integers(0, config.vocab_size, 4 * tokens + 1))
    shape = f"-e {request.model_name} -b {request.batch_size} -t {request.sequence_length} -d {tokens}"
    steps = 10 * request.steps + 100
    # It divides by the interval of its validations (-v), so there is one before the first step and none until the last.
    training = f"-x {steps} -l {LEARNING_RATE} -c {WEIGHT_DECAY} -v {steps} -m 1 -s 0 -h 0 -n 0"
    fastest = "-r 0 -ge 2"  # nothing computed anew, and GELU in the products
    words = [os.path.abspath(request.llmc_program), "-i", shard, "-j", shard, *f"{shape} {training} {fastest}".split()]
    used_by_others = gpu.used_memory()
    # Into a pipe it would write many steps' lines at once, into a terminal each when it is made.
    ours, its = os.openpty()
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=its, stderr=its, cwd=folder.name)
    os.close(its)
    lines = open(ours, encoding="utf-8", errors="replace")  # noqa: SIM115 - closed in end()
    last = ""

    def end() -> None:
        process.kill()
        process.wait()
        lines.close()
        folder.cleanup()

    atexit.register(end)

    def step() -> float:
        nonlocal last
        process.send_signal(signal.SIGCONT)
        with suppress(OSError):  # of a terminal whose other end is closed
            for line in lines:
                last = line.strip() or last
                if match := re.match(r"step +\d+/\d+ \| loss +([0-9.]+)", line):
                    return float(match[1])
        raise RuntimeError(f"{request.llmc_program}: expected a line for each step, found at its end: {last}")

    def peak_bytes() -> int:
        return int(gpu.used_memory() - used_by_others)

    known = {"matmul": "llm.c", "compile_seconds": 0.0, "device": "of llm.c"}
    return Prepared(step, known, lambda: process.send_signal(signal.SIGSTOP), peak_bytes)


def _await_turn(peak_bytes: int) -> Turn | None:
    print(f"{TURN}{peak_bytes}", flush=True)
    line = sys.stdin.readline().split()
    return Turn(int(line[0]), float(line[1])) if line else None


_NO_MEMORY = ("out of memory", "RESOURCE_EXHAUSTED", "OutOfMemoryError", "CUDA_ERROR_OUT_OF_MEMORY")


def main() -> None:
    request = Request(**json.loads(sys.argv[1]))
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # compile times are measured
    answer: dict[str, Any]
    try:
        answer = dataclasses.asdict(measure_system(request, _await_turn))
    except NotImplementedError as error:
        answer = {"refused": str(error)}
    except Exception as error:
        # The last line of what Python prints may be a remark of jax's on its frames.
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}"
        answer = {"failed": text.strip().splitlines()[0], "no_memory": any(words in text for words in _NO_MEMORY)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
