"""run_STEP.json, beside llm.c's training state: values of a run that the state has no place for. NumPy only."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.files import Writer, atomic_write, read_text_file

_VERSION = 1
_MAX_BYTES = 1_000_000
_WHAT = "the record of a run"
_MOVING_WEIGHT = 0.95
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Averages:
    """Of a run's steps, the first of each process left out."""

    steps: int = 0
    seconds: float = 0.0  # of all these steps
    moving_seconds: float = 0.0  # exponential average of a step, not yet corrected for its start at 0

    def with_step(self, seconds: float) -> Averages:
        """After one step more. Seconds are averaged, not rates: one step that looks short would outweigh many."""
        moving = _MOVING_WEIGHT * self.moving_seconds + (1 - _MOVING_WEIGHT) * seconds
        return Averages(self.steps + 1, self.seconds + seconds, moving)

    @property
    def smoothed_seconds(self) -> float:
        """The exponential average of a step; 0 before the first step."""
        return self.moving_seconds / (1 - _MOVING_WEIGHT**self.steps) if self.steps else 0.0


# Why a set was saved: its step was due, time had passed, or it has the lowest validation loss.
STEP, TIME, BEST = "step", "time", "best"


@dataclass(frozen=True)
class Best:
    """The set of the lowest validation loss."""

    step: int
    loss: float  # nats a token


@dataclass(frozen=True)
class RunRecord:
    batch_size: int
    sequence_length: int
    dtype: str
    computed_by: str  # processor, products, versions, which the bits depend on beside the settings; for people
    windows: dict[str, np.ndarray]  # of the outlier detector, float32, nan where no value is yet
    averages: Averages
    settings: dict[str, dict[str, Any]]  # the whole configuration, for people
    plan: tuple[tuple[str, str], ...] = ()  # the implementations, as in the start table, for people
    kept: str = STEP  # why this set was saved
    best: Best | None = None  # of the run so far, with --keep-best or --patience


def write_run_record(path: str | os.PathLike, record: RunRecord, *, write: Writer = atomic_write) -> None:
    """Write as JSON; every float32 comes back as it was."""
    content = {
        "version": _VERSION,
        "batch_size": record.batch_size,
        "sequence_length": record.sequence_length,
        "dtype": record.dtype,
        "computed_by": record.computed_by,
        "windows": {
            name: [None if math.isnan(value) else value for value in window.tolist()] for name, window in record.windows.items()
        },
        "averages": asdict(record.averages),
        "settings": record.settings,
        "plan": record.plan,
        "kept": record.kept,
        "best": None if record.best is None else asdict(record.best),
    }
    with write(path) as file:
        file.write(json.dumps(content, indent=1).encode("utf-8"))


def read_run_record(path: str | os.PathLike) -> RunRecord:
    """Read what `write_run_record` wrote; Gpt2JaxError for anything else."""
    hint = f"rm {path}   (the run goes on with an empty outlier window)"
    text = read_text_file(path, _WHAT, hint, max_bytes=_MAX_BYTES)
    try:
        content = json.loads(text)
        if content["version"] != _VERSION:
            raise ValueError(f"version {content['version']}")
        windows = {name: _window(values) for name, values in content["windows"].items()}
        record = RunRecord(
            batch_size=_checked(content["batch_size"], int),
            sequence_length=_checked(content["sequence_length"], int),
            dtype=_checked(content["dtype"], str),
            computed_by=_checked(content["computed_by"], str),
            windows=windows,
            averages=_averages(content["averages"]),
            settings=_checked(content["settings"], dict),
            plan=tuple((str(name), str(value)) for name, value in content.get("plan", ())),
            kept=_checked(content.get("kept", STEP), str),
            best=_best(content.get("best")),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        found = " ".join(str(error).split())[:200]
        raise Gpt2JaxError(f"{path}: expected {_WHAT} (JSON, version {_VERSION}), found: {found}", hint) from None
    return record


def _window(values: Any) -> np.ndarray:
    for value in _checked(values, list):
        if value is not None and not (type(value) in (int, float) and abs(value) <= _LARGEST):
            raise TypeError(f"{value!r} in a window")
    return np.array([math.nan if value is None else value for value in values], dtype=np.float32)


def _averages(content: Any) -> Averages:
    steps = _checked(content["steps"], int)
    seconds = float(_checked(content["seconds"], (int, float)))
    # Records of the first version have a moving average of rates instead: the plain one of seconds takes its place.
    plain = seconds / steps * (1 - _MOVING_WEIGHT**steps) if 0 < steps < 2**63 else 0.0
    moving = float(_checked(content.get("moving_seconds", plain), (int, float)))
    if not (0 <= steps < 2**63 and 0 <= seconds < math.inf and 0 <= moving < math.inf):
        raise ValueError(f"averages {content}")
    return Averages(steps, seconds, moving)


def _best(content: Any) -> Best | None:
    if content is None:
        return None
    loss = float(_checked(content["loss"], (int, float)))
    if not math.isfinite(loss):
        raise ValueError(f"a best loss of {loss}")
    return Best(_checked(content["step"], int), loss)


def _checked(value: Any, types: type | tuple[type, ...]) -> Any:
    if isinstance(value, bool) or not isinstance(value, types):
        raise TypeError(f"a value {value!r:.50} of another type")
    return value
