"""The record of a run beside its state: what is written is read to the bit, and nothing else is taken for it."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.training.run_record import Averages, RunRecord, read_run_record, write_run_record
from tests.contract.guard import no_hang


def record(**changes) -> RunRecord:
    window = np.array([np.nan, 1 / 3, 1e-40, 3.4e38], dtype=np.float32)
    values = {
        "batch_size": 4,
        "sequence_length": 64,
        "dtype": "bfloat16",
        "computed_by": "bfloat16, amx in BF16_BF16_F32, a processor",
        "windows": {"loss": window, "gradient_norm": window[::-1]},
        "averages": Averages(7, 1.25, 1 / 3),
        "settings": {"run": {"steps": 40, "out_dir": "runs/ä"}, "optimizer": {"learning_rate": 3e-4}},
    }
    return RunRecord(**{**values, **changes})


def test_what_was_written_is_read_to_the_bit(tmp_path):
    path = tmp_path / "run.json"
    written = record()
    write_run_record(path, written)
    read = read_run_record(path)
    for name in ("loss", "gradient_norm"):
        assert read.windows[name].dtype == np.float32
        np.testing.assert_array_equal(read.windows[name], written.windows[name])
    for name in ("batch_size", "sequence_length", "dtype", "averages", "settings"):
        assert getattr(read, name) == getattr(written, name)
    json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)


@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=5))
def test_any_window_survives(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("record") / "run.json"
    window = np.array(values, dtype=np.float32)
    write_run_record(path, record(windows={"loss": window}))
    np.testing.assert_array_equal(read_run_record(path).windows["loss"], window)


def test_a_record_with_a_moving_rate_goes_on_with_the_plain_average_of_its_steps(tmp_path):
    """As records were before seconds were averaged."""
    path = tmp_path / "run.json"
    write_run_record(path, record())
    old = {"steps": 7, "seconds": 1.75, "moving_tokens_per_second": 1000 / 3}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"averages": old}))
    averages = read_run_record(path).averages
    assert (averages.steps, averages.seconds) == (7, 1.75)
    assert averages.smoothed_seconds == pytest.approx(0.25)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"averages": dict.fromkeys(old, 0)}))
    assert read_run_record(path).averages == Averages()


def test_averages_by_hand():
    averages = Averages()
    assert averages.smoothed_seconds == 0
    for seconds in (2.0, 4.0):
        averages = averages.with_step(seconds)
    assert (averages.steps, averages.seconds) == (2, 6.0)
    assert averages.smoothed_seconds == pytest.approx((0.95 * 2.0 + 4.0) / 1.95)


def refusal(path) -> str:
    with no_hang(), pytest.raises(Gpt2JaxError) as raised:
        read_run_record(path)
    assert str(raised.value).startswith(f"{path}: expected the record of a run")
    assert "---> HINT: rm " in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"batch_size": "4"},
        {"batch_size": True},
        {"dtype": 5},
        {"windows": []},
        {"windows": {"loss": 5}},
        {"windows": {"loss": ["1"]}},
        {"windows": {"loss": [True]}},
        {"windows": {"loss": [1e999]}},
        {"windows": {"loss": [1e39]}},
        {"windows": {"loss": [10**400]}},
        {"averages": None},
        {"averages": {"steps": -1, "seconds": 0, "moving_seconds": 0}},
        {"averages": {"steps": 1, "seconds": -1, "moving_seconds": 0}},
        {"averages": {"steps": 1, "seconds": 1, "moving_seconds": -1}},
        {"averages": {"steps": 1, "seconds": 1, "moving_seconds": 1e999}},
        {"averages": {"steps": 1, "seconds": 1, "moving_seconds": "1"}},
        {"averages": {"steps": 1}},
        {"averages": {"steps": 10**400, "seconds": 10**400, "moving_seconds": 0}},
        {"settings": []},
    ],
    ids=str,
)
def test_other_values_are_refused(tmp_path, change):
    path = tmp_path / "run.json"
    write_run_record(path, record())
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refusal(path)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"5", b"\xff", b"{", b"[" * 100_000, b" " * 1_000_001])
def test_other_content_is_refused(tmp_path, content):
    path = tmp_path / "run.json"
    path.write_bytes(content)
    refusal(path)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "link")
    for name in ("missing", "pipe", "link", "."):
        refusal(tmp_path / name)
