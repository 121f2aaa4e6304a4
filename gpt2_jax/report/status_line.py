"""One line at the bottom of a terminal that is drawn again and again, and the text above it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from rich.console import Console

_ERASE_BELOW = "\x1b[J"
_SECONDS = 1.0  # from one drawing to the next, where nothing happens


def can_hold_a_line(console: Console) -> bool:
    """Whether this is a terminal on which a line can be drawn anew. What FORCE_COLOR calls one is still a pipe."""
    can_erase = console.file.isatty() and not console.legacy_windows
    return can_erase and console.is_terminal and not console.is_dumb_terminal


class StatusLine:
    """A line that `render(width)` gives, of at most `width` characters; drawn at once, after every change, every second.

    After a drawing the cursor stands at the line's beginning. So whatever the terminal makes of the line when it becomes
    narrower, folded or cut, erasing from the cursor on takes all of it away. The cursor is not hidden: a program that is
    ended at once, as by a second Ctrl-C, could not show it again.
    """

    def __init__(self, console: Console, render: Callable[[int], str]):
        self._console, self._render = console, render
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)
        self.draw()
        self._ticker.start()

    def draw(self) -> None:
        """Draw the line anew, over the old one."""
        with self._lock:
            # Erased after it is written, so that nothing flickers.
            self._write(f"\r{self._render(self._columns())}{_ERASE_BELOW}\r")

    def above(self, write: Callable[[], None]) -> None:
        """Let `write` print whole lines where the line is, which then moves below them."""
        with self._lock:
            self._write(f"\r{_ERASE_BELOW}")
            write()
            self.draw()

    def end(self, *, keep: bool = True) -> None:
        """Draw the line for the last time and leave the cursor below it; without `keep` the line is erased."""
        self._ended.set()
        self._ticker.join()
        if keep:
            self.draw()
        self._write("\n" if keep else f"\r{_ERASE_BELOW}")

    def _tick(self) -> None:
        while not self._ended.wait(_SECONDS):
            self.draw()

    def _columns(self) -> int:
        """The columns that the terminal has now, less the last one, behind which some terminals begin another line.

        rich heeds COLUMNS, which does not change when the terminal does.
        """
        try:
            now = os.get_terminal_size(self._console.file.fileno()).columns
        except (OSError, ValueError):
            now = 0
        return max(1, min(now or self._console.width, self._console.width) - 1)

    def _write(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()
