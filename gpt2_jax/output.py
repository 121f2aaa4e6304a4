"""Standard output and standard error of a program: what an encoding cannot show is escaped, and a stream that can no longer
be written stops no work.

A program whose output is its result ends when nobody can read it. One that leaves files calls `output_is_no_result`, and
goes on.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

# Handlers that put something in the place of every character that an encoding lacks. With any other it can fail.
_REPLACE_ALL = ("ignore", "replace", "backslashreplace", "xmlcharrefreplace", "namereplace")
_DESCRIPTORS = (0, 1, 2)


# Control characters but the tab and the end of a line: a terminal would obey them.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}


def without_controls(text: str) -> str:
    """A text for a terminal: control characters, of which a model may make any, escaped."""
    return text.translate(_CONTROLS)


class OutputLostError(Exception):
    """Standard output can no longer be written, and it was the program's result.

    No OSError: whoever writes a file and prints within one block would take it for the file's.
    """

    def __init__(self, cause: OSError):
        self.cause = cause
        super().__init__(f"standard output: expected to write it, found: {cause.strerror or cause}")


class _Closed(io.RawIOBase):
    """The unbuffered end of a stream that was closed when the process began."""

    def write(self, data: Any) -> int:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


class _Raw(io.RawIOBase):
    """The unbuffered end of a standard stream. What cannot be written is dropped, and said once on the other stream."""

    def __init__(self, name: str, file: Any):
        super().__init__()
        self.name, self._file = name, file
        self.is_result = False
        self.other: _Raw | None = None  # that a failure is said on

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._file.fileno()

    def isatty(self) -> bool:
        return self._file.isatty()

    def write(self, data: Any) -> int:
        try:
            self._write_all(data)
        except OSError as error:
            if self.is_result:
                raise OutputLostError(error) from None
            other, self.other = self.other, None
            if other is not None:
                text = f"{self.name} can no longer be written ({error.strerror or error}); the work goes on without it\n"
                with suppress(OSError):  # both are gone
                    other._write_all(text.encode("ascii", "backslashreplace"))
        return len(data)

    def _write_all(self, data: Any) -> None:
        rest = memoryview(data).cast("B")
        while rest:
            written = self._file.write(rest)
            if written is None:  # full, and some program has made the terminal or the pipe one that does not wait
                select.select([], [self.fileno()], [])
            rest = rest[written or 0 :]


_output: _Raw | None = None  # of the program that runs
_errors: _Raw | None = None


def output_is_no_result() -> None:
    """From here on the program does its work also when nobody can read what it prints."""
    if _output is not None:
        _output.is_result, _output.other = False, _errors
    if _errors is not None:
        _errors.other = _output


@contextmanager
def guarded_streams() -> Iterator[None]:
    """While inside, sys.stdout and sys.stderr show every character, and OutputLostError is all that printing can raise.

    Streams that are no files, as in a notebook, stay as they are. What was closed when the process began (`>&-`) cannot
    be written. Its number becomes the null device's: the next file that is opened would have it, and get what libraries print.
    """
    global _output, _errors
    for descriptor in _DESCRIPTORS:
        _open_if_closed(descriptor)
    before = sys.stdout, sys.stderr
    sys.stdout, _output = _guarded("standard output", sys.stdout)
    sys.stderr, _errors = _guarded("standard error", sys.stderr)
    if _output is not None:
        _output.is_result = True
    try:
        yield
    finally:
        if _output is not None:
            _output.is_result = False
        with suppress(ValueError):  # somebody has closed it
            sys.stdout.flush()
        sys.stdout, sys.stderr = before
        _output = _errors = None


def _open_if_closed(descriptor: int) -> None:
    try:
        os.fstat(descriptor)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        if null != descriptor:
            os.dup2(null, descriptor)
            os.close(null)
        os.set_inheritable(descriptor, True)  # as the standard streams of the programs that this one starts


def _guarded(name: str, stream: TextIO | None) -> tuple[TextIO, _Raw | None]:
    """A stream like the given one that never fails to encode, and its unbuffered end."""
    if stream is None:  # Python found it closed
        raw = _Raw(name, _Closed())
        return io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", errors="backslashreplace"), raw
    if not isinstance(stream, io.TextIOWrapper):
        return stream, None
    with suppress(OSError):
        stream.flush()
    # Under python -u there is no buffer between the text and the file.
    raw = _Raw(name, getattr(stream.buffer, "raw", stream.buffer))
    text = io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors if stream.errors in _REPLACE_ALL else "backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
    return text, raw
