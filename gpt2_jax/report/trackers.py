"""Trackers of runs, which get what the log gets: trackio, Weights & Biases, TensorBoard; each an extra, behind one function.

A tracker is told numbers by their names ('train/loss') and texts (samples). None is asked for anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.jax_compat import version_text

TRACKERS = ("none", "trackio", "wandb", "tensorboard")
_PROJECT = "gpt2_jax"


class Tracker(NamedTuple):
    """Where a run's records go beside its log."""

    where: str  # to be shown
    log: Callable[[int, Mapping[str, float], Mapping[str, str]], None]  # step, numbers, texts
    close: Callable[[], None]


def check_tracker(name: str) -> None:
    """Gpt2JaxError for a tracker that is not installed, with the command that installs it."""
    if name != "none" and version_text(name) is None:
        raise Gpt2JaxError(
            f"--track: expected {name} to be installed, found none",
            f"pip install 'gpt2_jax[{name}]'   (or in a checkout: pip install -e '.[{name}]')",
        )


def open_tracker(name: str, folder: Path, settings: Mapping[str, Any], *, resumes: bool) -> Tracker:
    """A tracker, not 'none', for the run of this folder; a resumed run goes on in the same record where the tracker can.

    Offline: trackio and TensorBoard write files here alone; wandb with WANDB_MODE=offline, into the run folder.
    """
    check_tracker(name)
    return {"trackio": _trackio, "wandb": _wandb, "tensorboard": _tensorboard}[name](folder, settings, resumes)


def split(event: str, values: Mapping[str, object]) -> tuple[dict[str, float], dict[str, str]]:
    """The numbers and the texts of a record of the log, under 'event/name'."""
    numbers = {f"{event}/{key}": float(value) for key, value in values.items() if isinstance(value, (int, float))}
    texts = {f"{event}/{key}": value for key, value in values.items() if isinstance(value, str)}
    return numbers, texts


def _trackio(folder: Path, settings: Mapping[str, Any], resumes: bool) -> Tracker:
    import trackio

    trackio.init(project=_PROJECT, name=folder.name, config=dict(settings), resume="allow" if resumes else "never", embed=False)

    def log(step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        trackio.log({**numbers, **texts}, step=step)

    return Tracker(f"trackio, project {_PROJECT}, run {folder.name}   (trackio show)", log, trackio.finish)


def _wandb(folder: Path, settings: Mapping[str, Any], resumes: bool) -> Tracker:
    import wandb

    run = wandb.init(
        project=_PROJECT, name=folder.name, config=dict(settings), dir=str(folder), resume="allow" if resumes else None
    )

    def log(step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        # Of one step there may be several records, and wandb takes no step twice: it is a value like others.
        run.log({"step": step, **numbers, **texts})

    run.define_metric("*", step_metric="step")
    offline = os.environ.get("WANDB_MODE") == "offline"
    return Tracker(f"wandb, {f'offline in {folder}/wandb' if offline else run.url or 'online'}", log, run.finish)


def _tensorboard(folder: Path, settings: Mapping[str, Any], resumes: bool) -> Tracker:
    from tensorboard.summary import Writer

    path = folder / "tensorboard"
    writer = Writer(str(path))

    def log(step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker(f"tensorboard --logdir {path}", log, writer.close)
