"""Tracing steps of a run: a real trace, the table of its parts, and what is no trace."""

from __future__ import annotations

import gzip
import json
import re

import pytest

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.report.profile import parts_of_trace, write_profile_page
from gpt2_jax.training.profiling import steps_to_profile
from gpt2_jax.training.run import train
from tests.conftest import CPU, change

PROGRAM = """HloModule jit_step, is_scheduled=true
  %fusion.1 = f32[8]{0} fusion(%x), kind=kLoop, metadata={op_name="jit(step)/jvp(layer_0)/qkv/dot_general" stack_frame_id=2}
  ROOT %call.2 = f32[8]{0} call(%y), metadata={op_name="jit(step)/transpose(jvp(layer_11))/transpose(jvp(fc))/add"}
  %copy = f32[8]{0} copy(%z)
"""


def event(name, ts, dur, *, tid=1, pid=7, module="jit_step"):
    return {
        "ph": "X",
        "pid": pid,
        "tid": tid,
        "ts": ts,
        "dur": dur,
        "name": name,
        "args": {"hlo_op": name, "hlo_module": module},
    }


def write_trace(path, events):
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    return path


def test_an_operations_time_is_its_own(tmp_path):
    """fusion.1 lies within call.2; another program's operation of the same name does not count."""
    events = [
        event("call.2", 100, 3000),
        event("fusion.1", 600, 1000),
        event("fusion.1", 5000, 500, tid=2),
        event("copy", 9000, 100),
        event("copy", 9500, 7000, module="jit_loss"),
        {"ph": "X", "pid": 7, "tid": 1, "ts": 0, "dur": 1e6, "name": "step"},
        {"ph": "M", "pid": 7, "tid": 1, "name": "thread_name", "args": {"name": "worker"}},
    ]
    parts = parts_of_trace(write_trace(tmp_path / "t.trace.json.gz", events), PROGRAM, steps=2)
    assert [tuple(part) for part in parts] == [
        ("fc", "backward", 1.0, 0.5),
        ("qkv", "forward", 0.75, 1.0),
        ("other", "", 0.05, 0.5),
    ]


def test_of_a_device_with_a_line_of_operations_only_this_line_counts(tmp_path):
    events = [
        {"ph": "M", "pid": 1, "tid": 3, "name": "thread_name", "args": {"name": "XLA Ops"}},
        event("fusion.1", 0, 1000, pid=1, tid=3),
        event("fusion.1", 0, 900, pid=1, tid=4),  # the same on its stream
    ]
    (part,) = parts_of_trace(write_trace(tmp_path / "t.trace.json.gz", events), PROGRAM, steps=1)
    assert part.milliseconds == 1.0


@pytest.mark.parametrize(
    "content",
    [b"", b"no gzip", gzip.compress(b"[1, 2]"), gzip.compress(b"{" * 99), gzip.compress(b"{}")[:9]],
    ids=["empty", "no gzip", "a list", "no JSON", "cut short"],  # gzip's own time is in the bytes
)
def test_what_is_no_trace_is_refused(tmp_path, content):
    (tmp_path / "t.trace.json.gz").write_bytes(content)
    with pytest.raises(Gpt2JaxError, match="expected a trace of the profiler, found"):
        parts_of_trace(tmp_path / "t.trace.json.gz", PROGRAM, 1)


def test_a_name_in_the_page_is_text(tmp_path):
    path = tmp_path / "p.html"
    write_profile_page(path, [], title="<script>", first=2, last=3, trace=tmp_path / "<b>", seconds=1.0)
    assert "<script" not in path.read_text()
    assert "<b>" not in path.read_text()


@pytest.mark.parametrize("text", ["1:3", "5:4", "5", "a:b", "2:200", "-1:3", "2:3:4"])
def test_other_steps_are_refused(text):
    with pytest.raises(Gpt2JaxError, match="--profile: expected START:STOP"):
        steps_to_profile(text)
    assert steps_to_profile("2:101") == (2, 101)


def test_a_profiler_that_fails_does_not_end_the_run(config, capsys, monkeypatch):
    def fail(folder):
        raise RuntimeError("Only one profile may be run at a time")

    monkeypatch.setattr("jax.profiler.start_trace", fail)
    folder = train(change(config, run={"profile": "3:4", "steps": 6}), "tiny", CPU)
    assert "Only one profile may be run at a time\nthe run goes on without it" in capsys.readouterr().out
    assert (folder / "DONE_00000006").exists()
    assert not (folder / "profile.html").exists()


def test_a_run_leaves_the_trace_and_the_table_of_its_parts(config, capsys):
    folder = train(change(config, run={"profile": "3:4", "steps": 6}), "tiny", CPU)
    page = (folder / "profile.html").read_text()
    assert "steps 3 to 4" in page
    rows = {tuple(row[:2]): row[3] for row in (re.findall(r"<td>(.*?)</td>", line)[:4] for line in page.split("<tr>")) if row}
    for part in ("qkv", "attention", "attproj", "fc", "fcproj", "embedding"):
        assert (part, "forward") in rows
        assert (part, "backward") in rows
    assert {("classifier", ""), ("adamw", "")} <= rows.keys()
    assert list((folder / "profile").rglob("*.trace.json.gz"))
    assert f"profile: {folder}/profile.html" in capsys.readouterr().out
    assert "profile" not in (folder / "config.toml").read_text().replace('profile = ""', "")
