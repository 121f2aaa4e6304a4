"""What ends a run early: a signal (Ctrl-C, SIGTERM, a closed terminal, a batch system's limit) or the time it was given.

The first signal is a request to stop after the step; the second Ctrl-C or SIGTERM ends the process.
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


def _existing(*names: str) -> frozenset[signal.Signals]:
    """The signals of these names that this system has."""
    return frozenset(signal.Signals[name] for name in names if name in signal.Signals.__members__)


# People send these, and send them again when they do not want to wait. SIGBREAK is Windows's Ctrl-Break and closed window.
_FROM_PEOPLE = _existing("SIGINT", "SIGTERM", "SIGBREAK")
# A closed terminal or lost connection; limits of the shell (ulimit -t), of batch systems and of timers. Some of them send
# theirs every second. SIGQUIT is left to end the process at once.
_FROM_SURROUNDINGS = _existing("SIGHUP", "SIGXCPU", "SIGUSR1", "SIGUSR2", "SIGALRM")
_SIGNALS = _FROM_PEOPLE | _FROM_SURROUNDINGS
# `timeout` and the shell of a closed terminal signal a process and its group too: one request arrives several times.
_SECONDS_OF_ONE_REQUEST = 0.5


_NOTHING, _TIME = 0, 1000  # wishes beside the numbers of signals


class StopRequest:
    """Whether the run is to stop, and why: a signal came, or `max_minutes` have passed since this was made (0: no limit).

    One of several processes `waits`: what is asked of it is its `wish`, and it stops by what all have agreed on, which
    `hear` is told.
    """

    def __init__(self, max_minutes: float = 0.0, *, waits: bool = False) -> None:
        self.signal: signal.Signals | None = None
        self._max_minutes = max_minutes
        self._start = time.monotonic()
        self._heard = _NOTHING if waits else None

    @property
    def wish(self) -> int:
        """The number of the signal that came, another one when the time has passed, 0 when nothing asks to stop."""
        if self.signal is not None:
            return int(self.signal)
        is_over = self._max_minutes > 0 and time.monotonic() - self._start >= 60 * self._max_minutes
        return _TIME if is_over else _NOTHING

    def hear(self, wish: int) -> None:
        """The highest wish of all processes; one that was heard stays."""
        self._heard = max(self._heard or _NOTHING, wish)

    @property
    def _agreed(self) -> int:
        return self.wish if self._heard is None else self._heard

    @property
    def reason(self) -> str | None:
        """What asks the run to stop; None when nothing does."""
        agreed = self._agreed
        if agreed == _NOTHING:
            return None
        return f"--max-minutes {self._max_minutes:g}" if agreed == _TIME else signal.Signals(agreed).name

    def end_program(self, *, saved: bool) -> NoReturn:
        """End with the exit status of the signal, 128 and its number: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP. When
        the time has passed with 0, or with 1 if the step was not saved."""
        agreed = self._agreed
        raise SystemExit(int(not saved) if agreed in (_NOTHING, _TIME) else 128 + agreed)


class StoppedError(Exception):
    """Raised inside an event of a run that is to stop: what the event was doing is given up."""


@contextmanager
def stop_requests(max_minutes: float = 0.0, *, waits: bool = False) -> Iterator[StopRequest]:
    """Yield a StopRequest of these arguments. While inside, the signals that would end the process are noted; a SIGINT or
    SIGTERM that is sent again ends it at once with its status.

    A signal that was ignored before stays so, as nohup has it with SIGHUP, and a shell with the SIGINT of what it runs
    in the background. Signals are read by a thread of their own: the main thread can be in a compiled function for
    seconds, where Python runs no handler. Outside the main thread, where Python can set no handlers, nothing is changed.
    """
    request = StopRequest(max_minutes, waits=waits)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    reader, writer = socket.socketpair()  # not a pipe: Windows wakes sockets only
    writer.setblocking(False)  # set_wakeup_fd asks for it
    watcher = threading.Thread(target=_watch, args=(reader, request), daemon=True)
    watcher.start()
    # None: a handler that is not Python's, which Python could not put back.
    heeded = [number for number in _SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
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
    ends_at_once: dict[int, float] = {}  # from which time on, by the signals that came
    while (number := reader.recv(1)[0]) != 0:
        if number not in _SIGNALS:
            continue
        if number in ends_at_once:
            if number in _FROM_PEOPLE and time.monotonic() >= ends_at_once[number]:
                os._exit(128 + number)
            continue
        if request.signal is None:
            request.signal = signal.Signals(number)
        once_more = "; once more ends at once" if number in _FROM_PEOPLE else ""
        with suppress(OSError, ValueError):  # a terminal that is gone shows nothing, and must not end this thread
            text = f"\n{signal.Signals(number).name}: finishing this step and saving{once_more}"
            print(text, file=sys.stderr, flush=True)
        ends_at_once[number] = time.monotonic() + _SECONDS_OF_ONE_REQUEST
