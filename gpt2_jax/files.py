"""Reading and writing files: text in UTF-8, whole or in blocks, never waiting for a pipe, and never half a file.

The one way in which this project writes a file: to a temporary name beside it, flushed to disk, renamed.
"""

from __future__ import annotations

import codecs
import dataclasses
import glob
import os
import re
import shlex
import socket
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar, get_args, get_type_hints

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.machine import process_lives
from gpt2_jax.names import near

# Opens a file for writing under a path that it gets, complete, later: atomic_write, or what write_together gives.
Writer = Callable[[str | os.PathLike], AbstractContextManager[BinaryIO]]

_BLOCK_BYTES = 2**20
_IS_PATH = "a path"
# The type of a setting or of an argument that is a path, a glob, or a name in whose place a path may stand. `~` in its
# beginning is the home folder, wherever it comes from: a shell expands none within --flag=~/x or quotes, TOML has no shell.
FilePath = Annotated[str, _IS_PATH]
_Settings = TypeVar("_Settings")


def with_home(settings: _Settings) -> _Settings:
    """A copy of a dataclass, and of those in it, with the home folder for `~` in every field of a path."""
    changes: dict[str, Any] = {}
    for name, kind in get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        if dataclasses.is_dataclass(value):
            changes[name] = with_home(value)
        elif isinstance(value, Path):
            changes[name] = value.expanduser()
        elif isinstance(value, str) and _is_path(kind):
            changes[name] = os.path.expanduser(value)
        elif isinstance(value, tuple) and _is_path(kind):
            changes[name] = tuple(os.path.expanduser(part) for part in value)
    return dataclasses.replace(settings, **changes)  # type: ignore[type-var]


def _is_path(kind: Any) -> bool:
    """Whether a field's type is FilePath, or may be."""
    return kind == _IS_PATH or any(map(_is_path, (*getattr(kind, "__metadata__", ()), *get_args(kind))))


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


def read_text_file(
    path: str | os.PathLike, what: str, hint: str | None = None, *, max_bytes: int | None = None, errors: str = "strict"
) -> str:
    """The content of `path`, which ought to be `what`, without a byte-order mark; `errors` as str.decode's.

    Gpt2JaxError for what is no regular file, cannot be read, is longer than `max_bytes`, is not UTF-8, or has zero bytes.
    """
    size = file_size(path, what, hint)
    if max_bytes is not None and size > max_bytes:
        raise Gpt2JaxError(f"{path}: expected {what} of at most {max_bytes} bytes, found {size} bytes", hint)
    return "".join(read_text_blocks(path, what, hint, errors=errors))


