"""Names that do not exist: which of those that do was meant."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path


def nearest(name: str, known: Iterable[str], *, count: int = 1, similarity: float = 0.6) -> list[str]:
    """Those of `known` that are most like a mistyped name, the best first, at most `count`; none where nothing is alike.

    Case and zeros before a number do not count. First come those that differ in numbers alone, the nearest numbers first,
    then those of difflib's ratio from `similarity` on, which is 1 for the same name.
    """
    words, numbers = _parts(name)
    by_folded = {_folded(other): other for other in known}
    series = [other for other in by_folded.values() if numbers and _parts(other)[0] == words]
    series.sort(key=lambda other: [abs(mine - theirs) for mine, theirs in zip(numbers, _parts(other)[1], strict=True)])
    alike = [by_folded[other] for other in difflib.get_close_matches(_folded(name), by_folded, n=count, cutoff=similarity)]
    return list(dict.fromkeys(series + alike))[:count]


def nearest_path(path: str | os.PathLike) -> Path | None:
    """The path that was meant by one that is not there: in place of each part that is missing, the name most like it.

    None for a path that is there, and where nothing is alike.
    """
    path = Path(path)
    found = Path(path.anchor)
    for part in path.parts[len(found.parts) :]:
        if not os.path.lexists(found / part):
            names = nearest(part, _names_in(found), similarity=0.7)
            if not names:
                return None
            part = names[0]
        found /= part
    return None if found == path else found


def near(path: str | os.PathLike) -> str:
    """What there is instead of a path that is not there, for an error: the names most like it in its folder or, where that
    is mistyped too, in the folder that was meant; empty where nothing is alike."""
    path = Path(path)
    folder = path.parent if os.path.isdir(path.parent) else nearest_path(path.parent)
    if folder is None or not (names := nearest(path.name, _names_in(folder), count=3)):
        # No file of such a name: the folder that is missing is named instead.
        return near(path.parent) if path.parent != path and not os.path.isdir(path.parent) else ""
    return f"; there is {' and '.join(names)}{'' if folder == Path() else f' in {folder}'}"


def _folded(name: str) -> str:
    return re.sub(r"(?<!\d)0+(?=\d)", "", name.casefold())


def _parts(name: str) -> tuple[list[str], list[int]]:
    """What stands around the numbers of a name, and the numbers."""
    return re.split(r"\d+", name.casefold()), [int(number) for number in re.findall(r"\d+", name)]


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except (OSError, ValueError):
        return []
