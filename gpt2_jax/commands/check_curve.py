"""Train PyTorch as a run was trained, from the same weights and on the same batches, and compare the losses of every step.
Exit status 1 when one differs by more than the tolerance.

  python scripts/check_curve.py runs/latest
  python scripts/check_curve.py runs/latest --steps 300 --plot curve.png

PyTorch trains on the GPU if it finds one. Needs pip install -e '.[test]'.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gpt2_jax.commands.command_line import parse
from gpt2_jax.compute.backend import select_backend
from gpt2_jax.config import load_saved_config
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.files import FilePath


@dataclass(frozen=True)
class Arguments:
    run: Annotated[FilePath, tyro.conf.Positional]
    """A run folder."""
    steps: int = 300
    """At most so many steps from the first."""
    tolerance: float = 0.01
    """By how much a step's loss may differ, as a share of PyTorch's."""
    plot: FilePath | None = None
    """A PNG of both curves."""


def main(words: list[str]) -> None:
    arguments = parse(Arguments, __doc__, words)
    select_backend("cpu")  # JAX makes the weights alone; the GPU is PyTorch's
    try:
        import torch
    except ImportError as error:
        raise Gpt2JaxError(f"expected the package {error.name}, found none", "pip install -e '.[test]'") from None

    from gpt2_jax.curve_check import draw, follow
    from gpt2_jax.report.log import RunLog

    folder = Path(arguments.run)
    config = load_saved_config(folder)
    log = RunLog(folder / "log.jsonl")
    if config is None or not log.finite_values("train", "loss"):
        raise Gpt2JaxError(
            f"{folder}: expected a run with losses, found none", "a folder such as runs/latest, which training makes"
        )
    if given := [f"--{name}" for name in ("dropout", "freeze") if getattr(config.optimizer, name)]:
        raise Gpt2JaxError(
            f"{folder}: expected a run that PyTorch repeats, found one with {' and '.join(given)}, which it does not here",
            "a run without them",
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{folder}: {config.compute.dtype}, against PyTorch {torch.__version__} on {device}", flush=True)

    def say(step: int, ours: float, theirs: float) -> None:
        if step == 1 or step % max(1, arguments.steps // 10) == 0:
            print(f"step {step:>5} | loss {ours:.6f} | PyTorch {theirs:.6f} | {100 * (ours / theirs - 1):+.3f} %", flush=True)

    curves = follow(config, log, arguments.steps, device, say)
    if arguments.plot:
        draw(
            curves,
            Path(arguments.plot),
            f"{config.model.init}, {config.compute.dtype}, {config.tokens_per_step:,} tokens a step",
        )
        print(f"curves: {arguments.plot}")
    differences = curves.differences()
    worst = max(differences, key=lambda step: abs(differences[step]))
    passed = abs(differences[worst]) <= arguments.tolerance
    print(
        f"{'ok' if passed else 'FAILED'}: of {len(differences)} steps, step {worst} differs most: "
        f"{100 * differences[worst]:+.3f} % ({100 * arguments.tolerance:g} % allowed)"
    )
    sys.exit(0 if passed else 1)
