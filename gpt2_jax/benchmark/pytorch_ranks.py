"""PyTorch on several devices, a process for each, as torchrun starts them: DistributedDataParallel, and FSDP2.

python -m gpt2_jax.benchmark.pytorch_ranks REQUEST RANK PORT    one of the ranks behind the first: a step for each line that it
reads, so that it leaves its device to others while the first has no turn
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial

import numpy as np
import torch
from torch import distributed

from gpt2_jax.benchmark import pytorch_model
from gpt2_jax.benchmark.train_system import LEARNING_RATE, WEIGHT_DECAY, Prepared, Request, batch_of, random_parameters
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.machine import process_peak
from gpt2_jax.ops.cpu import library as custom_calls

_LONGEST = timedelta(seconds=600)  # that a rank waits for another


def prepare(request: Request, config: GPT2Config, params: np.ndarray, x_ABT: np.ndarray, y_ABT: np.ndarray) -> Prepared:
    """This process as the first rank, and the others as processes of their own, which step with it."""
    if request.backend == "metal":
        raise NotImplementedError("PyTorch is compared with on the CPU and on NVIDIA GPUs")
    if request.backend == "cuda" and torch.cuda.device_count() < request.devices:
        raise NotImplementedError(f"this PyTorch sees {torch.cuda.device_count()} NVIDIA GPUs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [sys.executable, "-m", "gpt2_jax.benchmark.pytorch_ranks", json.dumps(dataclasses.asdict(request))]
    # Their output is not this process's, which a bench reads.
    others = [
        subprocess.Popen([*program, str(rank), str(port)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        for rank in range(1, request.devices)
    ]

    def end_others() -> None:
        for process in others:
            process.kill()
            process.wait()

    atexit.register(end_others)
    own_step = _make_step(request, config, params, x_ABT, y_ABT, 0, port)

    def step() -> torch.Tensor:
        for process in others:
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.flush()
        return own_step()

    on_gpu = request.backend == "cuda"
    known = {
        "matmul": "pytorch",
        "compile_seconds": 0.0,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    }
    return Prepared(step, known, peak_bytes=torch.cuda.max_memory_allocated if on_gpu else process_peak)


def _make_step(
    request: Request, config: GPT2Config, params: np.ndarray, x_ABT: np.ndarray, y_ABT: np.ndarray, rank: int, port: int
) -> Callable[[], torch.Tensor]:
    on_gpu = request.backend == "cuda"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("highest" if request.matmul_precision == "highest" else "high")
    torch.set_num_threads(max(1, custom_calls.num_threads() // request.devices))
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=request.devices,
        timeout=_LONGEST,
    )
    # On GPUs what one GPU does best: cuDNN's attention, a residual stream in bfloat16, and torch.compile.
    tuned = on_gpu and request.dtype == "bfloat16"
    model = pytorch_model.model_from_buffer(params, config, low_residual=tuned).to(device)
    if request.name == "pytorch_fsdp":
        forward, syncs = _sharded(model, request, compiles=on_gpu)
    else:
        forward = torch.nn.parallel.DistributedDataParallel(
            model, device_ids=[rank] if on_gpu else None, gradient_as_bucket_view=True
        )
        syncs = forward.no_sync
        if on_gpu:
            forward = torch.compile(forward)
    optimizer = pytorch_model.make_optimizer(model, LEARNING_RATE, WEIGHT_DECAY)
    mine = slice(rank * request.batch_size, (rank + 1) * request.batch_size)
    x, y = (torch.from_numpy(tokens[:, mine]).long().to(device) for tokens in (x_ABT, y_ABT))
    cudnn = partial(torch.nn.attention.sdpa_kernel, torch.nn.attention.SDPBackend.CUDNN_ATTENTION)
    attention = cudnn if tuned else nullcontext
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=request.dtype == "bfloat16")

    def step() -> torch.Tensor:
        total = torch.zeros((), device=device)
        for number, (x_BT, y_BT) in enumerate(zip(x, y, strict=True)):
            is_last = number == request.micro_batches - 1
            with nullcontext() if is_last else syncs(), autocast, attention():
                loss = forward(x_BT, y_BT) / request.micro_batches
                loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), pytorch_model.GRADIENT_CLIP)
        optimizer.step()
        optimizer.zero_grad()
        distributed.all_reduce(total)
        return total / request.devices

    return step


def _sharded(
    model: torch.nn.Module, request: Request, *, compiles: bool
) -> tuple[torch.nn.Module, Callable[[], AbstractContextManager[None]]]:
    """The model under FSDP2, block by block, float32 summed; and what keeps a backward pass from scattering: nothing does,
    as with --zero 3."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    low = torch.bfloat16 if request.dtype == "bfloat16" else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
    mesh = distributed.init_device_mesh(request.backend, (request.devices,))
    for block in model.blocks:
        if compiles:
            block.compile()
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy), nullcontext


def main() -> None:
    request, rank, port = Request(**json.loads(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
    config = GPT2Config(**request.model)
    step = _make_step(request, config, random_parameters(config.layout), *batch_of(request, config), rank, port)
    for _ in sys.stdin:
        step()


if __name__ == "__main__":
    main()
