"""How fast text is generated: this project with its cache and without, and transformers, in turn; beside the bound.

For every token of a text all weights and all cached keys and values have to be read once. The bound is these bytes over the
rate at which this machine copies, measured in the same turns: a reader alone may be somewhat faster than a copy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpt2_jax.benchmark.generate_system import COPIED_BYTES, COPY, SYSTEMS, Request
from gpt2_jax.benchmark.machine import OthersWork, describe_machine, load_lines, machine_line, measure_load
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2Config

_LONGEST = 900.0  # seconds that a system may need to get ready, or for a turn
# Tokens of a turn of the system without a cache, each of which is a full forward pass.
_UNCACHED_TOKENS = 8


@dataclass(frozen=True)
class Workload:
    model_name: str
    config: GPT2Config
    backend: str
    dtype: str
    batch_size: int
    length: int
    tokens: int

    def request(self, system: str) -> Request:
        tokens = min(self.tokens, _UNCACHED_TOKENS) if system == "gpt2_jax_uncached" else self.tokens
        model = dataclasses.asdict(self.config)
        return Request(system, self.backend, self.dtype, model, self.batch_size, self.length, tokens)

    def bytes_of_token(self) -> dict[str, int]:
        """Bytes that have to be read for one token of every text: weights of products in the dtype of products, and the
        cache at the middle of the timed tokens."""
        width = 2 if self.dtype == "bfloat16" else 4
        weights = sum(tensor.size for tensor in self.config.layout.tensors if tensor.multiplies)
        positions = self.length - self.tokens // 2
        cache = 2 * self.config.num_layers * self.config.channels * positions * self.batch_size
        return {"weights": width * weights, "cache": width * cache}


def check_workload(work: Workload) -> None:
    """Gpt2JaxError for what no system can do."""
    longest = work.config.max_sequence_length
    for flag, value, lowest, highest in (
        ("--length", work.length, 3, longest),
        ("--tokens", work.tokens, 1, work.length - 2),
        ("--batch-size", work.batch_size, 1, 1024),
    ):
        if not lowest <= value <= highest:
            raise Gpt2JaxError(f"{flag}: expected {lowest} to {highest}, found {value}", f"{flag} {min(highest, 64)}")


def bench_generate(work: Workload, rounds: int, say: Callable[[str], None]) -> bool:
    """Say the table and, last, one JSON object; False when a system failed that should have run."""
    check_workload(work)
    machine = describe_machine()
    say(machine_line(machine))
    say(f"{work.model_name}, {work.dtype}, {work.batch_size} text(s) of {work.length} tokens at the end, {work.backend}")
    before, others = measure_load(), OthersWork()
    seconds: dict[str, list[float]] = {}
    left_out: dict[str, str] = {}
    failed = False
    with contextlib.ExitStack() as stack:
        processes = {}
        for system in (COPY, *SYSTEMS):
            process = stack.enter_context(_Process(work.request(system)))
            answer = process.answer()
            if answer.get("ready"):
                processes[system] = process
                continue
            failed |= "failed" in answer
            left_out[system] = answer.get("refused") or f"it failed: {answer['failed']}"
            say(f"{system}: left out: {left_out[system]}")
        for number in range(rounds):
            for system, process in list(processes.items()):
                answer = process.turn()
                if "failed" in answer:
                    failed = True
                    left_out[system] = f"it failed: {answer['failed']}"
                    del processes[system]
                    continue
                seconds.setdefault(system, []).append(statistics.median(answer["seconds"]))
            speeds = (f"{system} {work.batch_size / each[-1]:.2f}" for system, each in seconds.items() if system != COPY)
            say(f"round {number + 1} of {rounds}, tokens/s: {', '.join(speeds)}")
    record = _record(work, seconds, left_out)
    for line in load_lines(before, others.others(), measure_load()):
        say(line)
    for line in _table(record):
        say(line)
    say(json.dumps(record | {"machine": machine}))
    return not failed


def _record(work: Workload, seconds: dict[str, list[float]], left_out: dict[str, str]) -> dict[str, Any]:
    bound = math.nan
    record: dict[str, Any] = {
        "bench": "generate",
        **{name: getattr(work, name) for name in ("model_name", "backend", "dtype", "batch_size", "length", "tokens")},
        "bound": None,
        "systems": {},
        "left_out": left_out,
    }
    if of_copy := seconds.pop(COPY, None):
        to_read, rate = work.bytes_of_token(), 2 * COPIED_BYTES / statistics.median(of_copy)
        bound = work.batch_size * rate / sum(to_read.values())
        record["bound"] = {"bytes": to_read, "copy_gigabytes_per_second": rate / 1e9, "tokens_per_second": bound}
    for system, of_rounds in seconds.items():
        rate = work.batch_size / statistics.median(of_rounds)
        record["systems"][system] = {
            "tokens_per_second": rate,
            "rounds": [work.batch_size / each for each in of_rounds],
            "share_of_bound": None if math.isnan(bound) else rate / bound,
        }
    return record


def _table(record: dict[str, Any]) -> list[str]:
    systems = record["systems"]
    reference = systems.get("gpt2_jax_uncached", {}).get("tokens_per_second")
    lines = [f"{'system':<20} {'tokens/s':>10} {'slowest':>9} {'fastest':>9} {'of bound':>9} {'x uncached':>11}"]
    for system, row in systems.items():
        share = "" if row["share_of_bound"] is None else f"{row['share_of_bound']:.0%}"
        times = "" if reference is None else f"{row['tokens_per_second'] / reference:.1f}"
        speeds = f"{row['tokens_per_second']:>10.2f} {min(row['rounds']):>9.2f} {max(row['rounds']):>9.2f}"
        lines.append(f"{system:<20} {speeds} {share:>9} {times:>11}")
    if bound := record["bound"]:
        megabytes = {name: number / 1e6 for name, number in bound["bytes"].items()}
        lines.append(
            f"{'bound':<20} {bound['tokens_per_second']:>10.2f}   {megabytes['weights']:,.0f} MB of weights and "
            f"{megabytes['cache']:,.0f} MB of cache a token at {bound['copy_gigabytes_per_second']:.1f} GB/s"
        )
    return lines


class _Process:
    """A system's process; what it answers is one JSON object a line, or {"failed": its last words}."""

    def __init__(self, request: Request):
        self._errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - closed in __exit__
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gpt2_jax.benchmark.generate_system", json.dumps(dataclasses.asdict(request))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            # On a GPU jax takes three quarters of the memory at its start, unless it is told not to.
            env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        )

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def turn(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: answer() finds out why
            self._process.stdin.write("turn\n")
            self._process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        timer = threading.Timer(_LONGEST, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if line.startswith("{"):
            answer: dict[str, Any] = json.loads(line)
            return answer
        self._process.wait()
        self._errors.seek(0)
        return {"failed": (self._errors.read().strip().splitlines() or [f"status {self._process.returncode}"])[-1]}
