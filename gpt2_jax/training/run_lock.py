"""The lock of a run folder: two processes that wrote to one folder would spoil each other's checkpoints and log."""

from __future__ import annotations

import errno
import os
import re
import shlex
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.files import remove_temporaries
from gpt2_jax.machine import process_lives

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NAME = ".lock"
# flock's errors on a file system that has no such locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class _Holder(NamedTuple):
    host: str
    process: int

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"

    @property
    def is_gone(self) -> bool:
        """True when the process certainly does not run any more; of another host that cannot be known."""
        return self.host == socket.gethostname() and not process_lives(self.process)


@contextmanager
def locked(folder: str | os.PathLike, say: Callable[[str], None] = print, others: Sequence[str] = ()) -> Iterator[None]:
    """Keep every other process out of a run folder that exists, by a file `.lock` with this host and process in it, and those
    of the `others` that train with it, each as `this_process` says it there.

    The kernel holds the lock where it can, and gives it up when the process ends, however it ends. A lock that was left
    behind is taken over: `say` is given a line about it, and the half-written files of that process are removed.
    Gpt2JaxError when another process has the lock, or when the file cannot be written.
    """
    path = Path(folder) / _NAME
    try:
        descriptor = _take(path, say)
        os.write(descriptor, "".join(f"{other}\n" for other in others).encode())
    except OSError as error:
        raise Gpt2JaxError(
            f"{path}: expected to lock the run folder, found: {error.strerror or error}", "another --out-dir"
        ) from None
    try:
        yield
    finally:
        if os.name == "nt":  # Windows removes no file that is open
            os.close(descriptor)
        with suppress(OSError):
            path.unlink()
        if os.name != "nt":  # elsewhere the file is removed while the lock is still held, so that it is nobody else's
            os.close(descriptor)


def this_process() -> str:
    """This process's host and number, as the lock file has them."""
    return f"{socket.gethostname()} {os.getpid()}"


def holders_text(folder: str | os.PathLike) -> str:
    """What the lock file of a folder has; empty where there is none."""
    with suppress(OSError):
        return (Path(folder) / _NAME).read_text(encoding="utf-8", errors="replace")
    return ""


def _take(path: Path, say: Callable[[str], None]) -> int:
    """The descriptor of the lock file, which is this process's from here on."""
    while True:
        try:
            descriptor, is_new = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), True
        except FileExistsError:
            try:
                descriptor, is_new = os.open(path, os.O_RDWR), False
            except FileNotFoundError:  # just given back
                continue
        try:
            if _take_opened(path, descriptor, is_new, say):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _take_opened(path: Path, descriptor: int, is_new: bool, say: Callable[[str], None]) -> bool:
    """Take the lock of an open file; False when the file was removed in the meantime by whoever had the lock."""
    held = _flock(descriptor)
    holders = [] if is_new else _read_holders(descriptor)
    holder = holders[0] if holders else None
    if held is False or (held is None and not is_new and (holder is None or not holder.is_gone)):
        raise _refusal(path, holder, certain=held is False)
    if held and not _is_at(path, descriptor):
        return False
    if holder is not None:
        say(f"{path} was left by {holder}, which is gone: taken over")
        for each in holders:
            remove_temporaries(path.parent, each.host, each.process)
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, f"{this_process()}\n".encode())
    return True


def _flock(descriptor: int) -> bool | None:
    """Whether the kernel gave this process the lock; None where there are no such locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _read_holders(descriptor: int) -> list[_Holder]:
    """Who wrote the file, and who trained with it; none when it is empty or has something else in it."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    text = os.read(descriptor, 1_000_000).decode("utf-8", "replace")
    if not re.fullmatch(r"(\S+ \d{1,10}\n)+", text):
        return []
    return [_Holder(host, int(process)) for host, process in map(str.split, text.splitlines())]


def _refusal(path: Path, holder: _Holder | None, *, certain: bool) -> Gpt2JaxError:
    """The error that names who has the lock; `certain` when that process runs, else it may be gone."""
    problem = f"{path.parent}: expected a run folder that no other process trains in, found {holder or 'another process'} in it"
    # A container that was started again may have the name and the process id of the one before it.
    is_another = holder is not None and holder.host == socket.gethostname() and holder.process != os.getpid()
    if certain or is_another:
        stop = f"kill {holder.process}   (on {holder.host}: it stops after its step), or " if holder else ""
        return Gpt2JaxError(problem, f"{stop}another --out-dir")
    return Gpt2JaxError(problem, f"rm {shlex.quote(str(path))}   (if that process is gone), or another --out-dir")
