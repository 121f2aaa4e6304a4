"""What people are shown of a run."""

from __future__ import annotations

import io
import re

from rich.console import Console

from gpt2_jax.report.display import Display

FIGURES = {
    "loss": 4.5,
    "loss_z": -0.5,
    "norm": 0.25,
    "norm_z": float("nan"),
    "learning_rate": 3e-4,
    "seconds": 0.5,
    "utilization": None,
    "tokens_per_second": 512.0,
}


def console(terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=120, highlight=False, soft_wrap=True)


def test_a_pipe_gets_one_line_a_step():
    output = console(terminal=False)
    with Display(output) as display:
        for step in (1, 12):
            display.step(step, 20, **FIGURES)
    lines = output.file.getvalue().splitlines()
    figures = "loss 4.500000 (-0.50z) | norm 0.2500 (+nanz) | lr 3.00e-04 | 500.00 ms | 512 tok/s"
    assert lines[0] == f"step  1/20 | {figures}"
    assert lines[1].startswith("step 12/20 | ")
    assert len(lines) == 2


def test_the_mfu_is_shown_where_it_is_known():
    output = console(terminal=False)
    with Display(output) as display:
        display.step(1, 20, **FIGURES | {"utilization": 0.4321})
    assert output.file.getvalue().endswith("| 500.00 ms | 43.2% MFU | 512 tok/s\n")


def test_a_terminal_gets_a_live_bar_and_lines_above_it():
    output = console(terminal=True)
    with Display(output) as display:
        display.step(5, 20, **FIGURES)
        display.line("validation loss at step 5: 4.0")
        display.step(6, 20, **FIGURES)
    text = output.file.getvalue()
    assert re.search(r"6/20", text)
    assert "validation loss at step 5: 4.0" in text
    assert "loss 4.500000" in text


def test_square_brackets_are_text_not_markup():
    output = console(terminal=False)
    with Display(output) as display:
        display.line("[bold] of [/nothing]")
        display.table([("path", "runs/[x]"), ("longer name", 1)])
    text = output.file.getvalue()
    assert "[bold] of [/nothing]" in text
    assert "  path         runs/[x]" in text
