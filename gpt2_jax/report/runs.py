"""What runs have left, for looking at them: a run folder, or its log alone, or llm.c's main.log."""

from __future__ import annotations

import json
import math
import os
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.files import read_text_file
from gpt2_jax.report.log import RunLog

_HINT = "a run folder such as runs/latest, a log.jsonl, or llm.c's main.log"
_MAX_BYTES = 2**30
_LINE = re.compile(r"s:(?P<step>\d{1,10}) (?P<rest>(?:tel|eval|trl):.*)")
# llm.c's words: the event, and the value's name here.
_WORDS = {"tel": ("validation", "loss"), "eval": ("hellaswag", "accuracy"), "trl": ("train", "loss")}

Record = dict[str, Any]


@dataclass(frozen=True)
class RecordedRun:
    """What is known of a run."""

    name: str
    path: Path
    records: dict[str, list[Record]]  # by their event, in order of their step; llm.c's have 'step' and the values alone
    settings: dict[str, Any] = field(default_factory=dict)  # 'data.batch_size': 4
    origins: list[Record] = field(default_factory=list)  # every start of a process: commit, versions, machine

    def values(self, event: str, key: str) -> list[tuple[int, float]]:
        """(step, value) of all records that have a finite number of this name."""
        pairs = [(record["step"], record.get(key)) for record in self.records.get(event, [])]
        return [(step, float(value)) for step, value in pairs if isinstance(value, (int, float)) and math.isfinite(value)]

    def hours(self) -> dict[int, float]:
        """The hours of training steps that each step ended after, where the log has every step's seconds."""
        found, total = {}, 0.0
        for step, seconds in self.values("train", "seconds"):
            total += seconds
            found[step] = total / 3600
        return {0: 0.0, **found} if found else {}

    def tokens(self) -> dict[int, float]:
        """The tokens that each step ended after, as far as the log or the settings say."""
        found = {step: value for event in self.records for step, value in self.values(event, "tokens")}
        if found:
            return {0: 0, **found}
        rates = dict(self.values("train", "tokens_per_second"))
        seconds = dict(self.values("train", "seconds"))
        total, counted = 0.0, {0: 0.0}
        for step in sorted(rates.keys() & seconds.keys()):
            total += round(rates[step] * seconds[step])
            counted[step] = total
        return counted if len(counted) > 1 else {}


def read_run(path: str | os.PathLike) -> RecordedRun:
    """A run folder, a log.jsonl, or llm.c's main.log; Gpt2JaxError for what is none, or has no record.

    Lines that are none are passed over, since a run may be writing them.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    log = (
        path / "log.jsonl" if path.is_dir() and (path / "log.jsonl").exists() else path / "main.log" if path.is_dir() else path
    )
    text = read_text_file(log, "the log of a run", _HINT, max_bytes=_MAX_BYTES, errors="replace")
    is_ours = log.suffix == ".jsonl" or text.lstrip()[:1] == "{"
    records = RunLog(log).all_records() if is_ours else _llmc_records(text)
    if not any(records.values()):
        raise Gpt2JaxError(f"{log}: expected the log of a run, found no record", _HINT)
    settings = _settings(folder / "config.toml") if is_ours else {}
    name = os.path.basename(os.path.realpath(folder)) if log.name in ("log.jsonl", "main.log") else path.stem
    return RecordedRun(name or str(path), path, records, settings, _origins(text) if is_ours else [])


def _llmc_records(text: str) -> dict[str, list[Record]]:
    """Of lines such as 's:0 trl:10.9900 lr:0.000001 norm:15.34'; of a step that was run twice the last."""
    found: dict[str, dict[int, Record]] = {}
    for line in text.splitlines():
        words = _LINE.fullmatch(line.strip())
        if words is None:
            continue
        step, values = int(words["step"]), {}
        for word in words["rest"].split():
            name, _, number = word.partition(":")
            try:
                values[name] = float(number)
            except ValueError:
                break
        event, key = _WORDS[words["rest"].partition(":")[0]]
        value = values.pop(words["rest"].partition(":")[0], None)
        if value is None:
            continue
        step += event == "train"  # llm.c counts the updates before the step
        later = found.setdefault(event, {})
        for other in [other for other in later if other > step]:  # the log was continued from an earlier step
            del later[other]
        later[step] = {"event": event, "step": step, key: value, **values}
    return {event: [by_step[step] for step in sorted(by_step)] for event, by_step in found.items()}


def _settings(path: Path) -> dict[str, Any]:
    """The settings of a config.toml, flat; none where there is no such file or it is none."""
    try:
        content = tomllib.loads(read_text_file(path, "settings", max_bytes=1_000_000))
    except (Gpt2JaxError, ValueError, RecursionError):
        return {}
    tables = {name: table for name, table in content.items() if isinstance(table, dict)}
    return {f"{name}.{key}": value for name, table in tables.items() for key, value in table.items()}


def _origins(text: str) -> list[Record]:
    """The events 'start', also those before a resume."""
    found = []
    for line in text.split("\n"):
        if '"start"' not in line:
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and record.get("event") == "start":
            found.append(record)
    return found


def differing_settings(runs: list[RecordedRun]) -> dict[str, list[Any]]:
    """The settings that are not the same in all runs that have settings, with each run's; None where a run has it not."""
    names = sorted({name for run in runs for name in run.settings} - {"run.out_dir"})
    rows = {name: [run.settings.get(name) for run in runs] for name in names}
    known = [bool(run.settings) for run in runs]
    return {
        name: values
        for name, values in rows.items()
        if len({repr(value) for value, has in zip(values, known, strict=True) if has}) > 1
    }
