"""A folder with all that is needed to believe a measurement, and to repeat it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from gpt2_jax.benchmark.machine import describe_machine, machine_line
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.files import atomic_write
from gpt2_jax.sharing import anonymous


class _Both(io.TextIOBase):
    """Standard output, and a copy of it."""

    def __init__(self) -> None:
        self.shown, self.copy = sys.stdout, io.StringIO()

    def write(self, text: str) -> int:
        self.copy.write(text)
        return self.shown.write(text)

    def flush(self) -> None:
        self.shown.flush()


@contextlib.contextmanager
def recording(folder: str | None, words: list[str]) -> Iterator[str | None]:
    """Write a bench's record when it has ended: log.txt, figures.json (its last line) and README.md with the command, the
    versions, the cards and the table; only log.txt when it was broken off. Yields the path for its picture, None without a
    folder.

    Gpt2JaxError for a folder that is there already.
    """
    if folder is None:
        yield None
        return
    path = Path(folder)
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise Gpt2JaxError(
            f"--record: expected to make the folder {path}, found: {error.strerror}", f"--record {shlex.quote(folder + '-2')}"
        ) from None
    print(f"record: {path}", flush=True)
    both = _Both()
    try:
        with contextlib.redirect_stdout(both):
            yield str(path / "steps.png")
    finally:
        log = anonymous(both.copy.getvalue())
        _write(path / "log.txt", log)
    figures = json.loads(log.splitlines()[-1])
    # Of an absolute path only the name, since folders name people; relative paths stay, so that it can be repeated.
    shared = [Path(word).name if Path(word).is_absolute() else word for word in words]
    facts = {
        "command": f"`{shlex.join(['gpt2-jax', 'bench-train', *shared])}`",
        "day": f"{date.today():%Y-%m-%d}",
        "commit": _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40")
        or "not known",
        "machine": machine_line(describe_machine()),
        "libraries": ", ".join(_libraries()),
        "cards": _output("nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader") or "none",
    }
    table = log[: log.rindex("\n", 0, len(log.rstrip()))].strip()
    text = f"# {path.name}\n\n" + "\n".join(f"- {name}: {fact}" for name, fact in facts.items())
    _write(path / "figures.json", json.dumps(figures, indent=1) + "\n")
    _write(path / "README.md", f"{text}\n\n```\n{table}\n```\n\n![the systems](steps.png)\n")


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


def _libraries() -> list[str]:
    """Those that decide how fast a step is, with their versions."""
    found = {(one.metadata["Name"].lower(), one.version) for one in importlib.metadata.distributions() if one.metadata["Name"]}
    return sorted(f"{name} {version}" for name, version in found if name.startswith(("jax", "nvidia-", "torch", "triton")))


def _output(*command: str) -> str:
    """What a program says, on one line; nothing where it cannot be run."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return "; ".join(ended.stdout.split("\n")).strip("; ")
