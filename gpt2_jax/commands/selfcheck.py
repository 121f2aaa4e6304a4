"""Train a small model on this machine's device and on the CPU from the same state, and say whether they agree, and how fast.

  python scripts/selfcheck.py --backend metal       the Apple GPU, and the CPU with and without Accelerate
  python scripts/selfcheck.py --backend cpu         the CPU with the custom calls, against XLA
  python scripts/selfcheck.py --markdown             the report as one pastes it into an issue

The report, selfcheck.json, is made for sharing: it holds no name of a person or machine, no path and no network address.
Exit status 1 when they disagree.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

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
    dtype: Literal["both", "float32", "bfloat16"] = "both"
    """Dtype of products and activations."""
    output: Path = Path("selfcheck.json")
    """Where the report goes."""
    markdown: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the report as Markdown for an issue, and nothing else to standard output."""


def main(words: list[str]) -> None:
    arguments = parse(Arguments, __doc__, words)
    if not arguments.markdown:
        output_is_no_result()
    # Before anything imports jax.
    backend = select_backend(arguments.backend, metal_plugin=arguments.metal_plugin, full_float32=True)

    from gpt2_jax import selfcheck, selfcheck_report
    from gpt2_jax.compute.backend import open_device

    say = partial(print, file=sys.stderr if arguments.markdown else sys.stdout, flush=True)
    config = selfcheck.SMALL_MODEL
    dtypes: list[Literal["float32", "bfloat16"]]
    dtypes = ["float32", "bfloat16"] if arguments.dtype == "both" else [arguments.dtype]
    results = []
    with selfcheck.compiled_programs(backend) as programs:
        say(f"{backend.name} ({open_device(backend)}): {backend.reason}")
        tokens = selfcheck.built_in_tokens(selfcheck.STEPS * selfcheck.BATCH_SIZE * config.max_sequence_length + 1)
        for dtype in dtypes:
            systems = selfcheck.systems_to_check(backend, config, dtype)
            say(f"training {selfcheck.STEPS} steps in {dtype} on {'; '.join(system.name for system in systems)} ...")
            results.append(selfcheck.check_dtype(systems, tokens, programs))
            for line in selfcheck_report.text_lines(results[-1], config):
                say(line)
    report = selfcheck_report.report_of(results, config)
    selfcheck_report.write_report(arguments.output, report)
    failed = [f"{found.dtype}: {found.failure}" for found in results if found.failure]
    failed += [
        f"{check.outcome.system.name} in {found.dtype}" for found in results for check in found.checks if not check.passed
    ]
    say(f"\nreport: {arguments.output}\n{'FAILED: ' + '; '.join(failed) if failed else 'all agree within tolerance'}")
    if arguments.markdown:
        print(selfcheck_report.markdown(report), end="")
    sys.exit(1 if failed else 0)
