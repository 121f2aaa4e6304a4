"""What an NVIDIA GPU is doing while a bench runs, as nvidia-smi tells."""

from __future__ import annotations

import os
import statistics
import subprocess
import threading
import time
from typing import NamedTuple

_INTERVAL = 0.2  # seconds between two looks
_FIELDS = ("clocks.sm", "power.draw", "temperature.gpu", "memory.free")


class Sample(NamedTuple):
    """Of one GPU: megahertz, watts, degrees Celsius, bytes that nobody uses."""

    clock: float
    power: float
    temperature: float
    free_bytes: float


def _query(*fields: str) -> list[float] | None:
    """The fields of the first GPU that CUDA shows to this process; None where nvidia-smi does not tell."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", f"--id={visible}"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
        values = [float(value) for value in text.splitlines()[0].split(",")]
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
    return values if len(values) == len(fields) else None


def look() -> Sample | None:
    """The GPU now; None where nvidia-smi does not tell."""
    if (values := _query(*_FIELDS)) is None:
        return None
    clock, power, temperature, free = values
    return Sample(clock, power, temperature, free * 2**20)


class Watch:
    """Looks again and again, until the end of a `with`."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, Sample]] = []  # with the time, by time.monotonic()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def _run(self) -> None:
        while (sample := look()) is not None:
            self._samples.append((time.monotonic(), sample))
            if self._ends.wait(_INTERVAL):
                return

    def during(self, spans: list[tuple[float, float]]) -> Sample | None:
        """The medians over these spans of time.monotonic(); None where nobody looked."""
        seen = [sample for moment, sample in list(self._samples) if any(start <= moment <= end for start, end in spans)]
        return Sample(*map(statistics.median, zip(*seen, strict=True))) if seen else None


def used_memory() -> float:
    """Bytes that all processes together use, contexts included; 0 where nvidia-smi does not tell."""
    return ((_query("memory.used") or [0.0])[0]) * 2**20
