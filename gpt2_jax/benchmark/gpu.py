"""What an NVIDIA GPU is doing while a bench runs, as nvidia-smi tells."""

from __future__ import annotations

import statistics
import subprocess
import threading
import time
from typing import NamedTuple

_INTERVAL = 0.2  # seconds between two looks
_FIELDS = ("clocks.sm", "power.draw", "temperature.gpu", "memory.free")


class Sample(NamedTuple):
    """Of the first GPU: megahertz, watts, degrees Celsius, bytes that nobody uses."""

    clock: float
    power: float
    temperature: float
    free_bytes: float


def look() -> Sample | None:
    """The GPU now; None where nvidia-smi does not tell."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
        clock, power, temperature, free = (float(value) for value in text.splitlines()[0].split(","))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
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


def memory_of_processes() -> float:
    """Bytes of the first GPU that all processes together use, contexts included; 0 where nvidia-smi does not tell."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return float(subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0.0
