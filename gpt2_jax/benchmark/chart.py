"""The pictures of the benches: horizontal bars, one colour for each group."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.files import atomic_write

# Okabe and Ito's colours, which the colour-blind can tell apart.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


class Bar(NamedTuple):
    label: str
    group: str  # decides the colour, and is named in the legend
    value: float
    text: str  # beside the bar
    range: tuple[float, float] | None = None  # the lowest and the highest value that `value` is the median of
    pale: bool = False


def check_writable(path: str) -> None:
    """Raise Gpt2JaxError if the picture could not be saved, before minutes of measuring."""
    folder = Path(path).parent
    if not folder.is_dir() or Path(path).suffix.lower() != ".png":
        picture = shlex.quote(str(Path(path).with_suffix(".png"))) if Path(path).name else "steps.png"
        hint = f"--plot {picture}" if folder.is_dir() else f"mkdir -p {shlex.quote(str(folder))}"
        raise Gpt2JaxError(f"--plot: expected a .png file in a folder that exists, found {path}", hint)


def draw_bars(
    path: str, bars: Sequence[Bar], *, title: str, subtitle: str, axis: str, note: str, logarithmic: bool = False
) -> None:
    """Write a PNG with the bars from top to bottom."""
    figure = Figure(figsize=(10, 2.2 + 0.34 * len(bars)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    groups = list(dict.fromkeys(bar.group for bar in bars))
    colours = {group: _COLOURS[i % len(_COLOURS)] for i, group in enumerate(groups)}
    for place, bar in enumerate(bars):
        axes.barh(place, bar.value, height=0.72, color=colours[bar.group], alpha=0.35 if bar.pale else 1.0)
        end = bar.value
        if bar.range is not None:
            axes.plot(bar.range, (place, place), color="black", linewidth=1.2, marker="|", markersize=7)
            end = max(end, bar.range[1])
        axes.annotate(bar.text, (end, place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
    axes.invert_yaxis()
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(left=10.0 ** math.floor(math.log10(min(bar.range[0] if bar.range else bar.value for bar in bars))))
        axes.xaxis.set_major_formatter("{x:,g}")
    # Room for the longest text, which begins where the longest bar ends.
    axes.set_xmargin(0.0)
    ends = [bar.range[1] if bar.range else bar.value for bar in bars]
    axes.set_xlim(right=max(ends) * (3.0 if logarithmic else 1.6))
    axes.set_xlabel(f"{axis}\n{note}", fontsize=9)
    axes.grid(axis="x", which="major", alpha=0.3)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    axes.set_title(subtitle, fontsize=8.5, color="#444444")
    if len(groups) > 1:
        figure.legend(
            handles=[Patch(color=colours[group], label=group) for group in groups], loc="outside lower center", ncols=4
        )
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=130)
