"""Reading a text file: of bounded size, in UTF-8, and never waiting for a pipe."""

from __future__ import annotations

import os
from pathlib import Path

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc.header import file_size


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
