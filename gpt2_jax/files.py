"""Reading and writing files: text of bounded size and in UTF-8, never waiting for a pipe, and never half a file.

The one way in which this project writes a file: to a temporary name beside it, flushed to disk, renamed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from gpt2_jax.errors import Gpt2JaxError


def file_size(path: str | os.PathLike, what: str, hint: str | None) -> int:
    """Size in bytes of a regular file; Gpt2JaxError for anything that cannot be read as one (missing, folder, pipe)."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise Gpt2JaxError(f"{path}: expected {what}, found no such file", hint) from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        cause = getattr(error, "strerror", None) or error
        raise Gpt2JaxError(f"{path}: expected {what}, found a path that cannot be opened: {cause}", hint) from None
    if stat.S_ISDIR(status.st_mode):
        raise Gpt2JaxError(f"{path}: expected {what}, found a folder", hint)
    if not stat.S_ISREG(status.st_mode):
        raise Gpt2JaxError(f"{path}: expected {what}, found something that is not a regular file", hint)
    return status.st_size


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
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # it may never have been made: no such folder, a name too long, a read-only disk
            temporary.unlink()
        if isinstance(error, OSError):
            raise Gpt2JaxError(
                f"{path}: expected to write it, found: {error.strerror or error}; nothing was changed"
            ) from error
        raise
    try:
        _sync_folder(path.parent)
    except OSError as error:
        raise Gpt2JaxError(
            f"{path}: expected to sync its folder, found: {error.strerror or error}; the file is complete but may not "
            f"outlive a crash of the machine"
        ) from error


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; only POSIX systems can open a folder for that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