def read_text_blocks(
    path: str | os.PathLike,
    what: str,
    hint: str | None = None,
    *,
    errors: str = "strict",
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> Iterator[str]:
    """The text of `read_text_file` in blocks, for files that are larger than memory. With `errors` other than strict
    nothing that can be read is refused.

    `advance` is called with the number of bytes of each block that has been read.
    """
    file_size(path, what, hint)
    try:
        with open(path, "rb") as file:
            yield from decoded_blocks(file, path, what, hint, errors=errors, advance=advance)
    except OSError as error:
        raise Gpt2JaxError(f"{path}: expected {what}, found a file that cannot be read: {error.strerror}", hint) from None


def decoded_blocks(
    file: BinaryIO,
    path: str | os.PathLike,
    what: str,
    hint: str | None = None,
    *,
    errors: str = "strict",
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> Iterator[str]:
    """The text of `read_text_blocks` from an open file, also from one without an end that is known; `path` names it."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    position = 0
    try:
        block = file.read(_BLOCK_BYTES)
        if errors != "replace":
            _refuse_other_encodings(path, what, block)
        if block.startswith(codecs.BOM_UTF8):
            position = len(codecs.BOM_UTF8)
            block = block[position:]
        while block:
            advance(len(block))
            waiting = len(decoder.getstate()[0])  # bytes of a character that the last block ended within
            position -= waiting
            text = decoder.decode(block)
            position += waiting
            if errors == "strict" and b"\0" in block:
                found, without = f"a zero byte at {position + block.index(0)}", _into(path, "tr -d '\\000' <", "text")
                raise Gpt2JaxError(f"{path}: expected {what}, found {found}", f"{without}   (drops all of them)")
            yield text
            position += len(block)
            block = file.read(_BLOCK_BYTES)
        position -= len(decoder.getstate()[0])
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#x} at {position + error.start}"
        is_binary = re.search(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]", error.object) is not None
        other = f"file {shlex.quote(os.fspath(path))}   (says what it is)"
        latin1 = f"{_into(path, 'iconv -f LATIN1 -t UTF-8', 'utf8')}   (if it is Western European)"
        raise Gpt2JaxError(
            f"{path}: expected {what} in UTF-8, found {found}", hint or (other if is_binary else latin1)
        ) from None


def json_lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines of JSON Lines that are not blank, numbered from 1.

    Only a line feed ends a line: JSON's strings may hold the other characters at which str.splitlines ends one.
    """
    return ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())


def _refuse_other_encodings(path: str | os.PathLike, what: str, start: bytes) -> None:
    """Gpt2JaxError for a text that begins as UTF-16 and UTF-32 begin: with a byte-order mark, or zeros in Latin letters."""
    zeros = [byte == 0 for byte in start[:4]]
    for encoding, marks, pattern in (
        ("UTF-32", (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), ""),
        ("UTF-32LE", (), "x000"),
        ("UTF-32BE", (), "000x"),
        ("UTF-16", (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), ""),
        ("UTF-16LE", (), "x0x0"),
        ("UTF-16BE", (), "0x0x"),
    ):
        if start.startswith(marks) or (pattern and zeros == [letter == "0" for letter in pattern]):
            conversion = _into(path, f"iconv -f {encoding} -t UTF-8", "utf8")
            raise Gpt2JaxError(f"{path}: expected {what} in UTF-8, found {encoding}", conversion)


def _into(path: str | os.PathLike, command: str, suffix: str) -> str:
    """The command line that runs a command on a file, the result into a file beside it."""
    return f"{command} {shlex.quote(os.fspath(path))} > {shlex.quote(f'{os.fspath(path)}.{suffix}')}"


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

    `marker` is an empty file whose presence tells that the others are complete: an old one is set aside before the first
    file gets its name, and a new one appears after the last. If giving the names fails halfway, the old files and the old
    marker get theirs back. A failing disk is reported as a Gpt2JaxError.
    """
    temporaries: dict[Path, Path] = {}  # by the final paths, in the order of writing
    write = _writer(temporaries)
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


def _writer(temporaries: dict[Path, Path]) -> Writer:
    """Opens files under temporary names, which are noted by the final paths."""

    @contextmanager
    def write(path: str | os.PathLike) -> Iterator[BinaryIO]:
        path = Path(path)
        temporaries[path] = _temporary_name(path)
        with _reported(path, "to write it", "nothing was changed"), open(temporaries[path], "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    return write


@contextmanager
def write_with_others(agree: Callable[[Exception | None], None], marker: str | os.PathLike | None) -> Iterator[Writer]:
    """As `write_together`, for files of one set that several processes write at the same time, one of them the marker.

    All go from writing to giving names, and from there to the marker, together: `agree` gets this process's error, waits
    for the others, and raises if one has an error. Then all of the new files are removed, on every process. There must be no
    marker yet.
    """
    temporaries: dict[Path, Path] = {}
    named: list[Path] = []
    write = _writer(temporaries)

    def give_names() -> None:
        for path, temporary in temporaries.items():
            with _reported(path, "to write it", "the others of its set are removed"):
                os.replace(temporary, path)
            named.append(path)
        _sync_folders({path.parent for path in named}, "the others of its set are removed")

    def write_marker() -> None:
        if marker is not None:
            temporaries.clear()
            with write(marker):
                pass
            give_names()

    try:
        error = None
        try:
            yield write
        except Exception as caught:
            error = caught
        agree(error)
        for part in (give_names, write_marker):
            error = None
            try:
                part()
            except Exception as caught:
                error = caught
            agree(error)
    except BaseException:
        _remove_all(temporaries.values())
        _remove_all(reversed(named))  # the marker first
        raise


def _give_names(temporaries: dict[Path, Path], marker: Path | None) -> None:
    """Rename complete temporary files to the paths that they are listed by; the marker, if there is one, is the last.

    The old files of a set with a marker are set aside, the marker first, until all new ones have their names.
    """
    unchanged, mixed = "nothing was changed", "those written before it are new"
    folders = {path.parent for path in temporaries}
    old: dict[Path, Path] = {}
    named: list[Path] = []
    try:
        if marker is not None:
            for path in (marker, *(path for path in temporaries if path != marker)):
                if os.path.lexists(path):
                    with _reported(path, "to set it aside", unchanged):
                        os.replace(path, _temporary_name(path, "old"))
                    old[path] = _temporary_name(path, "old")
            if old:  # a crash of the machine must not leave the old marker beside new files
                _sync_folders(folders, unchanged)
        for path, temporary in temporaries.items():
            if path == marker:
                _sync_folders(folders, unchanged)
            with _reported(path, "to write it", mixed if named and marker is None else unchanged):
                os.replace(temporary, path)
            named.append(path)
        _sync_folders(folders, "what was written is complete but may not outlive a crash of the machine")
    finally:
        if marker in named:
            _remove_all(old.values())
        elif marker is not None:
            _remove_all(path for path in named if path not in old)
            _give_back(old)


def _give_back(old: dict[Path, Path]) -> None:
    """Give files that were set aside their names; a marker, whose name is not there then, gets it after new files went."""
    try:
        for path in sorted(old, key=lambda path: not os.path.lexists(path)):
            os.replace(old[path], path)
    except OSError as error:
        left = ", ".join(waiting.name for waiting in old.values() if os.path.lexists(waiting))
        raise Gpt2JaxError(
            f"{path}: expected to give the old file its name back, found: {error.strerror or error}; there still is {left}"
        ) from error


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
    """Remove the temporary files that a process which is gone has left in a folder. Old files that it had set aside get
    their names back, unless new ones have all of these. Gpt2JaxError when they cannot."""
    end = f".{_host_in_a_name(host)}.{process}"
    _remove_all(Path(folder).glob(f".*{end}.tmp"))
    old = {path.with_name(path.name[1:].removesuffix(f"{end}.old")): path for path in Path(folder).glob(f".*{end}.old")}
    if all(os.path.lexists(path) for path in old):
        _remove_all(old.values())
    else:
        _give_back(old)


def remove_abandoned_temporaries(path: str | os.PathLike) -> None:
    """Remove what processes of this host that are gone, killed while they wrote `path`, have left beside it."""
    path = Path(path)
    host = _host_in_a_name(socket.gethostname())
    names = {
        temporary: temporary.name.split(".")[-2] for temporary in path.parent.glob(f".{glob.escape(path.name)}.{host}.*.tmp")
    }
    _remove_all(temporary for temporary, process in names.items() if process.isdigit() and not process_lives(int(process)))


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
