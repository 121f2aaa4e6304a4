"""What ends a run early: a signal (Ctrl-C, SIGTERM, a closed terminal) or the time that it was given.

The first signal is a request to stop after the step, the second ends the process.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

# SIGHUP: the terminal was closed or the connection lost. SIGBREAK is Windows's word for that.
_SIGNALS = tuple(
    signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if name in signal.Signals.__members__
)


class StopRequest:
    """Whether the run is to stop, and why: a signal came, or `max_minutes` have passed since this was made (0: no limit)."""

    def __init__(self, max_minutes: float = 0.0) -> None:
        self.signal: signal.Signals | None = None
        self._max_minutes = max_minutes
        self._start = time.monotonic()

    @property
    def reason(self) -> str | None:
        """What asks the run to stop; None when nothing does."""
        if self.signal is not None:
            return self.signal.name
        if self._max_minutes and time.monotonic() - self._start >= 60 * self._max_minutes:
            return f"--max-minutes {self._max_minutes:g}"
        return None

    def end_program(self) -> NoReturn:
        """End with the exit status of the signal, 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP; of the time, with 0."""
        raise SystemExit(0 if self.signal is None else 128 + self.signal)


@contextmanager
def stop_requests(max_minutes: float = 0.0) -> Iterator[StopRequest]:
    """While inside, SIGINT, SIGTERM and SIGHUP are noted; a second one ends the process at once with its status.

    A signal that was ignored before stays so, as nohup has it with SIGHUP, and a shell with the SIGINT of what it runs
    in the background. Signals are read by a thread of their own: the main thread can be in a compiled function for
    seconds, where Python runs no handler. Outside the main thread, where Python can set no handlers, nothing is changed.
    """
    request = StopRequest(max_minutes)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    reader, writer = socket.socketpair()  # not a pipe: Windows wakes sockets only
    writer.setblocking(False)  # set_wakeup_fd asks for it
    watcher = threading.Thread(target=_watch, args=(reader, request), daemon=True)
    watcher.start()
    heeded = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, _noted_by_the_watcher) for number in heeded}
    previous_writer = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield request
    finally:
        signal.set_wakeup_fd(previous_writer)
        for number, handler in previous.items():
            signal.signal(number, handler)
        writer.send(b"\0")  # ends the watcher
        watcher.join()
        reader.close()
        writer.close()


def _noted_by_the_watcher(number: int, frame: object) -> None:
    """A handler in Python is what makes the interpreter write the signal's number to the wakeup file."""


def _watch(reader: socket.socket, request: StopRequest) -> None:
    while (number := reader.recv(1)[0]) != 0:
        if number not in _SIGNALS:
            continue
        if request.signal is not None:
            os._exit(128 + number)
        request.signal = signal.Signals(number)
        with suppress(OSError, ValueError):  # a terminal that is gone shows nothing, and must not end this thread
            print(
                f"\n{request.signal.name}: finishing this step and saving; once more ends at once", file=sys.stderr, flush=True
            )
