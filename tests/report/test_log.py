"""The log of a run, which programs read."""

from __future__ import annotations

import json
import time

import pytest

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.report.log import RunLog


def train(log, step, loss):
    log.write("train", step, loss=loss, lr=1e-3, norm=1.0)


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
    log = RunLog(tmp_path / "log.jsonl", tokens_per_step=64)
    before = time.time()
    log.write("train", 1, loss=float("nan"), lr=0.1, norm=float("inf"), loss_z=1.0)
    record = json.loads(log.path.read_text(), parse_constant=pytest.fail)
    assert before - 0.001 <= record.pop("time") <= time.time() + 0.001
    assert record == {
        "event": "train",
        "step": 1,
        "tokens": 64,
        "loss": None,
        "lr": 0.1,
        "norm": None,
        "loss_z": 1.0,
    }
    assert (tmp_path / "main.log").read_text() == "s:0 trl:nan lr:0.100000 norm:inf\n"


def test_a_log_that_is_not_there_has_no_records(tmp_path):
    assert RunLog(tmp_path / "log.jsonl").records("train") == []


def test_a_log_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(Gpt2JaxError, match="expected to append to the log"):
        train(RunLog(tmp_path / "none" / "log.jsonl"), 1, 1.0)


def test_records_after_the_step_that_a_run_resumed_from_are_left_out(tmp_path):
    """A run of 8 steps resumed from step 4 with fewer steps, and again from step 2: the file keeps all lines."""
    log = RunLog(tmp_path / "log.jsonl")
    for step in range(1, 9):
        train(log, step, 10.0 + step)
    log.write("validation", 4, loss=4.0)
    log.write("validation", 8, loss=8.0)
    log.write("resume", 4)
    for step in (5, 6):
        train(log, step, 20.0 + step)
    assert [record["loss"] for record in log.records("train")] == [11.0, 12.0, 13.0, 14.0, 25.0, 26.0]
    assert log.finite_values("validation", "loss") == {4: 4.0}
    log.write("resume", 2)
    assert [record["loss"] for record in log.records("train")] == [11.0, 12.0]
    assert log.records("validation") == []
    assert [record["step"] for record in log.records("resume")] == [2]
    assert len(log.path.read_text().splitlines()) == 8 + 2 + 1 + 2 + 1


def test_a_line_that_was_cut_short_does_not_take_the_next_one_with_it(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    train(log, 1, 1.0)
    for path in (log.path, log.main_path):
        with open(path, "a") as file:
            file.write('{"event": "tra')
    log.write("resume", 0)
    train(log, 1, 2.0)
    assert [record["loss"] for record in log.records("train")] == [2.0]
    assert log.main_path.read_text().splitlines()[-1] == "s:0 trl:2.0000 lr:0.001000 norm:1.00"
