"""The log of a run, which programs read."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.files import read_text_file
from gpt2_jax.report.trackers import Tracker, split


class RunLog:
    """The run's log.jsonl: one JSON object a line, each with 'event', 'step' and 'time' (seconds since 1970, of the clock on
    the wall), and where `tokens_per_step` is known 'tokens', those trained on so far; written through at once.

    Beside it main.log, which has llm.c's lines of the same events. The event 'resume' has the step of the checkpoint that
    the lines after it go on from.
    """

    def __init__(self, path: str | os.PathLike, tokens_per_step: int | None = None, *, writes: bool = True):
        """`writes`: off, nothing is written, as another process writes the same."""
        self._writes = writes
        self._tokens_per_step = tokens_per_step
        self.tracker: Tracker | None = None  # gets every record that is written, too
        self.path = Path(path)
        self.main_path = self.path.with_name("main.log")

    def write(self, event: str, step: int, **values: float | int | str | dict[str, str]) -> None:
        """Append a record; a number that is not finite becomes null, which JSON has no other word for."""
        if not self._writes:
            return
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
        }
        place: dict[str, Any] = {"event": event, "step": step, "time": round(time.time(), 3)}
        if self._tokens_per_step is not None:
            place["tokens"] = step * self._tokens_per_step
        self._append(self.path, json.dumps({**place, **finite}, ensure_ascii=False, allow_nan=False))
        # llm.c counts the updates done before a training step, which leaves it one behind.
        lines = {
            "train": "s:{before} trl:{loss:.4f} lr:{lr:.6f} norm:{norm:.2f}",
            "validation": "s:{step} tel:{loss:.4f}",
            "hellaswag": "s:{step} eval:{accuracy:.4f}",
        }
        if event in lines:
            self._append(self.main_path, lines[event].format(step=step, before=step - 1, **values))
        if self.tracker is not None:
            self.tracker.log(step, *split(event, {key: value for key, value in finite.items() if value is not None}))

    @staticmethod
    def _append(path: Path, line: str) -> None:
        # Half a pair of UTF-16 is no character: escaped, it is JSON's own word for it.
        try:
            with open(path, "ab+") as file:
                # A crash or a full disk may have left half a line.
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 1))
                torn = file.read(1) not in (b"", b"\n")
                file.write((b"\n" if torn else b"") + line.encode("utf-8", "backslashreplace") + b"\n")
        except OSError as error:
            raise Gpt2JaxError(f"{path}: expected to append to the log, found: {error.strerror}") from None

    def records(self, event: str) -> list[dict[str, Any]]:
        """All records of one kind, in order of their step; of a step that was run twice, the last.

        A record is left out if the run later resumed from a step before it: the lines stay in the file, but the weights
        that they tell of were given up. Lines that are none, as a crash or a full disk leaves them, are passed over;
        Gpt2JaxError for what is no file.
        """
        return self.all_records().get(event, [])

    def all_records(self) -> dict[str, list[dict[str, Any]]]:
        """The records of every kind, as `records` gives them, by their event."""
        found: dict[str, dict[int, dict[str, Any]]] = {}
        # A line that was cut short may end within a character.
        text = read_text_file(self.path, "a log", errors="replace") if os.path.lexists(self.path) else ""
        for line in text.split("\n"):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if not isinstance(record, dict) or type(record.get("step")) is not int or not isinstance(record.get("event"), str):
                continue
            if record["event"] == "resume":
                found = {
                    event: {step: before for step, before in by_step.items() if step <= record["step"]}
                    for event, by_step in found.items()
                }
            found.setdefault(record["event"], {})[record["step"]] = record
        return {event: [by_step[step] for step in sorted(by_step)] for event, by_step in found.items()}

    def finite_values(self, event: str, key: str) -> dict[int, float]:
        """A value of all records of one kind that have it, by their steps."""
        values = {record["step"]: record.get(key) for record in self.records(event)}
        return {step: value for step, value in values.items() if isinstance(value, float)}
