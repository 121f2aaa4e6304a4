"""A run's output for people: table, progress, samples."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.text import Text

from gpt2_jax.output import without_controls
from gpt2_jax.report.status_line import StatusLine, can_hold_a_line

_QUIET_SECONDS = 2.0  # a task that ends sooner is not counted
_LINE_EVERY_SECONDS = 10.0  # where there is no terminal
_BAR, _SPARKS, _RECENT, _FEWEST = "━", "▁▂▃▄▅▆▇█", 16, 4


@dataclass(frozen=True)
class Figures:
    """One training step as people are shown it."""

    step: int
    total_steps: int
    loss: float
    loss_z: float  # z-scores are nan until their window is full
    norm: float
    norm_z: float
    learning_rate: float
    seconds: float
    utilization: float | None  # MFU, of 1; None where it is not known
    tokens_per_second: float


class Display:
    """Progress for people: a live line on a terminal; in a pipe one line a step, beginning 'step N/TOTAL'."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic):
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._clock = clock
        self._has_terminal = can_hold_a_line(self._console)
        self._status: StatusLine | None = None
        self._started = clock()
        self._first: tuple[int, float] | None = None  # the first step that was shown, and when
        self._figures: Figures | None = None
        self._losses: list[float] = []  # the recent ones
        self._best = math.inf
        self._count = ""  # of a long task between steps

    def __enter__(self) -> Display:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._status is not None:
            self._status.end()

    def line(self, text: str) -> None:
        """One line of text, above the live line if there is one."""

        def write() -> None:
            # Text, not str: square brackets in a path or a sample are not rich's markup.
            self._console.print(Text(without_controls(text)))

        write() if self._status is None else self._status.above(write)

    def table(self, rows: Sequence[tuple[str, Any]]) -> None:
        """Names and values in two columns."""
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            self.line(f"  {name:<{width}}  {value}")

    def recall(self, losses: Sequence[float]) -> None:
        """The losses of the steps before this process, for the best and the recent ones."""
        finite = [loss for loss in losses if math.isfinite(loss)]
        self._losses = finite[-_RECENT:]
        self._best = min(finite, default=math.inf)

    def step(self, figures: Figures) -> None:
        """Show one training step."""
        if self._first is None:
            self._first = figures.step, self._clock()
        self._figures = figures
        if math.isfinite(figures.loss):
            self._losses = [*self._losses[1 - _RECENT :], figures.loss]
            self._best = min(self._best, figures.loss)
        if not self._has_terminal:
            width = len(str(figures.total_steps))
            parts = [f"step {figures.step:>{width}}/{figures.total_steps}", *_in_words(figures), self._times(figures)]
            self.line(" | ".join(parts))
        else:
            self._draw()

    @contextmanager
    def counted(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        """Yield a function that is to be called when one more of `total` parts of a task is done.

        A task that takes longer than two seconds is counted on the live line, or in a line every ten seconds.
        """
        started, done, next_line = self._clock(), 0, _QUIET_SECONDS

        def advance() -> None:
            nonlocal done, next_line
            done += 1
            seconds = self._clock() - started
            if seconds < next_line or done == total:
                return
            self._count = f"{what} {done}/{total}, {_duration(seconds / done * (total - done))} left"
            if self._has_terminal:
                self._draw()
            else:
                self.line(self._count)
                next_line = seconds + _LINE_EVERY_SECONDS

        try:
            yield advance
        finally:
            self._count = ""

    def _draw(self) -> None:
        if self._status is None:
            self._status = StatusLine(self._console, self._live_line)
        else:
            self._status.draw()

    def _live_line(self, width: int) -> str:
        """The live line: as many of its parts as fit, chosen in order of worth, shown in their order."""
        if self._count:
            return self._count[:width]
        figures = self._figures
        if figures is None:
            return ""
        loss, norm, rate, seconds, *mfu, speed = _in_words(figures)
        step = f"step {figures.step}/{figures.total_steps}"
        elapsed, left = self._times(figures).split(", ")
        short_loss, bar = f"loss {figures.loss:.4f}", self._bar(figures, 10)
        best = sparks = ""
        if width >= 99 and self._losses:
            best = f"best {self._best:.4f}"
            sparks = self._sparks(width - sum(len(part) + 3 for part in (step, short_loss, left, bar, speed, best)))
        # The longer form of the loss is worth less than what a shorter one leaves room for.
        by_worth = [step, short_loss, left, bar, speed, best, sparks, seconds, elapsed, norm, rate, *mfu]
        in_order = [step, bar, short_loss, best, sparks, norm, rate, seconds, *mfu, speed, elapsed, left]
        shown: set[str] = set()
        room = width
        for part in filter(None, by_worth):
            if len(part) + 3 * bool(shown) <= room:
                room -= len(part) + 3 * bool(shown)
                shown.add(part)
        if short_loss in shown and len(loss) - len(short_loss) <= room:
            in_order[in_order.index(short_loss)] = loss
            shown.add(loss)
        return " | ".join(part for part in in_order if part in shown)[:width]

    def _bar(self, figures: Figures, width: int) -> str:
        done = width * figures.step // figures.total_steps
        return _BAR * done + "·" * (width - done) if self._shows(_BAR + "·") else "#" * done + "-" * (width - done)

    def _sparks(self, room: int) -> str:
        """The newest of the recent losses, as many as there is room for."""
        if room < _FEWEST or not self._shows(_SPARKS):
            return ""
        losses = self._losses[-room:]
        low, high = min(losses), max(losses)
        scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
        return "".join(_SPARKS[round((loss - low) * scale)] for loss in losses)

    def _shows(self, characters: str) -> bool:
        try:
            characters.encode(self._console.encoding)
        except (UnicodeEncodeError, LookupError):
            return False
        return True

    def _times(self, figures: Figures) -> str:
        elapsed = self._clock() - self._started
        return f"{_duration(elapsed)} elapsed, {_duration(self._seconds_left(figures))} left"

    def _seconds_left(self, figures: Figures) -> float:
        """From the time of the steps so far with all that happened between them; after the first from its own."""
        assert self._first is not None
        first, since = self._first
        a_step = (self._clock() - since) / (figures.step - first) if figures.step > first else figures.seconds
        return a_step * (figures.total_steps - figures.step)


def _in_words(figures: Figures) -> list[str]:
    """loss, norm, learning rate, time, MFU where it is known, speed: as llm.c shows them."""
    return [
        f"loss {figures.loss:.6f}{_z(figures.loss_z)}",
        f"norm {figures.norm:.4f}{_z(figures.norm_z)}",
        f"lr {figures.learning_rate:.2e}",
        f"{figures.seconds * 1000:.2f} ms",
        *([] if figures.utilization is None else [f"{100 * figures.utilization:.1f}% MFU"]),
        f"{figures.tokens_per_second:.0f} tok/s",
    ]


def _z(score: float) -> str:
    return f" ({score:+.2f}z)" if math.isfinite(score) else ""


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds, as 1:02:03; days before them."""
    if not math.isfinite(seconds):
        return "-:--:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hours}:{minutes:02}:{rest:02}"
