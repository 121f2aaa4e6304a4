"""A guard for tests of code that must never wait: what hangs becomes a failure."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_hang(seconds: int = 20) -> Iterator[None]:
    def give_up(signum: int, frame: object) -> None:
        raise AssertionError(f"still waiting after {seconds} seconds")

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
