"""Reading and writing files: text of bounded size and in UTF-8, never waiting for a pipe, and never half a file.

The one way in which this project writes a file: to a temporary name beside it, flushed to disk, renamed.
"""

from __future__ import annotations

import difflib
import os
import re
import socket
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from gpt2_jax.errors import Gpt2JaxError

# Opens a file for writing under a path that it gets, complete, later: atomic_write, or what write_together gives.
Writer = Callable[[str | os.PathLike], AbstractContextManager[BinaryIO]]


def file_size(path: str | os.PathLike, what: str, hint: str | None) -> int:
    """Size in bytes of a regular file; Gpt2JaxError for anything that cannot be read as one (missing, folder, pipe)."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise Gpt2JaxError(f"{path}: expected {what}, found no such file{near(path)}", hint) from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        cause = getattr(error, "strerror", None) or error
        raise Gpt2JaxError(f"{path}: expected {what}, found a path that cannot be opened: {cause}", hint) from None
    if stat.S_ISDIR(status.st_mode):
        raise Gpt2JaxError(f"{path}: expected {what}, found a folder", hint)
    if not stat.S_ISREG(status.st_mode):
        raise Gpt2JaxError(f"{path}: expected {what}, found something that is not a regular file", hint)
    return status.st_size


def near(path: str | os.PathLike) -> str:
    """What there is instead of a path that is not there, for an error: the names most like it where it ought to be, or in
    the nearest folder above it that exists; empty where nothing is like it."""
    missing = Path(path)
    while not os.path.isdir(missing.parent) and missing != missing.parent:
        missing = missing.parent
    try:
        names = sorted(os.listdir(missing.parent))
    except (OSError, ValueError):
        return ""
    close = difflib.get_close_matches(missing.name, names, n=3, cutoff=0.6)
    where = "" if missing.parent == Path() else f" in {missing.parent}"
    return f"; there is {' and '.join(close)}{where}" if close else ""


def read_text_file(
    path: str | os.PathLike, what: str, hint: str | None = None, *, max_bytes: int | None = None, errors: str = "strict"
) -> str:
    """The content of `path`, which ought to be `what`; `errors` as str.decode's.

    Gpt2JaxError for what is no regular file, cannot be read, is longer than `max_bytes`, or is not UTF-8.
    """
    size = file_size(path, what, hint)
    if max_bytes is not None and size > max_bytes:
        raise Gpt2JaxError(f"{path}: expected {what} of at most {max_bytes} bytes, found {size} bytes", hint)
    try:
        return Path(path).read_bytes().decode("utf-8", errors)
    except OSError as error:
        raise Gpt2JaxError(f"{path}: expected {what}, found a file that cannot be read: {error.strerror}", hint) from None
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#x} at {error.start}"
        raise Gpt2JaxError(f"{path}: expected {what} in UTF-8, found {found}", hint) from None


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a file for writing so that `path` either keeps its old content or has all of the new one.

    The data go to a temporary name in the same folder, are flushed to disk, and the file is renamed. On an error
    the temporary file is removed and `path` is untouched; a failing disk is reported as a Gpt2JaxError.
    """
    with write_together() as write, write(path) as file:
        yield file


@contextmanager
def write_together(marker: str | os.PathLike | None = None) -> Iterator[Writer]:
    """Write several files that belong together: `with write_together() as write: with write(path) as file: ...`.

    Every file goes to a temporary name and is flushed to disk; all get their names when the block has ended. On an error
    before that, the temporary files are removed and no old file has changed.

    `marker` is an empty file whose presence tells that the others are complete: an old one is removed before the first
    file gets its name, and a new one appears after the last. If giving the names fails halfway, the old files get theirs
    back, and the old marker returns. A failing disk is reported as a Gpt2JaxError.
    """
    temporaries: dict[Path, Path] = {}  # by the final paths, in the order of writing

    @contextmanager
    def write(path: str | os.PathLike) -> Iterator[BinaryIO]:
        path = Path(path)
        temporaries[path] = _temporary_name(path)
        with _reported(path, "to write it", "nothing was changed"), open(temporaries[path], "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    marker = None if marker is None else Path(marker)
    try:
        yield write
        if marker is not None:
            with write(marker):
                pass
        _give_names(temporaries, marker)
    except BaseException:
        # Some may never have been made (no such folder, a name too long, a read-only disk), others have their names.
        _remove_all(temporaries.values())
        raise


def _give_names(temporaries: dict[Path, Path], marker: Path | None) -> None:
    """Rename complete temporary files to the paths that they are listed by; the marker, if there is one, is the last."""
    unchanged, mixed = "nothing was changed", "those written before it are new"
    folders = {path.parent for path in temporaries}
    old: dict[Path, Path] = {}  # the name that an old file waits under until all new ones have theirs
    named: list[Path] = []
    had_marker = marker is not None and os.path.lexists(marker)
    try:
        if marker is not None and had_marker:
            with _reported(marker, "to delete it", unchanged):
                marker.unlink()
            # A crash of the machine must not leave the old marker beside new files.
            _sync_folders({marker.parent}, unchanged)
        for path, temporary in temporaries.items():
            if path == marker:
                _sync_folders(folders, unchanged)
            with _reported(path, "to write it", mixed if named and marker is None else unchanged):
                if marker is not None and os.path.lexists(path):
                    waiting = _temporary_name(path, "old")
                    os.replace(path, waiting)
                    old[path] = waiting
                os.replace(temporary, path)
            named.append(path)
        _sync_folders(folders, "what was written is complete but may not outlive a crash of the machine")
    except BaseException:
        if marker is not None and marker not in named:
            _remove_all(path for path in named if path not in old)
            with suppress(OSError):
                for path, waiting in old.items():
                    os.replace(waiting, path)
                if had_marker:
                    marker.touch()
        raise
    _remove_all(old.values())


def _remove_all(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink()


@contextmanager
def _reported(path: Path, expected: str, consequence: str) -> Iterator[None]:
    """Make an OSError within a Gpt2JaxError that says what was expected to be done with `path`."""
    try:
        yield
    except OSError as error:
        raise Gpt2JaxError(f"{path}: expected {expected}, found: {error.strerror or error}; {consequence}") from error


def _temporary_name(path: Path, kind: str = "tmp") -> Path:
    """A hidden name beside `path` that no other process takes: it has this host's name and this process's id.

    Two hosts that share a folder may have processes of the same id.
    """
    return path.with_name(f".{path.name}.{_host_in_a_name(socket.gethostname())}.{os.getpid()}.{kind}")


def remove_temporaries(folder: str | os.PathLike, host: str, process: int) -> None:
    """Remove the temporary files that a process which is gone has left in a folder."""
    for kind in ("tmp", "old"):
        _remove_all(Path(folder).glob(f".*.{_host_in_a_name(host)}.{process}.{kind}"))


def _host_in_a_name(host: str) -> str:
    """A host's name, at most 32 letters, digits and hyphens; one that had to be changed ends in its checksum."""
    safe = re.sub(r"[^A-Za-z0-9-]", "-", host)
    return safe if safe == host and 0 < len(safe) <= 32 else f"{safe[:23]}-{zlib.crc32(host.encode(errors='replace')):08x}"


def _sync_folders(folders: set[Path], consequence: str) -> None:
    """Make renames and removals in these folders durable; only POSIX systems can open a folder for that."""
    if os.name != "posix":
        return
    for folder in folders:
        with _reported(folder, "to sync the folder", consequence):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
