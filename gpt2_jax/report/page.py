"""Runs for looking at: one HTML file that needs nothing else, and pictures."""

from __future__ import annotations

import json
import os
from importlib.resources import files
from typing import Any

from gpt2_jax.files import atomic_write
from gpt2_jax.report.runs import RecordedRun, differing_settings
from gpt2_jax.sharing import anonymous

BY = ("step", "tokens", "hours")
_MAX_POINTS = 4000  # of a curve; a longer one is shown by means
_SAMPLES = 6  # of each run, the newest
# What can be shown: its name, and the records and values that it is of.
_WHAT = {
    "loss": (("train", "loss"), ("validation", "loss")),
    "learning rate": (("train", "lr"),),
    "gradient norm": (("train", "norm"),),
    "tokens per second": (("train", "tokens_per_second"),),
    "HellaSwag accuracy": (("hellaswag", "accuracy"),),
}
_RESULTS = ("steps", "training loss", "validation loss", "lowest validation loss", "HellaSwag", "tokens", "hours of steps")
_MARK = "DATA_OF_THE_RUNS"


def smoothed(values: list[float], weight: float) -> list[float]:
    """An exponential mean of weight `weight` for what came before, corrected for its start (as Adam's moments are)."""
    mean = share = 0.0
    found = []
    for value in values:
        mean = weight * mean + (1 - weight) * value
        share = weight * share + (1 - weight)
        found.append(mean / share)
    return found


def write_page(path: str | os.PathLike, runs: list[RecordedRun], *, by: str = "step", smoothing: float = 0.0) -> None:
    """Write the page; it loads nothing and runs nothing but its own drawing, whatever stands in a log."""
    template = files("gpt2_jax").joinpath("assets/report.html").read_text(encoding="utf-8")
    text = json.dumps(_data(runs, by, smoothing), ensure_ascii=True, allow_nan=False)
    # Within a script element nothing but its end tag is special.
    text = text.replace("<", "\\u003c")
    with atomic_write(path) as file:
        file.write(template.replace(_MARK, text, 1).encode("utf-8"))


def _data(runs: list[RecordedRun], by: str, smoothing: float) -> dict[str, Any]:
    notes: list[str] = []
    shown = [{**_run(run, notes)} for run in runs]
    for number, run in enumerate(shown):  # names must differ
        if any(other["name"] == run["name"] for other in shown[:number]):
            run["name"] = f"{run['name']} ({number + 1})"
    settings = (
        differing_settings(runs)
        if len(runs) > 1
        else {name: [value] for name, value in runs[0].settings.items() if value != ""}
    )
    return {
        "runs": shown,
        "what": [name for name in _WHAT if any(curve["what"] == name for run in shown for curve in run["curves"])],
        "by": by,
        "smoothing": smoothing,
        "results": _RESULTS,
        "settings": [[name, *(_text(value) for value in values)] for name, values in settings.items()],
        "notes": notes,
    }


def _run(run: RecordedRun, notes: list[str]) -> dict[str, Any]:
    tokens, hours = run.tokens(), run.hours()
    curves = []
    for what, sources in _WHAT.items():
        for event, key in sources:
            values = run.values(event, key)
            if not values:
                continue
            every = -(-len(values) // _MAX_POINTS)
            if every > 1:
                notes.append(f"{run.name}: each point of {what} is the mean of {every} steps")
            points = [values[start : start + every] for start in range(0, len(values), every)]
            steps = [part[-1][0] for part in points]
            curves.append(
                {
                    "what": what,
                    "event": event,
                    "dots": event != "train",
                    "step": steps,
                    "tokens": [tokens.get(step) for step in steps] if tokens else None,
                    "hours": [hours.get(step) for step in steps] if hours else None,
                    "values": [sum(value for _, value in part) / len(part) for part in points],
                }
            )
    samples = [
        (record["step"], record["text"]) for record in run.records.get("sample", []) if isinstance(record.get("text"), str)
    ]
    return {
        "name": run.name,
        "curves": curves,
        "results": _results(run, tokens, hours),
        "origins": [[record.get("step"), _origin(record)] for record in run.origins],
        "samples": samples[-_SAMPLES:][::-1],
    }


def _results(run: RecordedRun, tokens: dict[int, float], hours: dict[int, float]) -> list[str | None]:
    train, validation, questions = (
        run.values(*place) for place in (("train", "loss"), ("validation", "loss"), ("hellaswag", "accuracy"))
    )
    lowest = min(validation, key=lambda pair: pair[1], default=None)
    last = max([step for values in (train, validation) for step, _ in values[-1:]], default=None)
    return [
        None if last is None else f"{last:,}",
        f"{train[-1][1]:.4f}" if train else None,
        f"{validation[-1][1]:.4f}" if validation else None,
        None if lowest is None else f"{lowest[1]:.4f} (step {lowest[0]:,})",
        f"{questions[-1][1]:.4f}" if questions else None,
        f"{max(tokens.values()):,.0f}" if tokens else None,
        f"{max(hours.values()):.2f}" if hours else None,
    ]


def _origin(record: dict[str, Any]) -> str:
    """What a start of a process says of commit, versions and machine, without names of users and folders."""
    parts = [f"commit {record['commit'][:12]}"] if isinstance(record.get("commit"), str) and record["commit"] else []
    for name in ("versions", "machine"):
        if isinstance(record.get(name), dict):
            parts.append(", ".join(f"{key} {value}" for key, value in record[name].items()))
    return anonymous("; ".join(parts))


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def draw_runs(path: str | os.PathLike, runs: list[RecordedRun], *, by: str = "step", smoothing: float = 0.0) -> list[str]:
    """A picture of the losses of all runs, PNG or SVG by the path's name; returns the names of runs that have none by this
    measure."""
    from matplotlib import rcParams
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colors = rcParams["axes.prop_cycle"].by_key()["color"]
    missing = []
    for number, run in enumerate(runs):
        places = {"step": None, "tokens": run.tokens(), "hours": run.hours()}[by]
        color, drawn = colors[number % len(colors)], False
        for event, style in (
            ("train", {"linewidth": 1.0}),
            ("validation", {"marker": "o", "markersize": 4, "linestyle": "--"}),
        ):
            values = [(step if places is None else places.get(step), value) for step, value in run.values(event, "loss")]
            points = [(x, value) for x, value in values if x is not None]
            if not points:
                continue
            xs, ys = [x for x, _ in points], [value for _, value in points]
            if event == "train" and smoothing:
                axes.plot(xs, ys, color=color, alpha=0.25, linewidth=0.8)
                ys = smoothed(ys, smoothing)
            axes.plot(xs, ys, color=color, label=f"{run.name}, {event}".lstrip("_"), **style)
            drawn = True
        if not drawn:
            missing.append(run.name)
    axes.set_xlabel({"step": "step", "tokens": "tokens", "hours": "hours of training steps"}[by])
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="svg" if os.fspath(path).endswith(".svg") else "png", dpi=120)
    return missing
