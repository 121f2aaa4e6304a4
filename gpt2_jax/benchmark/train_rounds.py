"""Training steps of several systems in turn, each system in a process of its own.

What else happens on a machine comes and goes: systems that are measured one after the other meet different machines. A
turn is several steps in a row, as in training, and one before them that is not timed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gpt2_jax.benchmark.machine import free_memory, seconds_running
from gpt2_jax.benchmark.train_report import Measured, System, Workload, progress
from gpt2_jax.benchmark.train_system import TURN, Request, Result

_LONGEST = 1800.0  # seconds to get ready or to make a step in, after which a system is given up
_ENDING = 10.0  # seconds that a process may need to end
_TURNS = 3  # of every system, of a third of its steps each
_FEWEST = 5  # steps that are one turn
_PAUSE = 0.05  # seconds between turns: a library's threads may look out for more work a while


@dataclass(frozen=True)
class Patience:
    """What time there is: for one system, after which it gets no further turn, and for the whole program."""

    seconds: float = 300.0
    deadline: float | None = None  # by seconds_running()

    @property
    def left(self) -> float:
        return math.inf if self.deadline is None else self.deadline - seconds_running()

    @property
    def is_over(self) -> bool:
        return self.left <= 0

    def share(self, of: int) -> float:
        """Of the time that is left, in seconds, if so many ask for as much; never too little to end in."""
        return min(_LONGEST, max(_ENDING, self.left / of))


def measure_in_turn(
    systems: Sequence[System], work: Workload, steps: int, patience: Patience, say: Callable[[str], None]
) -> list[Measured]:
    """Every system's `steps`, as many systems at a time as memory holds; one at a time on an accelerator, which a
    process may have all of."""
    measured: list[Measured] = []
    waiting = list(systems)
    with contextlib.ExitStack() as stack:
        while waiting:
            together: list[_Process] = []
            if patience.is_over:
                measured += [Measured(system, None, "no time was left for it") for system in waiting]
                break
            while waiting and (not together or _another_fits(together, work)):
                process = stack.enter_context(_Process(waiting.pop(0), work, steps))
                process.get_ready(patience.share(len(waiting) + 2))  # then the others, and then all take turns
                if process.answer is None:
                    say(f"{process.system}: ready after {process.ready_seconds:.0f} s")
                together.append(process)
            _take_turns(together, steps, patience, say)
            for process in together:
                measured.append(process.measured())
                say(progress(measured[-1], work))
    return measured


def _take_turns(together: Sequence[_Process], steps: int, patience: Patience, say: Callable[[str], None]) -> None:
    while running := [process for process in together if process.answer is None]:
        started = time.monotonic()
        for number, process in enumerate(running):
            time.sleep(_PAUSE if len(running) > 1 else 0)
            # It got ready by a step at least.
            if process.seconds > patience.seconds or patience.left < process.ready_seconds:
                process.end()
            else:
                seconds = min(patience.share(len(running) - number), patience.seconds / _TURNS)
                process.take_turn(-(-steps // _TURNS) if steps > _FEWEST else steps, seconds, patience.share(1))
        say(f"{len(running)} system(s) in turn took {time.monotonic() - started:.0f} s")


def _another_fits(together: Sequence[_Process], work: Workload) -> bool:
    """Whether twice what the largest of them has needed is free: the next may need more."""
    free = free_memory()
    return work.backend == "cpu" and free is not None and free > 2 * max(process.peak_bytes for process in together)


class _Process:
    """A system between its steps, and its `answer` once it has ended: the JSON object that it printed, or one with the
    reason why there is none under 'refused' or 'failed'."""

    def __init__(self, system: System, work: Workload, steps: int):
        request = Request(
            name=system.name,
            matmul=system.matmul,
            dtype=system.dtype,
            matmul_precision=system.setting or "default",
            backend=work.backend,
            model=dataclasses.asdict(work.config),
            batch_size=work.batch_size,
            sequence_length=work.sequence_length,
            steps=steps,
        )
        self.system = system
        self.seconds = 0.0  # that it has had
        self.ready_seconds = 0.0  # of them until its first turn
        self.peak_bytes = 0
        self._given_up = False
        self.answer: dict[str, Any] | None = None
        self._errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - closed in __exit__
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gpt2_jax.benchmark.train_system", json.dumps(dataclasses.asdict(request))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,  # to be killed with the processes that it starts, which have its output open
        )

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def _kill(self) -> None:
        if sys.platform == "win32":
            self._process.kill()
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def get_ready(self, timeout: float) -> None:
        self.await_turn(timeout)
        self.ready_seconds = self.seconds

    def take_turn(self, steps: int, seconds: float, timeout: float) -> None:
        """So many more steps, of which none begins after `seconds`."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: await_turn finds out why
            self._process.stdin.write(f"{steps} {seconds}\n")
            self._process.stdin.flush()
        self.await_turn(timeout)

    def end(self) -> None:
        """No more steps."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self.await_turn(_ENDING)

    def await_turn(self, timeout: float) -> None:
        """Until it waits for its next turn, or has ended; or is ended, after `timeout` seconds."""
        assert self._process.stdout is not None

        def give_up() -> None:
            self._given_up = True
            self._kill()

        timer = threading.Timer(timeout, give_up)
        timer.start()
        started = time.monotonic()
        last_line = ""
        try:
            for line in self._process.stdout:
                if line.startswith(TURN):
                    self.peak_bytes = int(line.removeprefix(TURN))
                    return
                last_line = line
            status = self._process.wait()
        finally:
            timer.cancel()
            self.seconds += time.monotonic() - started
        if self._given_up:
            self.answer = {"refused": f"it had not ended after {timeout:.0f} seconds"}
        elif status != 0:
            self._errors.seek(0)
            self.answer = {"failed": (self._errors.read().strip().splitlines() or [f"status {status}"])[-1]}
        else:
            try:
                self.answer = json.loads(last_line)
            except ValueError:
                self.answer = {"failed": f"expected a JSON object in its last line, found {last_line!r}"}

    def measured(self) -> Measured:
        assert self.answer is not None
        if "failed" in self.answer:
            return Measured(self.system, None, f"it failed: {self.answer['failed']}", failed=True)
        if "refused" in self.answer:
            return Measured(self.system, None, self.answer["refused"])
        return Measured(self.system, Result(**self.answer))
