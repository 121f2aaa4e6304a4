"""A run's output for people: table, progress, samples."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text


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
