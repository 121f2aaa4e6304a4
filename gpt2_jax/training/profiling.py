"""Tracing some steps of a run, and the page that tells their parts."""

from __future__ import annotations

import re
import time

import jax

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.report.profile import newest_trace, parts_of_trace, write_profile_page
from gpt2_jax.training.run_state import Run


def steps_to_profile(text: str) -> tuple[int, int] | None:
    """The first and the last step to trace, of --profile; Gpt2JaxError for anything but START:STOP of at most 100 steps after
    the first."""
    if not text:
        return None
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    if found is None or not 2 <= int(found[1]) <= int(found[2]) < int(found[1]) + 100:
        raise Gpt2JaxError(
            f"--profile: expected START:STOP, at most 100 steps after the first, which warms up, found {text!r}",
            "--profile 10:12",
        )
    return int(found[1]), int(found[2])


def profile(run: Run) -> None:
    """After the step before the first to trace: begin. After the last: end, and write the page."""
    assert run.profiled is not None
    if run.step == run.profiled[0] - 1:
        run.attempt(lambda: _begin(run))
    else:
        end_profile(run)


def _begin(run: Run) -> None:
    if not run.group.is_first:
        return
    jax.block_until_ready(run.state.params)
    jax.profiler.start_trace(str(run.folder / "profile"))
    run.profiling_since = time.perf_counter()
    first, last = run.profiled or (0, 0)
    run.display.line(f"tracing steps {first} to {last} ...")


def is_time_to_profile(run: Run) -> bool:
    """Whether a trace begins or ends after this step; of several processes that of process 0."""
    return run.profiled is not None and run.step in (run.profiled[0] - 1, run.profiled[1])


def end_profile(run: Run) -> None:
    """End a trace that goes on, and write the page of the steps so far."""
    if run.profiling_since is None or run.profiled is None:
        return
    run.attempt(lambda: jax.block_until_ready(run.state.params))  # this may be called as the run fails
    seconds, run.profiling_since = time.perf_counter() - run.profiling_since, None
    run.attempt(jax.profiler.stop_trace)
    first, last = run.profiled[0], run.step
    if last < first:
        return
    path, steps = run.folder / "profile.html", last - first + 1

    def write() -> None:
        trace = newest_trace(run.folder / "profile")
        parts = parts_of_trace(trace, run.compiled.as_text() or "", steps)
        write_profile_page(
            path,
            parts,
            title=run.folder.name,
            first=first,
            last=last,
            trace=trace.relative_to(run.folder),
            seconds=seconds / steps,
        )
        without = "" if parts else ", without parts: this backend's trace names no operations"
        run.display.line(f"profile: {path}{without}")

    run.attempt(write)
