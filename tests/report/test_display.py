"""What people are shown of a run."""

from __future__ import annotations

import dataclasses
import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
import time

import pytest
from rich.console import Console

from gpt2_jax.report.display import Display, Figures

NAN = float("nan")
FIGURES = Figures(
    step=12,
    total_steps=500,
    loss=4.5,
    loss_z=-0.5,
    norm=0.25,
    norm_z=NAN,
    learning_rate=3e-4,
    seconds=0.5,
    utilization=None,
    tokens_per_second=512.0,
)


def at(step: int, **changes) -> Figures:
    return dataclasses.replace(FIGURES, step=step, **changes)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class File(io.TextIOWrapper):
    """A file that may say that it is a terminal."""

    terminal = False

    def isatty(self) -> bool:
        return self.terminal


def console(terminal: bool, width: int = 120, encoding: str = "utf-8") -> Console:
    file = File(io.BytesIO(), encoding=encoding)
    file.terminal = terminal
    return Console(file=file, force_terminal=terminal, width=width, highlight=False, soft_wrap=True, _environ={"TERM": "xterm"})


def written(output: Console) -> str:
    output.file.flush()
    return output.file.buffer.getvalue().decode(output.file.encoding)


def screen(text: str) -> list[str]:
    """The rows that a terminal shows after this text: of its controls those that the live line uses."""
    rows, column, i = [""], 0, 0
    while i < len(text):
        for control in ("\x1b[J",):
            if text.startswith(control, i):
                if control == "\x1b[J":
                    rows[-1] = rows[-1][:column]
                i += len(control)
                break
        else:
            if text[i] == "\r":
                column = 0
            elif text[i] == "\n":
                rows.append("")
                column = 0
            else:
                rows[-1] = rows[-1][:column].ljust(column) + text[i] + rows[-1][column + 1 :]
                column += 1
            i += 1
    return rows


def test_a_pipe_gets_one_line_a_step_with_the_time_that_passed_and_is_left():
    output, clock = console(terminal=False), Clock()
    with Display(output, clock) as display:
        clock.now += 7
        display.step(at(1))
        clock.now += 30
        display.step(at(4, norm_z=1.25, utilization=0.4321))
    lines = written(output).splitlines()
    assert lines == [
        "step   1/500 | loss 4.500000 (-0.50z) | norm 0.2500 | lr 3.00e-04 | 500.00 ms | 512 tok/s | "
        "0:00:07 elapsed, 0:04:10 left",
        "step   4/500 | loss 4.500000 (-0.50z) | norm 0.2500 (+1.25z) | lr 3.00e-04 | 500.00 ms | 43.2% MFU | 512 tok/s | "
        "0:00:37 elapsed, 1:22:40 left",
    ]


@pytest.mark.parametrize(("terminal", "kind"), [(True, "dumb"), (False, "xterm")])
def test_a_dumb_terminal_and_what_is_only_called_one_get_the_lines_of_a_pipe(terminal, kind):
    output = console(terminal)
    output._environ = {"TERM": kind, "FORCE_COLOR": "1"}
    output._force_terminal = True
    with Display(output, Clock()) as display:
        display.step(at(12))
    assert written(output).startswith("step  12/500 | loss 4.500000 (-0.50z) | norm ")
    assert "\x1b" not in written(output)


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (40, "step 12/500 | ·········· | loss 4.5000"),
        (60, "step 12/500 | ·········· | loss 4.5000 | 0:04:04 left"),
        (80, "step 12/500 | ·········· | loss 4.5000 | 500.00 ms | 512 tok/s | 0:04:04 left"),
        (100, "step 12/500 | ·········· | loss 4.5000 | best 4.5000 | ▁ | 500.00 ms | 512 tok/s | 0:04:04 left"),
        (
            140,
            "step 12/500 | ·········· | loss 4.500000 (-0.50z) | best 4.5000 | ▁ | norm 0.2500 | 500.00 ms | 512 tok/s | "
            "0:00:00 elapsed | 0:04:04 left",
        ),
    ],
)
def test_the_narrower_the_terminal_the_less_is_shown_and_what_is_worth_most_stays(width, shown):
    output = console(terminal=True, width=width)
    with Display(output, Clock()) as display:
        display.step(FIGURES)
    last = screen(written(output))[-2]
    assert last == shown
    assert len(last) < width


def test_the_best_loss_and_the_recent_ones_as_sparks():
    output = console(terminal=True, width=160)
    with Display(output, Clock()) as display:
        for step, loss in enumerate([NAN, *[9.0] * 20, 1.0, 8.0, 2.0, 4.5], start=1):
            display.step(at(step, loss=loss))
    last = screen(written(output))[-2]
    assert "| best 1.0000 | ████████████▁▇▂▄ |" in last


