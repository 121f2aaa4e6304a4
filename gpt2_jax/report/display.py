"""What a person sees of a run (table, progress, samples), the log that programs read, and the picture of the loss."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.files import read_text_file


class Display:
    """Progress for people: a live bar on a terminal; in a pipe one line a step, beginning 'step N/TOTAL'."""

    def __init__(self, console: Console | None = None):
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._progress: Progress | None = None

    def __enter__(self) -> Display:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._progress is not None:
            self._progress.stop()

    def line(self, text: str) -> None:
        """One line of text, above the bar if there is one."""
        # Text, not str: square brackets in a path or a sample are not rich's markup.
        self._console.print(Text(text))

    def table(self, rows: Sequence[tuple[str, Any]]) -> None:
        """Names and values in two columns."""
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            self.line(f"  {name:<{width}}  {value}")

    def step(
        self,
        step: int,
        total_steps: int,
        *,
        loss: float,
        loss_z: float,
        norm: float,
        norm_z: float,
        learning_rate: float,
        seconds: float,
        utilization: float | None,
        tokens_per_second: float,
    ) -> None:
        """One training step's figures, as llm.c shows them; z-scores are nan until their window is full, and the MFU
        (`utilization`, of 1) is left out where it is not known."""
        mfu = "" if utilization is None else f"{100 * utilization:.1f}% MFU | "
        figures = (
            f"loss {loss:.6f} ({loss_z:+.2f}z) | norm {norm:.4f} ({norm_z:+.2f}z) | lr {learning_rate:.2e} | "
            f"{seconds * 1000:.2f} ms | {mfu}{tokens_per_second:.0f} tok/s"
        )
        if not self._console.is_terminal:
            self.line(f"step {step:>{len(str(total_steps))}}/{total_steps} | {figures}")
            return
        if self._progress is None:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=24), TimeRemainingColumn())
            self._progress = Progress(*columns, TextColumn("{task.description}", markup=False), console=self._console)
            self._progress.add_task("", total=total_steps, completed=step)
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], completed=step, description=figures)


class RunLog:
    """The run's log.jsonl: one JSON object a line, each with 'event' and 'step', written through at once.

    Beside it main.log, which has llm.c's lines of the same events.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.main_path = self.path.with_name("main.log")

    def clear(self) -> None:
        """Begin both anew, for a run that begins; Gpt2JaxError when they cannot be written."""
        for path in (self.path, self.main_path):
            try:
                path.write_bytes(b"")
            except OSError as error:
                raise Gpt2JaxError(f"{path}: expected to begin the log, found: {error.strerror}") from None

    def write(self, event: str, step: int, **values: float | int | str) -> None:
        """Append a record; a number that is not finite becomes null, which JSON has no other word for."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
        }
        self._append(self.path, json.dumps({"event": event, "step": step, **finite}, ensure_ascii=False, allow_nan=False))
        # llm.c counts the updates done before a training step, which leaves it one behind.
        lines = {
            "train": "s:{before} trl:{loss:.4f} lr:{lr:.6f} norm:{norm:.2f}",
            "validation": "s:{step} tel:{loss:.4f}",
            "hellaswag": "s:{step} eval:{accuracy:.4f}",
        }
        if event in lines:
            self._append(self.main_path, lines[event].format(step=step, before=step - 1, **values))

    @staticmethod
    def _append(path: Path, line: str) -> None:
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise Gpt2JaxError(f"{path}: expected to append to the log, found: {error.strerror}") from None

    def records(self, event: str) -> list[dict[str, Any]]:
        """All records of one kind, in order of their step; of a step that was run twice, the last.

        Lines that are none, as a crash or a full disk leaves them, are passed over; Gpt2JaxError for what is no file.
        """
        by_step: dict[int, dict[str, Any]] = {}
        # A line that was cut short may end within a character.
        text = read_text_file(self.path, "a log", errors="replace") if os.path.lexists(self.path) else ""
        for line in text.splitlines():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and record.get("event") == event and type(record.get("step")) is int:
                by_step[record["step"]] = record
        return [by_step[step] for step in sorted(by_step)]

    def finite_values(self, event: str, key: str) -> dict[int, float]:
        """A value of all records of one kind that have it, by their steps."""
        values = {record["step"]: record.get(key) for record in self.records(event)}
        return {step: value for step, value in values.items() if isinstance(value, float)}


def plot_loss(log: RunLog, path: str | os.PathLike, *, baseline: float | None = None) -> None:
    """A PNG of the run's training and validation loss over its steps, with the unigram cross-entropy as a line."""
    # A figure of its own canvas: no display, and none of pyplot's global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for event, style in (("train", {"linewidth": 1.0}), ("validation", {"marker": "o", "markersize": 4})):
        losses = log.finite_values(event, "loss")
        axes.plot(list(losses), list(losses.values()), label=event, **style)
    if baseline is not None:
        axes.axhline(baseline, color="gray", linestyle="--", label=f"unigram cross-entropy ({baseline:.2f})")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise Gpt2JaxError(f"{path}: expected to write the loss curve, found: {error.strerror or error}") from None
