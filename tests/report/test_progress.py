"""Progress of one long task: nothing for a short one, lines in a pipe, a bar on a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from gpt2_jax.report import progress
from gpt2_jax.report.progress import bytes_progress, tokens_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A list of one number, the time."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def shown(clock, seconds: list[float], *, fails: bool = False, **console) -> str:
    """What is shown of a task of 10 MB that does 1 MB after each of these times."""
    file = Terminal() if console.get("force_terminal") else io.StringIO()
    try:
        with bytes_progress("reading a text", 10_000_000, Console(file=file, width=100, **console)) as advance:
            for passed in seconds:
                clock[0] += passed
                advance(1_000_000)
            if fails:
                raise ValueError
    except ValueError:
        assert fails
    return file.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_a_short_task_shows_nothing(clock, terminal):
    assert shown(clock, [0.19] * 10, force_terminal=terminal) == ""
    assert shown(clock, [], force_terminal=terminal) == ""


def test_a_pipe_gets_a_line_now_and_then(clock):
    assert shown(clock, [5, 1, 8, 2]) == (
        "reading a text: 1 of 10 MB, about 45 s left\nreading a text: 4 of 10 MB, about 24 s left\n"
    )


def test_a_dumb_terminal_gets_the_lines(clock, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert shown(clock, [5], force_terminal=True) == "reading a text: 1 of 10 MB, about 45 s left\n"


@pytest.mark.parametrize("fails", [False, True])
def test_a_terminal_gets_a_line_that_changes_and_vanishes(clock, fails, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    text = shown(clock, [5, 1], fails=fails, force_terminal=True)
    assert text.startswith("\rreading a text: 1 of 10 MB, about 45 s left\x1b[J\r")
    assert text.endswith("\r\x1b[J")  # the line is erased


def test_what_is_only_called_a_terminal_gets_lines(clock, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert shown(clock, [5]) == "reading a text: 1 of 10 MB, about 45 s left\n"


@pytest.mark.parametrize(
    ("totals", "line"),
    [
        ((40_000_000, None), "10 of 40 MB, 5.0 M tokens, 0.80 M tokens/s, about 19 s left"),
        ((None, 10_000_000), "5 of 10 M tokens, 0.80 M tokens/s, about 6 s left"),
        ((None, None), "10 MB, 5.0 M tokens, 0.80 M tokens/s, no end known"),
    ],
)
def test_the_rate_and_the_time_left_are_of_this_process(clock, totals, line):
    """Of 5 M tokens an earlier process made 1 M; the others took 5 seconds."""
    file = io.StringIO()
    with tokens_progress("tokenizing", *totals, Console(file=file, width=200)) as advance:
        advance(2_000_000, 1_000_000, earlier=True)
        clock[0] += 5
        advance(8_000_000, 4_000_000)
    assert file.getvalue() == f"tokenizing: {line}\n"
