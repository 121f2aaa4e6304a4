"""Progress of one long task that is no training run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.text import Text

_QUIET_SECONDS = 2.0  # a task that ends sooner shows nothing
_LINE_EVERY_SECONDS = 10.0


@contextmanager
def bytes_progress(what: str, total: int, console: Console | None = None) -> Iterator[Callable[[int], None]]:
    """Yield a function that is to be called with the number of further bytes that were done, of `total`.

    After two seconds a terminal shows a bar, which vanishes at the end; anything else gets a line now and then.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
    task = bar.add_task(what, total=total)
    has_bar = console.is_terminal and not console.is_dumb_terminal
    started = time.monotonic()
    done, next_line = 0, started + _QUIET_SECONDS

    def advance(num_bytes: int) -> None:
        nonlocal done, next_line
        done += num_bytes
        bar.update(task, completed=done)
        now = time.monotonic()
        if now < next_line:
            return
        if has_bar:
            bar.start()
            next_line = math.inf
        else:
            next_line = now + _LINE_EVERY_SECONDS
            left = (now - started) * (total - done) / done if done else 0
            console.print(Text(f"{what}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB, about {left:,.0f} s left"))

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()
