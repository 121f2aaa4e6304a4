"""Train a small model on this machine's device and on the CPU from the same state, and say whether they agree, and how fast.

  python scripts/selfcheck.py --backend metal       the Apple GPU, and the CPU with and without Accelerate
  python scripts/selfcheck.py --backend cpu         the CPU with the custom calls, against XLA

The report, selfcheck.json, is made for sharing: it holds no name of a person or machine, no path and no network address.
Exit status 1 when they disagree.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpt2_jax.commands.command_line import parse
from gpt2_jax.compute.backend import select_backend
from gpt2_jax.config import BackendName
from gpt2_jax.output import output_is_no_result


@dataclass(frozen=True)
class Arguments:
    backend: BackendName = "auto"
    """The device to check."""
    metal_plugin: Literal["auto", "jax-mps", "metaljax", "jax-graft", "jax-metal"] = "auto"
    """Which jax plugin for the Apple GPU."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of products and activations."""
    output: Path = Path("selfcheck.json")
    """Where the report goes."""


def main(words: list[str]) -> None:
    arguments = parse(Arguments, __doc__, words)
    output_is_no_result()
    # Before anything imports jax.
    backend = select_backend(arguments.backend, metal_plugin=arguments.metal_plugin, full_float32=True)

    from gpt2_jax import selfcheck
    from gpt2_jax.compute.backend import open_device
    from gpt2_jax.data.tokenizer import gpt2_tokenizer

    print(f"{backend.name} ({open_device(backend)}): {backend.reason}", flush=True)
    config = selfcheck.SMALL_MODEL
    tokens_per_step = selfcheck.BATCH_SIZE * config.max_sequence_length
    systems = selfcheck.systems_to_check(backend, config, arguments.dtype)
    print(f"training {selfcheck.STEPS} steps on {'; '.join(system.name for system in systems)} ...", flush=True)
    tokens = selfcheck.built_in_tokens(selfcheck.STEPS * tokens_per_step + 1)
    checks = selfcheck.check_systems(systems, tokens)

    print(f"\n{'':<22}{'last loss':>11}{'compiled in':>13}{'a step':>11}{'from':>10}{'to':>10}{'tok/s':>9}")
    for check in checks:
        outcome = check.outcome
        median, seconds = outcome.median_seconds, outcome.step_seconds
        print(
            f"{outcome.system.name:<22}{outcome.losses[-1]:>11.6f}{outcome.compile_seconds:>11.1f} s"
            f"{1000 * median:>8.1f} ms{1000 * min(seconds):>10.1f}{1000 * max(seconds):>10.1f}{tokens_per_step / median:>9.0f}"
        )
    print(f"\n{'':<22}{'against':<10}{'':<26}{'max |difference|':>18}{'of largest value':>18}{'of tolerance':>14}")
    for check in checks:
        for against, rows in ((systems[0].name, check.against_reference), ("pytorch", check.against_pytorch)):
            for label, row in selfcheck.rows_to_show(rows) if check is not checks[0] or against == "pytorch" else []:
                verdict = "ok" if row.passed else "FAILED"
                print(
                    f"{check.outcome.system.name:<22}{against:<10}{label:<26}"
                    f"{row.max_absolute:>18.3e}{row.max_relative:>18.3e}{row.used_tolerance:>13.1%}  {verdict}"
                )
    if not checks[0].against_pytorch:
        print("PyTorch is not installed, so it was not asked: pip install -e '.[test]'")
    for check in checks:
        same = "" if check is checks[0] else " (the same)" if check.sample == checks[0].sample else " (another)"
        print(f"\ntext of {check.outcome.system.name}{same}: {gpt2_tokenizer().decode(check.sample)}")
    selfcheck.write_report(arguments.output, checks, config, dtype=arguments.dtype)
    failed = [check.outcome.system.name for check in checks if not check.passed]
    print(f"\nreport: {arguments.output}\n{'FAILED: ' + '; '.join(failed) if failed else 'all agree within tolerance'}")
    sys.exit(1 if failed else 0)
