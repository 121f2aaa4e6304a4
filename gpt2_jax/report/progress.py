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
    started, done = time.monotonic(), 0

    def text() -> str:
        return f"{what}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB, {_left(started, done, total)}"

    with _shown(text, console) as show:

        def advance(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            show()

        yield advance


@contextmanager
def counted_progress(what: str, total: int, console: Console | None = None) -> Iterator[Callable[[], None]]:
    """The same for equal parts: the function is called after each."""
    started, done = time.monotonic(), 0

    def text() -> str:
        return f"{what} {done:,} of {total:,}, {_left(started, done, total)}"

    with _shown(text, console) as show:

        def advance() -> None:
            nonlocal done
            done += 1
            show()

        yield advance


@contextmanager
def tokens_progress(
    what: str, total_bytes: int | None, total_tokens: int | None, console: Console | None = None
) -> Iterator[Callable[..., None]]:
    """The same for text that becomes tokens: the function is called with the further bytes read and tokens made, and with
    `earlier=True` for those that an earlier process made. The time left is told by the tokens where their number is limited,
    else by the bytes, else not at all."""
    started, read, made, earlier_bytes, earlier_tokens = time.monotonic(), 0, 0, 0, 0

    def text() -> str:
        rate = (made - earlier_tokens) / max(time.monotonic() - started, 1e-9)
        if total_tokens is not None:
            done, left = (
                f"{made / 1e6:,.0f} of {total_tokens / 1e6:,.0f} M tokens",
                _left(started, made - earlier_tokens, total_tokens - earlier_tokens),
            )
        elif total_bytes is not None:
            done = f"{read / 1e6:,.0f} of {total_bytes / 1e6:,.0f} MB, {made / 1e6:,.1f} M tokens"
            left = _left(started, read - earlier_bytes, total_bytes - earlier_bytes)
        else:
            done, left = f"{read / 1e6:,.0f} MB, {made / 1e6:,.1f} M tokens", "no end known"
        return f"{what}: {done}, {rate / 1e6:.2f} M tokens/s, {left}"

    with _shown(text, console) as show:

        def advance(num_bytes: int, num_tokens: int, *, earlier: bool = False) -> None:
            nonlocal read, made, earlier_bytes, earlier_tokens
            read, made = read + num_bytes, made + num_tokens
            if earlier:
                earlier_bytes, earlier_tokens = read, made
            show()

        yield advance


def _left(started: float, done: int, total: int) -> str:
    left = (time.monotonic() - started) * (total - done) / done if done else 0
    return f"about {max(left, 0):,.0f} s left"


@contextmanager
def _shown(text: Callable[[], str], console: Console | None) -> Iterator[Callable[[], None]]:
    """Yield a function that is to be called whenever the text has changed."""
    console = console or Console(highlight=False, soft_wrap=True)
    next_line = time.monotonic() + _QUIET_SECONDS
    status: StatusLine | None = None

    def show() -> None:
        nonlocal next_line, status
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
        yield show
    finally:
        if status is not None:
            status.end(keep=False)
