"""Training steps of several systems in turn, each system in a process of its own.

Other work on a machine comes and goes, so systems that are measured one after the other are measured under different
conditions. A turn is one step that is not timed and then several timed steps in a row, as in training.
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

from gpt2_jax.benchmark import gpu
from gpt2_jax.benchmark.machine import free_memory, seconds_running
from gpt2_jax.benchmark.train_report import Measured, System, Workload, progress
from gpt2_jax.benchmark.train_system import TURN, Request, Result

_LONGEST = 1800.0  # seconds to get ready or to make a step in, after which a system is given up
_ENDING = 10.0  # seconds that a process may need to end
_TURNS = 3  # of every system, of a third of its steps each
_FEWEST = 5  # steps that are one turn
_GPU_ROOM = 1.15  # times what a system needs: allocators take more than is asked of them
_LAST_LINES = 12  # of a failed system's errors that are shown
_PAUSE = 0.05  # seconds between turns: a library's threads may spin for a while after their work


@dataclass(frozen=True)
class TurnLimits:
    """Limits of time: `seconds` for one system, after which it gets no further turn, and a deadline for the whole program."""

    seconds: float = 300.0
    deadline: float | None = None  # by seconds_running()

    @property
    def left(self) -> float:
        return math.inf if self.deadline is None else self.deadline - seconds_running()

    @property
    def is_over(self) -> bool:
        return self.left <= 0

    def share(self, of: int) -> float:
        """One of `of` equal shares of the time that is left, in seconds; at least what a process needs to end."""
        return min(_LONGEST, max(_ENDING, self.left / of))


def measure_in_turn(
    systems: Sequence[System], work: Workload, steps: int, limits: TurnLimits, say: Callable[[str], None]
) -> list[Measured]:
    """Time `steps` of every system: as many systems at a time as memory holds. Those that were measured together have one
    number of a group."""
    measured: list[Measured] = []
    waiting = list(systems)
    group = 0
    with contextlib.ExitStack() as stack, gpu.Watch() if work.backend == "cuda" else contextlib.nullcontext() as watch:
        while waiting:
            together: list[_Process] = []
            if limits.is_over:
                measured += [Measured(system, None, "no time was left for it") for system in waiting]
                break
            while waiting and (not together or _another_fits(together, work)):
                process = stack.enter_context(_Process(waiting[0], work, steps))
                process.get_ready(limits.share(len(waiting) + 1))  # then the others, and then all take turns
                if process.lacks_memory and any(other.answer is None for other in together):
                    say(f"{process.system}: not enough memory beside the others")
                    break
                waiting.pop(0)
                if process.answer is None:
                    say(f"{process.system}: ready after {process.ready_seconds:.0f} s")
                together.append(process)
            if waiting:
                say(f"{', '.join(map(str, waiting))}: measured after the others, for which there is not enough memory at once")
            group += 1
            _take_turns(together, steps, limits, say)
            for process in together:
                measured.append(dataclasses.replace(process.measured(watch), group=group))
                say(progress(measured[-1], work))
                if measured[-1].failed:
                    say(process.last_errors())
    return measured


def _take_turns(together: Sequence[_Process], steps: int, limits: TurnLimits, say: Callable[[str], None]) -> None:
    while running := [process for process in together if process.answer is None]:
        started = time.monotonic()
        for number, process in enumerate(running):
            time.sleep(_PAUSE if len(running) > 1 else 0)
            # Getting ready included a step, so a turn takes no longer.
            if process.seconds > limits.seconds or limits.left < process.ready_seconds:
                process.end()
            else:
                seconds = min(limits.share(len(running) - number), limits.seconds / _TURNS)
                process.take_turn(-(-steps // _TURNS) if steps > _FEWEST else steps, seconds, limits.share(1))
        say(f"{len(running)} system(s) in turn took {time.monotonic() - started:.0f} s")


def _another_fits(together: Sequence[_Process], work: Workload) -> bool:
    """Whether another system fits: more than the memory of the largest so far must be free, since it may need more. On the
    CPU twice as much, since without memory all would swap; a GPU without memory ends the one that asks for it."""
    largest = max(process.peak_bytes for process in together)
    if work.backend == "cpu":
        free = free_memory()
        return free is not None and free > 2 * largest
    sample = gpu.look()
    return sample is not None and sample.free_bytes > _GPU_ROOM * largest


class _Process:
    """A system's process. Once it has ended, `answer` is the JSON object that it printed, or one that has the reason under
    'refused' or 'failed'."""

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
            micro_batches=work.micro_batches,
            model_name=work.model_name,
            llmc_program=work.llmc_program,
            devices=work.devices,
            zero=int(system.stage.removeprefix("zero") or 0),
        )
        self.system = system
        self.spans: list[tuple[float, float]] = []  # of its turns: beginnings and ends, by time.monotonic()
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
            # On a GPU jax takes three quarters of the memory at its start, unless it is told not to; then it takes what a
            # step needs in the first, which is not timed, and keeps it, so that the timed steps are the same.
            env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
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
        """Let the system make `steps` more steps, but begin none after `seconds`."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: await_turn finds out why
            self._process.stdin.write(f"{steps} {seconds}\n")
            self._process.stdin.flush()
        started = time.monotonic()
        self.await_turn(timeout)
        self.spans.append((started, time.monotonic()))

    def end(self) -> None:
        """Tell the system that it gets no more turns."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self.await_turn(_ENDING)

    def await_turn(self, timeout: float) -> None:
        """Wait until the system is ready for its next turn or has ended; after `timeout` seconds it is killed."""
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

    @property
    def lacks_memory(self) -> bool:
        return self.answer is not None and bool(self.answer.get("no_memory"))

    def last_errors(self) -> str:
        """The last lines of its standard error."""
        self._errors.seek(0)
        return "\n".join([f"{self.system}, its last words:", *self._errors.read().strip().splitlines()[-_LAST_LINES:]])

    def measured(self, watch: gpu.Watch | None = None) -> Measured:
        assert self.answer is not None
        if "failed" in self.answer:
            return Measured(self.system, None, f"it failed: {self.answer['failed']}", failed=True)
        if "refused" in self.answer:
            return Measured(self.system, None, self.answer["refused"])
        return Measured(self.system, Result(**self.answer), gpu=None if watch is None else watch.during(self.spans))
