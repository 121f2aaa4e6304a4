"""The one record of a run while it trains, and its clock."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from gpt2_jax.compute.forward import Losses
from gpt2_jax.compute.parallel import make_highest, make_whole_buffer
from gpt2_jax.compute.plan import Plan
from gpt2_jax.compute.step import TrainState, own_wishes
from gpt2_jax.config import RunConfig
from gpt2_jax.data.batches import RunData
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc.checkpoint_set import complete_steps
from gpt2_jax.llmc.rounding import RoundingStream
from gpt2_jax.processes.group import Group
from gpt2_jax.report.display import Display
from gpt2_jax.report.log import RunLog
from gpt2_jax.training.interrupts import StoppedError, StopRequest
from gpt2_jax.training.run_record import Averages, Best


@dataclass
class Run:
    """A run's settings, plan, data and folder, its compiled functions, and the point that it has reached."""

    config: RunConfig
    plan: Plan
    data: RunData
    steps: int  # of the whole run
    folder: Path
    display: Display
    log: RunLog
    computed_by: str  # processor, products and versions: the bits depend on them beside settings and data
    peak_flops: float | None  # of all devices; None where it is not known
    compiled: jax.stages.Compiled
    loss_function: Losses
    token_loss_function: Losses
    # Where it stands.
    state: TrainState
    step: int  # updates done, refused ones included
    rounding: RoundingStream
    clock: StepClock
    stop: StopRequest = field(default_factory=StopRequest)
    group: Group = field(default_factory=Group)
    baseline: float | None = None  # unigram cross-entropy of the validation tokens
    other_roundings: tuple[RoundingStream, ...] = ()  # of the ranks behind rank 0
    best: Best | None = None  # with --keep-best or --patience
    saved_step: int = -1  # the last one of which a checkpoint was tried
    is_to_save: bool = False  # of several processes: process 0 has sent that it is time
    saved_at: float = field(default_factory=time.monotonic)
    drawn_at: float = -math.inf
    drawing_seconds: float = 0.0
    failures: set[str] = field(default_factory=set)
    profiled: tuple[int, int] | None = None  # the first and the last step to trace
    profiling_since: float | None = None  # perf_counter's seconds; None: no trace goes on

    def whole_params(self) -> jax.Array:
        """The parameters (N,) on every device."""
        return make_whole_buffer(self.plan)(self.state.params)

    def params_of_one_device(self) -> jax.Array:
        """The parameters (N,) on rank 0's device alone."""
        params = self.whole_params()
        return params if self.plan.devices == 1 else params.addressable_data(0)

    @property
    def wishes(self) -> tuple[int, int]:
        """What this process sends to the others with a step: to stop, and, from process 0, whose clock counts, to save."""
        return self.stop.wish, int(self.group.is_first and self.is_time_to_save)

    def hear(self, wishes: np.ndarray | jax.Array) -> None:
        """The highest wishes of all processes."""
        stop, save = np.asarray(wishes).tolist()
        self.stop.hear(stop)
        self.is_to_save = bool(save)

    @property
    def is_time_to_save(self) -> bool:
        """Whether --checkpoint-minutes have passed without a checkpoint."""
        minutes = self.config.run.checkpoint_minutes
        return minutes > 0 and time.monotonic() - self.saved_at >= 60 * minutes

    @property
    def is_stopping(self) -> bool:
        """Whether the run was asked to stop before its last step, after which it ends anyway."""
        return self.step < self.steps and self.stop.reason is not None

    @property
    def has_lost_patience(self) -> bool:
        """Whether --patience validations in a row have not lowered the validation loss. They are counted by their steps, so
        that a resumed run counts on."""
        evaluation = self.config.evaluation
        since = self.step - (0 if self.best is None else self.best.step)
        return 0 < evaluation.patience * evaluation.validate_every <= since

    def give_way(self) -> None:
        """Called now and then by an event that takes long, by all processes together: StoppedError when the run is to stop."""
        self.group.progress += 1
        if self.group.number > 1:
            self.hear(make_highest(self.plan)(own_wishes(self.plan, self.wishes)))
        if self.is_stopping:
            raise StoppedError

    @property
    def is_saved(self) -> bool:
        """Whether there is a complete checkpoint of the step; all processes ask together."""
        return self.group.broadcast(lambda: self.step in complete_steps(self.folder))

    def newest_checkpoint(self) -> str:
        steps = complete_steps(self.folder)
        return f"the newest checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint yet"

    def log_event(self, event: str, **values: float | int | str | dict[str, str]) -> None:
        """Append an event of the run's step to the log."""
        self.attempt(lambda: self.log.write(event, self.step, **values))

    def attempt(self, write: Callable[[], object]) -> None:
        """Do something that the run can do without. A failure of whatever kind is reported; the same one only once."""
        try:
            write()
        except Exception as error:
            text = failure_text(error)
            if text not in self.failures:
                self.display.line(f"{text}\nthe run goes on without it")
            self.failures.add(text)


def failure_text(error: Exception) -> str:
    """What to say of a failure that does not end the run."""
    return str(error) if isinstance(error, Gpt2JaxError) else f"{type(error).__name__}: {error}"


class StepClock:
    """Seconds from one step's end to the next; what happens between two segments (validation, checkpoints) is left out.

    The first step of a process is left out of the averages, as it includes warming up.
    """

    def __init__(self, tokens_per_step: int, averages: Averages):
        self._tokens_per_step = tokens_per_step
        self.averages = averages
        self._warm_up_seconds: float | None = None
        self.restart()

    def restart(self) -> None:
        self._last = time.perf_counter()

    def step_done(self) -> float:
        """The seconds of the step that has just ended."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        if self._warm_up_seconds is None:
            self._warm_up_seconds = seconds
        else:
            self.averages = self.averages.with_step(seconds)
        return seconds

    @property
    def average_seconds(self) -> float:
        """Of the steps so far, a resumed run's earlier ones included."""
        if self.averages.steps:
            return self.averages.seconds / self.averages.steps
        return self._warm_up_seconds or 0.0

    @property
    def smoothed_tokens_per_second(self) -> float:
        return self._tokens_per_step / (self.averages.smoothed_seconds or self.average_seconds)
