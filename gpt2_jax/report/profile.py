"""A table of a step's parts from a trace of JAX's profiler: which named scope each operation belongs to, and how long it took.

A trace names operations of the compiled program; the program's text says under which named scopes each was made. Times are
an operation's own, without those of operations within it.
"""

from __future__ import annotations

import gzip
import html
import json
import os
import re
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.files import atomic_write

_OPERATION = re.compile(r"%?(?P<name>[\w.-]+) = .*metadata=\{[^}]*?op_name=\"(?P<path>[^\"]*)\"")
_WRAPPED = re.compile(r"(?:\w+)\((.*)\)")
_MAX_BYTES = 2**30  # of a trace, unpacked
_NO_SCOPE = "other"
# Beginnings of words in a path that are no named scopes but JAX's own functions.
_OF_JAX = ("jit(", "pjit", "custom_vjp", "custom_jvp", "while", "body", "cond", "branch_", "closed_call", "checkpoint", "remat")


class Part(NamedTuple):
    """What the operations of one named scope took in one direction."""

    scope: str
    direction: str  # 'forward', 'backward', or empty where there is none
    milliseconds: float  # of one step, summed over threads and streams
    operations: float  # of one step


def newest_trace(folder: Path) -> Path:
    """The trace that the profiler has written last into a folder; Gpt2JaxError where there is none."""
    traces = sorted(folder.glob("plugins/profile/*/*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    if not traces:
        raise Gpt2JaxError(f"{folder}: expected a trace of the profiler, found none")
    return traces[-1]


def parts_of_trace(trace: Path, program: str, steps: int) -> list[Part]:
    """The parts by their time, the longest first. `program` is the text of the compiled step, `steps` the number of steps in
    the trace. Gpt2JaxError for a file that is no trace."""
    found = filter(None, map(_OPERATION.search, program.splitlines()))
    scopes = {operation["name"]: _scope(operation["path"]) for operation in found}
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    module = re.match(r"HloModule ([\w.-]+)", program)
    for name, own in _own_times(_events(trace, None if module is None else module[1])):
        entry = sums[scopes.get(name, (_NO_SCOPE, ""))]
        entry[0] += own / 1000 / steps
        entry[1] += 1 / steps
    parts = [Part(*place, milliseconds, count) for place, (milliseconds, count) in sums.items()]
    return sorted(parts, key=lambda part: -part.milliseconds)


def _events(trace: Path, module: str | None) -> list[dict[str, Any]]:
    """The operations of a trace that are of this module (None: of any); where a device has a line of its operations, those of
    this line alone."""
    try:
        with gzip.open(trace, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise Gpt2JaxError(f"{trace}: expected a trace of at most {_MAX_BYTES} bytes, found more", "--profile 10:12")
        events = json.loads(content)["traceEvents"]
        threads = {
            (event["pid"], event["tid"]): event["args"]["name"] for event in events if event.get("name") == "thread_name"
        }
        of_lines = {pid for (pid, _), name in threads.items() if name == "XLA Ops"}
        return [
            event
            for event in events
            if event.get("ph") == "X"
            and "hlo_op" in event.get("args", {})
            and module in (None, event["args"].get("hlo_module"))
            and (event["pid"] not in of_lines or threads.get((event["pid"], event["tid"])) == "XLA Ops")
        ]
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Gpt2JaxError(f"{trace}: expected a trace of the profiler, found: {error or type(error).__name__}") from None


def _own_times(events: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """(operation, microseconds that it took without those within it)."""
    lines: dict[tuple[Any, Any], list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        lines[event["pid"], event["tid"]].append(event)
    found = []
    for line in lines.values():
        line.sort(key=lambda event: (event["ts"], -event["dur"]))
        open_ones: list[list[Any]] = []  # end, own time, name
        for event in line:
            while open_ones and open_ones[-1][0] <= event["ts"]:
                _, own, name = open_ones.pop()
                found.append((name, own))
            if open_ones:
                open_ones[-1][1] -= event["dur"]
            open_ones.append([event["ts"] + event["dur"], event["dur"], event["args"]["hlo_op"]])
        found += [(name, own) for _, own, name in open_ones]
    return [(name, max(own, 0.0)) for name, own in found]


def _scope(path: str) -> tuple[str, str]:
    """The innermost named scope of an operation and its direction: jit(step)/transpose(jvp(layer_0))/qkv/dot_general is qkv
    backward. The last word is the operation itself; numbers of layers are left out."""
    words = path.split("/")[:-1]
    direction = "backward" if any(word.startswith("transpose(") for word in words) else ""
    if not direction and any(word.startswith("jvp(") for word in words):
        direction = "forward"
    names = []
    for word in words:
        if word.startswith(_OF_JAX):
            continue
        while wrapped := _WRAPPED.fullmatch(word):
            word = wrapped[1]
        if word and not re.fullmatch(r"layer_\d+", word):
            names.append(word)
    return (names[-1] if names else _NO_SCOPE, direction)


def write_profile_page(
    path: str | os.PathLike, parts: list[Part], *, title: str, first: int, last: int, trace: Path, seconds: float
) -> None:
    """One page with the table; `seconds` is the mean time of a step while it was traced."""
    total = sum(part.milliseconds for part in parts) or 1.0
    rows = "".join(
        f"<tr><td>{html.escape(part.scope)}</td><td>{part.direction}</td><td>{part.milliseconds:.3f}</td>"
        f"<td>{part.milliseconds / total:.1%}</td><td>{part.operations:g}</td>"
        f'<td><div style="width:{12 * part.milliseconds / total:.2f}rem"></div></td></tr>'
        for part in parts
    )
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 60rem; padding: 0 1rem; }}
table {{ border-collapse: collapse; }} td, th {{ border: 1px solid #8884; padding: .2rem .6rem; text-align: left; }}
td:nth-child(n+3) {{ text-align: right; font-variant-numeric: tabular-nums; }} td div {{ background: #1f77b4; height: .8rem; }}
</style></head><body>
<h1>{html.escape(title)}: steps {first} to {last}</h1>
<p>{seconds * 1000:.2f} ms a step while traced. The operations of a step took {total:.2f} ms, summed over threads and streams,
which work at the same time.</p>
<table><tr><th>part</th><th>direction</th><th>ms a step</th><th>share</th><th>operations</th><th></th></tr>{rows}</table>
<p>The trace: <code>{html.escape(str(trace))}</code>, for https://ui.perfetto.dev or xprof.</p>
</body></html>
"""
    with atomic_write(path) as file:
        file.write(page.encode("utf-8", "backslashreplace"))
