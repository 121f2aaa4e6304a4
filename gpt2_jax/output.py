"""Standard output and error that end no work: what cannot be shown is escaped, and a stream that is gone is done without."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Any, TextIO, cast


def make_output_safe(*, outlast: bool) -> None:
    """Characters that an encoding lacks are escaped from here on. A standard error that is gone (a closed terminal, a full
    disk) is replaced by nothing; so is, with `outlast`, a standard output, which is then said on the other stream.

    Without `outlast` a program whose output nobody reads ends, as those in a pipe do.
    """
    sys.stdout, sys.stderr = _opened(sys.stdout, 1), _opened(sys.stderr, 2)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stderr = cast(TextIO, _Lasting(sys.stderr, sys.stdout))
    if outlast:
        sys.stdout = cast(TextIO, _Lasting(sys.stdout, sys.stderr))


def _opened(stream: TextIO | None, number: int) -> TextIO:
    """The stream, or nothing in the place of one that was closed before the program began."""
    if stream is not None:
        return stream
    with suppress(OSError):
        # Else the next file that is opened would get the number, and with it what is written to the stream.
        nothing = os.open(os.devnull, os.O_WRONLY)
        if nothing != number:
            os.dup2(nothing, number)
            os.close(nothing)
    return open(number, "w", encoding="utf-8", closefd=False)


class _Lasting:
    """A text stream that becomes nothing when it fails, and says so on another one; in all else the stream itself."""

    def __init__(self, stream: TextIO, other: TextIO):
        self._stream, self._other = stream, other

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: a closed stream
            self._becomes_nothing(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._becomes_nothing(error)

    def _becomes_nothing(self, error: Exception) -> None:
        name = self._stream.name if isinstance(getattr(self._stream, "name", None), str) else "the output"
        # The number of the stream names nothing from here on, so that what waits in buffers goes there too.
        with suppress(OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)
        with suppress(OSError, ValueError):
            cause = getattr(error, "strerror", None) or error
            self._other.write(f"{name} can no longer be written ({cause}); the work goes on without it\n")
            self._other.flush()
