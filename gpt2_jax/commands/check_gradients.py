"""Check loss, logits, every gradient and ten optimizer steps against PyTorch. Exit status 1 when a tolerance is passed.

  python scripts/check_gradients.py                              GPT-2 124M, a batch of 1 x 64 random tokens
  python scripts/check_gradients.py --backend cuda --dtype bfloat16
  python scripts/check_gradients.py --checkpoint runs/NAME --step 300

PyTorch always computes in float32 on the CPU. Needs pip install -e '.[test]'.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gpt2_jax.commands.command_line import parse
from gpt2_jax.compute.backend import select_backend
from gpt2_jax.config import BackendName, ModelSettings
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.files import FilePath


@dataclass(frozen=True)
class Arguments:
    size: str = "d12"
    """Descriptor of a randomly initialized model: d6, d12, gpt3:c768 ..."""
    checkpoint: FilePath | None = None
    """A run folder (its newest complete checkpoint), a llm.c model file or a Hugging Face folder to check instead."""
    step: int | None = None
    """Of a run folder the checkpoint of this step."""
    batch_size: int = 1
    """Sequences."""
    sequence_length: int = 64
    """Tokens of each."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of this project's products and activations."""
    backend: BackendName = "auto"
    """Where this project computes."""
    matmul: Literal["auto", "xla", "naive", "blocked", "simd", "threaded", "amx", "accelerate", "openblas"] = "auto"
    """Implementation of this project's matrix products."""
    matmul_precision: Literal["default", "high", "highest"] = "highest"
    """Of float32 products; default is what training does. With amx, high is beyond the tolerance for d12."""


def main(words: list[str]) -> None:
    arguments = parse(Arguments, __doc__, words)
    backend = select_backend(arguments.backend, full_float32=True)  # before anything imports jax

    from gpt2_jax.compute.backend import open_device
    from gpt2_jax.compute.plan import make_plan
    from gpt2_jax.config import ComputeSettings
    from gpt2_jax.gradient_check import check_gradients
    from gpt2_jax.models.weights import load_weights, model_source

    device = open_device(backend)
    source = model_source(arguments.checkpoint or arguments.size, arguments.step)
    print(f"checking {source}", flush=True)
    config, params = load_weights(ModelSettings(init=source))
    if arguments.batch_size < 1 or not 1 <= arguments.sequence_length <= config.max_sequence_length:
        raise Gpt2JaxError(
            f"expected --batch-size of at least 1 and --sequence-length 1 to {config.max_sequence_length}, "
            f"found {arguments.batch_size} and {arguments.sequence_length}"
        )
    compute = ComputeSettings(dtype=arguments.dtype, matmul=arguments.matmul, matmul_precision=arguments.matmul_precision)
    plan = make_plan(compute, backend, config)
    print(
        f"{backend.name} ({device}), {arguments.dtype}, matmul {plan.linear.name}, against PyTorch float32 on the CPU",
        flush=True,
    )
    shape = (2, arguments.batch_size, arguments.sequence_length)
    x_BT, y_BT = np.random.default_rng(0).integers(0, config.vocab_size, shape).astype(np.int32)
    comparisons = check_gradients(plan, params, x_BT, y_BT)

    print(f"{'':<18}{'max |difference|':>18}{'of largest value':>18}{'of tolerance':>14}")
    for row in comparisons:
        verdict = "ok" if row.passed else "FAILED"
        print(f"{row.name:<18}{row.max_absolute:>18.3e}{row.max_relative:>18.3e}{row.used_tolerance:>13.1%}  {verdict}")
    failed = [row.name for row in comparisons if not row.passed]
    print(f"FAILED: {', '.join(failed)}" if failed else "all within tolerance")
    sys.exit(1 if failed else 0)
