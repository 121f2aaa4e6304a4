"""Look at runs: one HTML page with their curves, differing settings, samples and machines, and a picture of the losses.

python scripts/report.py runs/latest
python scripts/report.py runs/a runs/b log124M/main.log --output compare.html --by tokens --smoothing 0.9

At any time, also while a run goes on. llm.c's main.log is read as well.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gpt2_jax.commands.command_line import parse
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.files import FilePath
from gpt2_jax.output import output_is_no_result
from gpt2_jax.report.page import draw_runs, write_page
from gpt2_jax.report.runs import read_run


@dataclass(frozen=True)
class Arguments:
    runs: Annotated[tuple[FilePath, ...], tyro.conf.Positional]
    """Run folders, of this project or of llm.c, or their logs (log.jsonl, main.log)."""
    output: FilePath | None = None
    """The page; by default report.html in the first run's folder."""
    picture: FilePath | None = None
    """A picture of the losses, .png or .svg; by default one beside the page."""
    by: Literal["step", "tokens", "hours"] = "step"
    """What the curves are drawn over at first; the page can change it."""
    smoothing: float = 0.0
    """Weight of what came before in each point of the training loss: 0 (none) to below 1."""


def main(words: list[str]) -> None:
    arguments = parse(Arguments, __doc__, words)
    output_is_no_result()
    if not arguments.runs:
        raise Gpt2JaxError("report: expected at least one run, found none", "python scripts/report.py runs/latest")
    if not 0 <= arguments.smoothing < 1:
        raise Gpt2JaxError(f"--smoothing: expected 0 or more, below 1, found {arguments.smoothing}", "--smoothing 0.9")
    runs = [read_run(path) for path in arguments.runs]
    first = Path(arguments.runs[0])
    page = Path(arguments.output) if arguments.output else (first if first.is_dir() else first.parent) / "report.html"
    picture = Path(arguments.picture) if arguments.picture else page.with_suffix(".png")
    if page.suffix not in (".html", ".htm"):
        raise Gpt2JaxError(
            f"--output: expected a name that ends in .html, found {page}", f"--output {shlex.quote(str(page))}.html"
        )
    if picture.suffix not in (".png", ".svg"):
        hint = f"--picture {shlex.quote(str(picture))}.png"
        raise Gpt2JaxError(f"--picture: expected a name that ends in .png or .svg, found {picture}", hint)
    write_page(page, runs, by=arguments.by, smoothing=arguments.smoothing)
    missing = draw_runs(picture, runs, by=arguments.by, smoothing=arguments.smoothing)
    if missing:
        print(f"not in the picture, as they have no losses by {arguments.by}: {', '.join(missing)}")
    print(f"page:    {page}\npicture: {picture}")
