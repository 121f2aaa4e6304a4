"""Progress of one long task that is no training run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from gpt2_jax.report.status_line import StatusLine, can_hold_a_line

_QUIET_SECONDS = 2.0  # a task that ends sooner shows nothing
_LINE_EVERY_SECONDS = 10.0


@contextmanager
def bytes_progress(what: str, total: int, console: Console | None = None) -> Iterator[Callable[[int], None]]:
    """Yield a function that is to be called with the number of further bytes that were done, of `total`.

    After two seconds a terminal shows a line that changes, and vanishes at the end; anything else gets a line now and then.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    started = time.monotonic()
    done, next_line = 0, started + _QUIET_SECONDS
    status: StatusLine | None = None

    def text() -> str:
        left = (time.monotonic() - started) * (total - done) / done if done else 0
        return f"{what}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB, about {left:,.0f} s left"

    def advance(num_bytes: int) -> None:
        nonlocal done, next_line, status
        done += num_bytes
        now = time.monotonic()
        if now < next_line:
            return
        if can_hold_a_line(console):
            if status is None:
                status = StatusLine(console, lambda width: text()[:width])
        else:
            next_line = now + _LINE_EVERY_SECONDS
            console.print(Text(text()))

    try:
        yield advance
    finally:
        if status is not None:
            status.end(keep=False)
