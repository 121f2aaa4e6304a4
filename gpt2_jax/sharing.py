"""Text that is made for sharing: without names of people, machines and networks, and without paths."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import platform
import re
import socket
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

_USER_VARIABLES = ("USER", "LOGNAME", "LNAME", "USERNAME", "SUDO_USER")
_HOST_VARIABLES = ("HOSTNAME", "HOST", "COMPUTERNAME")
_URL = re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s'\"<>]*", re.IGNORECASE)
_MAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)*")
_QUOTED_PATH = re.compile(r"(['\"])(?:~|\.{0,2}/|[A-Za-z]:[\\/]|\\\\)[^'\"\n]*\1")
_PATH = re.compile(
    r"(?<![\w/.|)\]])(?:~[\w.-]*|\.{1,2})?/(?:\\.|[^\s'\"<>|;:,()\[\]{}])+"  # /a, ~/a, ~jane/a, ./a, ../a
    r"|(?<![\w/.])(?:[\w.@+~-]+/){2,}[\w.@+~-]*"  # a/b/c
    r"|(?<![\w/.])[\w.@+~-]+/[\w.@+~-]*\.[A-Za-z]\w*"  # a/b.c
    r"|(?<!\w)[A-Za-z]:[\\/][^\s'\"<>|;,]*"  # C:\a
    r"|\\\\[\w.$-]+\\[^\s'\"<>|;,]*"  # \\server\a
)
_ADDRESS = re.compile(
    r"(?<![\w:.])(?:[0-9a-f]{2}[:-]){5}[0-9a-f]{2}(?![\w:.-])"  # of a network card
    r"|(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\.?\w)"
    r"|(?<![\w:.])[0-9a-f:]*:[0-9a-f:]*:[0-9a-f:.]*(?![\w:])",
    re.IGNORECASE,
)


def anonymous(text: str) -> str:
    """The text with `<path>`, `<user>`, `<host>`, `<address>` and `<url>` where it names one.

    For text that others wrote: messages of errors and libraries, values of environment variables, names that a system or
    a device gives itself. A word that happens to be the user's or the host's name is replaced as well.
    """
    text = _URL.sub("<url>", text)
    text = _MAIL.sub("<address>", text)
    text = _QUOTED_PATH.sub(r"\1<path>\1", text)
    # Folders that are known are found whole, also when their names have spaces.
    for folder in _longest_first(_folders()):
        text = re.sub(rf"{re.escape(folder)}(?![\w.-])[^\s'\"<>|;:,]*", "<path>", text)
    text = _PATH.sub("<path>", text)
    text = _ADDRESS.sub(lambda found: "<address>" if _is_address(found[0]) else found[0], text)
    for names, replacement in ((_user_names(), "<user>"), (_host_names(), "<host>")):
        for name in _longest_first(names):
            text = re.sub(rf"(?<![A-Za-z0-9<]){re.escape(name)}(?![A-Za-z0-9>])", replacement, text, flags=re.IGNORECASE)
    return text


def _longest_first(names: Iterable[str | None]) -> list[str]:
    return sorted({name for name in names if name}, key=lambda name: (-len(name), name))


def _folders() -> list[str]:
    """This user's and this program's folders, as they are named and as they are resolved."""
    named = [os.environ.get("HOME"), os.path.expanduser("~"), tempfile.gettempdir(), sys.prefix, str(Path(__file__).parents[1])]
    with contextlib.suppress(OSError):  # it was deleted
        named.append(os.getcwd())
    folders = [os.path.normpath(folder) for folder in named if folder]
    return [folder for folder in (*folders, *map(os.path.realpath, folders)) if len(folder) > 1]


def _user_names() -> list[str]:
    names = [os.environ.get(name) for name in _USER_VARIABLES] + [os.path.basename(os.path.expanduser("~"))]
    if sys.platform != "win32":
        import pwd

        try:
            entry = pwd.getpwuid(os.getuid())
        except KeyError:  # a user without an entry, as in some containers
            pass
        else:
            names += [entry.pw_name, entry.pw_gecos.partition(",")[0].strip()]
    return [name for name in names if name and name != "~"]


def _host_names() -> list[str]:
    names = [socket.gethostname(), platform.node(), *(os.environ.get(name) for name in _HOST_VARIABLES)]
    names += [name.partition(".")[0] for name in names if name]
    # Names that tell nothing, and that other texts have too.
    common = {"localhost", platform.system().lower(), platform.machine().lower()}
    return [name for name in names if name and name.lower() not in common]


def _is_address(text: str) -> bool:
    """True for an address of a network card, IPv4 or IPv6; versions such as 0.3.29.0 are none."""
    if re.fullmatch(r"(?:[0-9a-f]{2}[:-]){5}[0-9a-f]{2}", text, re.IGNORECASE):
        return True
    try:
        ipaddress.ip_address(text.rstrip("."))
    except ValueError:
        return False
    return not text.startswith("0.")
