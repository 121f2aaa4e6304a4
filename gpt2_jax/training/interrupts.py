"""SIGTERM and Ctrl-C while a run trains: the first is a request to stop after the step, the second ends the process."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether a signal has asked the run to stop, and which."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def end_program(self) -> NoReturn:
        """End with the exit status of the signal: 130 for Ctrl-C, 143 for SIGTERM."""
        assert self.signal is not None
        raise SystemExit(128 + self.signal)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """While inside, SIGINT and SIGTERM are noted; a second one ends the process at once with its status.

    Signals are read by a thread of their own: the main thread can be in a compiled function for seconds, where Python
    runs no handler. Outside the main thread, where Python can set no handlers, nothing is changed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    reader, writer = socket.socketpair()  # not a pipe: Windows wakes sockets only
    writer.setblocking(False)  # set_wakeup_fd asks for it
    watcher = threading.Thread(target=_watch, args=(reader, request), daemon=True)
    watcher.start()
    previous = {number: signal.signal(number, _noted_by_the_watcher) for number in _SIGNALS}
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
        print(f"\n{request.signal.name}: finishing this step and saving; once more ends at once", file=sys.stderr, flush=True)
