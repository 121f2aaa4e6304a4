"""What people and programs are shown of a run."""

from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.report.display import Display, RunLog, plot_loss

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


def train(log, step, loss):
    log.write("train", step, loss=loss, lr=1e-3, norm=1.0)


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


def test_the_log_keeps_a_steps_last_record_and_survives_a_torn_line(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    train(log, 2, 2.0)
    log.write("validation", 1, loss=9.0)
    train(log, 1, 1.0)
    with open(log.path, "a") as file:
        file.write('{"event": "tra\n')
    train(log, 2, 3.0)
    assert [(record["step"], record["loss"]) for record in log.records("train")] == [(1, 1.0), (2, 3.0)]


def test_main_log_has_llmcs_lines(tmp_path):
    """llm.c llmc/logger.h; a training line's step is the number of updates before it."""
    log = RunLog(tmp_path / "log.jsonl")
    log.write("validation", 0, loss=10.98765)
    log.write("train", 1, loss=10.98999, lr=8.5714e-07, norm=15.3391, loss_z=float("nan"), applied=True)
    log.write("sample", 1, text="x")
    log.write("hellaswag", 1, right=2490, total=10042, accuracy=2490 / 10042)
    assert (tmp_path / "main.log").read_text() == "s:0 tel:10.9877\ns:0 trl:10.9900 lr:0.000001 norm:15.34\ns:1 eval:0.2480\n"


def test_numbers_that_are_not_finite_are_null_in_the_log(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    log.write("train", 1, loss=float("nan"), lr=0.1, norm=float("inf"), loss_z=1.0)
    assert json.loads(log.path.read_text(), parse_constant=pytest.fail) == {
        "event": "train",
        "step": 1,
        "loss": None,
        "lr": 0.1,
        "norm": None,
        "loss_z": 1.0,
    }
    assert (tmp_path / "main.log").read_text() == "s:0 trl:nan lr:0.100000 norm:inf\n"


def test_a_run_that_begins_clears_what_another_left(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    train(log, 1, 2.0)
    log.clear()
    assert log.records("train") == []
    assert (tmp_path / "main.log").read_bytes() == b""


def test_a_log_that_is_not_there_has_no_records(tmp_path):
    assert RunLog(tmp_path / "log.jsonl").records("train") == []


def test_a_log_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(Gpt2JaxError, match="expected to append to the log"):
        train(RunLog(tmp_path / "none" / "log.jsonl"), 1, 1.0)


def test_the_plot_is_a_png_also_of_a_run_with_a_loss_that_is_not_finite(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    for step in range(1, 5):
        train(log, step, float("nan") if step == 3 else 10.0 / step)
    log.write("validation", 4, loss=3.0)
    path = tmp_path / "loss.png"
    plot_loss(log, path, baseline=6.0)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_a_plot_that_cannot_be_written_is_an_error(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    train(log, 1, 1.0)
    with pytest.raises(Gpt2JaxError, match="expected to write the loss curve"):
        plot_loss(log, tmp_path / "none" / "loss.png")
