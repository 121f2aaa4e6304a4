"""What a run leaves to be looked at: the picture of its losses, and its last lines."""

from __future__ import annotations

import shlex
import time

from gpt2_jax.compute.memory import measured_peak
from gpt2_jax.config import DataSettings
from gpt2_jax.errors import as_typed
from gpt2_jax.machine import gigabytes
from gpt2_jax.report.plots import plot_loss
from gpt2_jax.training.run_state import Run


def summarize(run: Run) -> None:
    """Print averages, peak memory, and the last validation loss beside the first; and the commands
    that come next."""
    seconds = run.clock.average_seconds
    run.display.line(f"average: {seconds * 1000:.2f} ms a step, {run.config.tokens_per_step / seconds:.0f} tok/s")
    peak, of = measured_peak()
    run.display.line(f"peak memory: {gigabytes(peak)} {of}")
    losses: dict[int, float] = {}
    run.attempt(lambda: losses.update(run.log.finite_values("validation", "loss")))
    if run.baseline is not None and losses:
        run.display.line(f"{_progress(losses)}; unigram cross-entropy {run.baseline:.4f}: {_verdict(losses, run.baseline)}")
    run.display.line(f"loss curve: {run.folder / 'loss.png'}\nlog:        {run.log.path}\nrun folder: {run.folder}")
    if run.best is not None:
        run.display.line(f"lowest validation loss: {run.best.loss:.4f} at step {run.best.step}, whose checkpoint is kept")
    folder, T = shlex.quote(str(run.folder)), run.config.data.sequence_length
    # The default is longer than a small model's positions.
    more = f"--steps {2 * run.steps}" if run.step == run.steps else f"--patience {2 * run.config.evaluation.patience}"
    best = "" if run.best is None or run.best.step == run.step else f" --step {run.best.step}"
    fits = "" if DataSettings().sequence_length == T else f" --sequence-length {T}"
    run.display.line(
        as_typed(
            f"talk to it:   python scripts/generate.py {folder}{best}\n"
            f"go on:        python scripts/train.py --resume --out-dir {folder} {more}\n"
            f"fine-tune it: python scripts/train.py --init {folder}{fits} --train data/my_train.bin"
        )
    )


def draw(run: Run) -> None:
    """Draw the losses so far into the run folder; process 0 does."""
    if not run.group.is_first:
        return
    started = time.monotonic()
    run.attempt(lambda: plot_loss(run.log, run.folder / "loss.png", baseline=run.baseline))
    run.drawn_at = time.monotonic()
    run.drawing_seconds = run.drawn_at - started


def draw_in_a_while(run: Run) -> None:
    """Draw unless that would take more than a twentieth of the run's time."""
    if time.monotonic() - run.drawn_at >= 20 * run.drawing_seconds:
        draw(run)


def _progress(losses: dict[int, float]) -> str:
    """The first and the last validation loss, and the lowest where it is neither."""
    (first, *_), (*_, last), lowest = losses, losses, min(losses, key=losses.__getitem__)
    between = "" if lowest in (first, last) else f" (lowest at step {lowest}: {losses[lowest]:.4f})"
    return f"validation loss {losses[first]:.4f} -> {losses[last]:.4f}{between}"


def _verdict(losses: dict[int, float], baseline: float) -> str:
    first, last = next(iter(losses.values())), [*losses.values()][-1]
    if len(losses) > 1 and last >= first:
        return "not below the run's first validation: the run made the model no better on this text"
    return "below it: more than word frequencies was learned" if last < baseline else "not below it yet"