@pytest.mark.parametrize(("total", "speed"), [(60, 4800.0), (20000, 48000.0)])
@pytest.mark.parametrize("width", [100, 110, 120])
def test_sparks_stay_when_the_losses_are_many_and_the_line_is_long(width, total, speed):
    output, clock = console(terminal=True, width=width), Clock()
    with Display(output, clock) as display:
        for step in range(1, 31):
            clock.now += 0.5
            display.step(at(step, total_steps=total, loss=5 - step / 10, tokens_per_second=speed))
    last = screen(written(output))[-2]
    (sparks,) = (part for part in last.split(" | ") if part[0] in "▁▂▃▄▅▆▇█")
    assert 4 <= len(sparks) <= 16
    assert (sparks[0], sparks[-1]) == ("█", "▁")  # the scale is of the losses that are shown
    assert "tok/s" in last
    assert len(last) < width


def test_the_best_of_a_resumed_run_is_the_whole_runs():
    output = console(terminal=True, width=160)
    with Display(output, Clock()) as display:
        display.recall([9.0, NAN, 2.0, 3.0])
        display.step(at(5, loss=9.0))
    assert "| best 2.0000 | █▁▂█ |" in screen(written(output))[-2]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_without_the_characters_gets_others(encoding):
    output = console(terminal=True, encoding=encoding)
    with Display(output, Clock()) as display:
        display.step(at(250))
    assert "step 250/500 | #####----- | loss 4.5000 | best 4.5000 | 500.00 ms" in screen(written(output))[-2]


def test_lines_stand_above_the_live_line_and_leave_no_copy_of_it():
    output = console(terminal=True)
    with Display(output, Clock()) as display:
        display.step(at(5))
        display.line("validation loss at step 5: 4.0")
        display.step(at(6))
    rows = screen(written(output))
    assert rows[0] == "validation loss at step 5: 4.0"
    assert rows[1].startswith("step 6/500 | ")
    assert rows[2:] == [""]
    assert written(output).endswith("\n")
    assert "\x1b[?25l" not in written(output)  # whoever is ended at once could not show the cursor again


def test_a_long_task_is_counted_after_two_seconds():
    for terminal in (False, True):
        output, clock = console(terminal), Clock()
        with Display(output, clock) as display:
            display.step(at(5))
            with display.counted("validating: batch", 40) as advance:
                for _ in range(40):
                    clock.now += 0.75
                    advance()
            display.step(at(6))
        text = written(output)
        counts = [row for row in text.replace("\r", "\n").splitlines() if row.startswith("validating")]
        if terminal:
            assert len(counts) == 37  # neither the first two nor the last
            assert screen(text)[-2].startswith("step 6/500")
        else:
            assert counts == [
                "validating: batch 3/40, 0:00:28 left",
                "validating: batch 17/40, 0:00:17 left",
                "validating: batch 31/40, 0:00:07 left",
            ]


def test_a_short_task_is_not_counted():
    output, clock = console(terminal=False), Clock()
    with Display(output, clock) as display, display.counted("validating: batch", 1000) as advance:
        for _ in range(1000):
            clock.now += 0.0015
            advance()
    assert written(output) == ""


PROGRAM = """
import time
from gpt2_jax.report.display import Display
from tests.report.test_display import at
with Display() as display:
    for step in range(1, 41):
        display.step(at(step))
        time.sleep(0.05)
"""


def resize(terminal: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))


def test_a_terminal_that_shrinks_keeps_no_stale_copy():
    """A terminal that folds a long line when it shrinks: what was drawn before is folded, and must be erased whole."""
    ours, its = pty.openpty()
    resize(its, 130)
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "", "LINES": ""}
    environment.pop("COLUMNS"), environment.pop("LINES")
    program = subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=its, stdout=its, stderr=its, env=environment)
    os.close(its)
    seen = b""
    before = None
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            part = os.read(ours, 65536)
        except OSError:
            break
        if not part:
            break
        seen += part
        if before is None and seen.count(b"step ") > 8:
            before = len(seen)
            resize(ours, 60)
    assert program.wait(timeout=60) == 0
    wide, narrow = seen[:before].decode(), seen[before:].decode()
    assert max(map(len, screen(wide))) > 90
    # Every drawing begins at the line's first character and erases all that is below; none is wider than the terminal.
    drawings = narrow.split("\x1b[J\r")[2:-1]
    assert len(drawings) > 10
    for drawing in drawings:
        assert drawing.startswith("\rstep ")
        assert len(drawing) <= 60


def test_square_brackets_are_text_not_markup():
    output = console(terminal=False)
    with Display(output) as display:
        display.line("[bold] of [/nothing]")
        display.table([("path", "runs/[x]"), ("longer name", 1)])
    text = written(output)
    assert "[bold] of [/nothing]" in text
    assert "  path         runs/[x]" in text


def test_control_characters_of_a_sample_are_no_orders_to_the_terminal():
    output = io.StringIO()
    Display(Console(file=output)).line("a\x1b[2Jb\x9bc\x0e\td\ne")
    assert output.getvalue() == "a\\x1b[2Jb\\x9bc\\x0e\td\ne\n".expandtabs(8)
