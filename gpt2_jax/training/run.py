"""A training run from settings to checkpoints: data in, steps, and what happens around them.

Metrics are read one step late, while the next step is computing, so that the device never waits for the display.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.buffer.adamw import adamw, learning_rate_schedule
from gpt2_jax.buffer.layout import ParameterLayout
from gpt2_jax.compute import memory
from gpt2_jax.compute.backend import Backend, open_device
from gpt2_jax.compute.flops import flops_per_token, peak_flops
from gpt2_jax.compute.run_memory import memory_needed, needing_less, out_of_memory_explained
from gpt2_jax.compute.stability import WATCHED
from gpt2_jax.compute.step import Metrics, TrainState, create_state, make_train_step
from gpt2_jax.config import RunConfig, format_config, saved_config_path
from gpt2_jax.data.tokenizer import gpt2_tokenizer
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.evaluate import (
    check_questions,
    make_loss_function,
    make_token_loss_function,
    num_right_answers,
    unigram_cross_entropy,
    validation_loss,
)
from gpt2_jax.families.gpt2 import GPT2Config, is_descriptor
from gpt2_jax.files import atomic_write
from gpt2_jax.generate import generate, prompt_tokens
from gpt2_jax.llmc.eval_file import MultipleChoice, read_eval_file
from gpt2_jax.llmc.loader import Place, TokenLoader
from gpt2_jax.llmc.rounding import RoundingStream, rounded_to_nearest
from gpt2_jax.machine import gigabytes
from gpt2_jax.models.weights import load_weights, read_sizes
from gpt2_jax.ops.cpu import library as custom_calls
from gpt2_jax.ops.linear import choose_implementation
from gpt2_jax.report.display import Display
from gpt2_jax.report.log import RunLog
from gpt2_jax.report.plots import plot_loss
from gpt2_jax.training import checkpoint, resume
from gpt2_jax.training.interrupts import StopRequest, stop_requests
from gpt2_jax.training.run_record import Averages, RunRecord
from gpt2_jax.training.start_table import start_table


def train(config: RunConfig, name: str, backend: Backend) -> Path:
    """Train, and return the run folder. Raises Gpt2JaxError before anything is written for whatever can be refused.

    `backend` must have been selected before jax was imported. `name` is used for the folder when none is given.
    """
    config.validate()
    if config.compute.matmul_precision != "default":
        jax.config.update("jax_default_matmul_precision", config.compute.matmul_precision)
    display = Display()
    device = open_device(backend)
    matmul = choose_implementation(config.compute.matmul, backend)

    # Sizes and data first: a mistyped path is reported at once, not after the weights were made.
    if config.run.resume:
        resume.check_settings(config)
        newest = checkpoint.newest_step(config.run.out_dir)
        model = checkpoint.read_sizes(config.run.out_dir, newest)
    else:
        if config.run.out_dir:
            _refuse_used_folder(Path(config.run.out_dir))
        model = read_sizes(config.model)
    layout = model.layout
    needed = memory_needed(config, backend, matmul.name, layout)
    train_loader, validation_loader = _open_loaders(config, model)
    questions = _read_questions(config, model)
    steps = config.run.steps or train_loader.num_tokens // config.tokens_per_step
    if steps < 1:
        raise Gpt2JaxError(
            f"steps: expected data for at least one step of {config.tokens_per_step} tokens, found {train_loader.num_tokens}",
            "a smaller --total-batch-size, or --steps to train on the data more than once",
        )

    resumed = None
    if config.run.resume:
        display.line(f"loading the checkpoint of step {newest} ...")
        resumed = checkpoint.load_checkpoint(config.run.out_dir, newest, master_weights=not config.rounds_parameters)
        params = resumed.params
    else:
        display.line(f"making the weights of {config.model.init} ...")
        params = load_weights(config.model)[1]
    if config.rounds_parameters or (
        config.compute.dtype == "bfloat16" and resumed is None and is_descriptor(config.model.init)
    ):
        params = rounded_to_nearest(params)  # as llm.c's bfloat16 build begins

    schedule = learning_rate_schedule(
        config.optimizer.schedule,
        config.optimizer.learning_rate,
        steps=steps,
        warmup_steps=config.optimizer.warmup_steps,
        final_fraction=config.optimizer.final_learning_rate_fraction,
    )
    computed_by = resume.computed_by(config, backend, matmul.name)
    optimizer = adamw(schedule, layout, weight_decay=config.optimizer.weight_decay, custom_call=custom_calls.serve(matmul.name))
    less = needing_less(config, backend, matmul.name)
    with out_of_memory_explained(needed, less):
        state = create_state(params, optimizer, matmul=matmul.name)
        if resumed is not None:
            state = resume.resumed_state(state, config, resumed, train_loader, display, computed_by=computed_by)
    done = 0 if resumed is None else resumed.step
    rounding = RoundingStream() if resumed is None else resumed.rounding
    averages = Averages() if resumed is None or resumed.record is None else resumed.record.averages
    del params, resumed

    folder = _open_folder(config, name)
    clock = _StepClock(config.tokens_per_step, averages)
    precision = jax.config.jax_default_matmul_precision or "default"  # type: ignore[attr-defined]
    peak = peak_flops(jax.devices()[0].device_kind, config.compute.dtype, precision)
    loaders = (train_loader, validation_loader)
    run = _Run(config, folder, layout, steps, *loaders, questions, matmul.name, computed_by, display, clock, peak, rounding)
    with display:
        display.table(start_table(config, backend, device, matmul, layout, steps, needed, *loaders, folder))
        if done >= steps:
            display.line(f"nothing to do: {folder} is at step {done} of {steps}; a larger --steps goes on")
            return folder
        step_function = make_train_step(
            layout,
            optimizer,
            schedule,
            dtype=jnp.dtype(config.compute.dtype),
            matmul=matmul.name,
            recompute=config.compute.recompute,
            donate=backend.donates,
            loops=backend.loops,
            max_loss_z=config.optimizer.skip_loss_z,
            max_gradient_z=config.optimizer.skip_gradient_z,
        )
        with out_of_memory_explained(needed, less), stop_requests() as request:
            run.train(state, step_function, done + 1, request)
    return folder


class _Batch(NamedTuple):
    """The micro-batches of one step, and where each begins."""

    x_ABT: np.ndarray  # int32
    y_ABT: np.ndarray  # int32
    places: list[Place]


class _Run:
    """What the loop and its hooks share."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        layout: ParameterLayout,
        steps: int,
        train_loader: TokenLoader,
        validation_loader: TokenLoader | None,
        questions: list[MultipleChoice],
        matmul: str,
        computed_by: str,
        display: Display,
        clock: _StepClock,
        peak: float | None,
        rounding: RoundingStream,
    ):
        self.config, self.folder, self.layout, self.steps = config, folder, layout, steps
        self.train_loader, self.validation_loader, self.questions = train_loader, validation_loader, questions
        self.dtype, self.matmul = jnp.dtype(config.compute.dtype), matmul
        self.computed_by, self.display, self.clock, self.peak, self.rounding = computed_by, display, clock, peak, rounding
        self.log = RunLog(folder / "log.jsonl")
        self.loss_function = make_loss_function(layout, dtype=self.dtype, matmul=self.matmul)
        self.token_loss_function = make_token_loss_function(layout, dtype=self.dtype, matmul=self.matmul)
        self.baseline: float | None = None
        self.failures: set[str] = set()

    def train(self, state: TrainState, step_function: jax.stages.Wrapped, first_step: int, request: StopRequest) -> None:
        if self.validation_loader is not None:
            self.baseline = unigram_cross_entropy(
                self.train_loader.paths, self.validation_loader.paths, self.layout.config.vocab_size
            )
            self.display.line(
                f"unigram cross-entropy of the validation tokens: {self.baseline:.6f} (knowing only word frequencies)"
            )
        if first_step == 1:
            self.attempt(self.log.clear)
            self.validate(0, state)
            self.sample(0, state)
        else:
            self.log_event("resume", first_step - 1)
        self.display.line("compiling the training step ...")
        started = time.perf_counter()
        batch = self.next_batch()
        compiled = step_function.lower(state, batch.x_ABT, batch.y_ABT, self.tensor_seeds()).compile()
        needed = memory.compiled_bytes(compiled)
        self.display.line(
            f"compiled in {time.perf_counter() - started:.1f} s"
            + ("" if needed is None else f"; the step has {gigabytes(needed)} of memory")
        )
        if request.signal is not None:
            self.stop(first_step - 1, request)

        in_flight: tuple[int, Metrics, list[Place]] | None = None
        self.clock.restart()
        for step in range(first_step, self.steps + 1):
            state, metrics = compiled(state, batch.x_ABT, batch.y_ABT, self.tensor_seeds())
            if in_flight is not None:
                self.report(*in_flight)
            in_flight = (step, metrics, batch.places)
            last = step == self.steps
            stops = request.signal is not None and not last
            evaluates = (last or _due(step, self.config.evaluation.validate_every)) and not stops
            samples = (last or _due(step, self.config.evaluation.sample_every)) and not stops
            saves = last or stops or _due(step, self.config.run.checkpoint_every)
            # Rounding needs seeds, and which come next depends on whether this update was applied.
            if evaluates or samples or saves or self.config.rounds_parameters:
                self.report(*in_flight)
                in_flight = None
            if saves:
                self.save(step, state, last=last)
            if stops:
                self.stop(step, request)
            if evaluates:
                self.validate(step, state)
                self.answer_questions(step, state)
            if samples:
                self.sample(step, state)
            if evaluates or samples or saves:
                self.clock.restart()
            if not last:
                batch = self.next_batch()
        self.finish()

    def next_batch(self) -> _Batch:
        """The micro-batches of the next step; the same in every step when one batch is to be overfitted."""
        if self.config.data.overfit_one_batch:
            self.train_loader.reset()
        batches, places = [], []
        for _ in range(self.config.num_micro_batches):
            batches.append(self.train_loader.next_batch())
            places.append(self.train_loader.last_place)
        return _Batch(np.stack([x for x, _ in batches]), np.stack([y for _, y in batches]), places)

    def tensor_seeds(self) -> np.ndarray | None:
        """The seeds that the next update rounds the parameters with; None when it does not."""
        return self.rounding.next_seeds(self.config.num_micro_batches) if self.config.rounds_parameters else None

    def report(self, step: int, metrics: Metrics, places: list[Place]) -> None:
        """Wait for a step's metrics, show and log them. Gpt2JaxError for a loss or gradient that is not finite, if
        that is to end the run."""
        loss, norm, learning_rate = (float(value) for value in (metrics.loss, metrics.gradient_norm, metrics.learning_rate))
        loss_z, norm_z = np.asarray(metrics.verdict.z_scores).tolist()
        applied = bool(metrics.verdict.applies)
        seconds = self.clock.step_done()
        self.rounding.step_done(self.config.num_micro_batches, applied=applied)
        achieved = flops_per_token(self.layout.config, self.config.data.sequence_length) * self.config.tokens_per_step / seconds
        self.display.step(
            step,
            self.steps,
            loss=loss,
            loss_z=loss_z,
            norm=norm,
            norm_z=norm_z,
            learning_rate=learning_rate,
            seconds=seconds,
            utilization=None if self.peak is None else achieved / self.peak,
            tokens_per_second=self.clock.smoothed_tokens_per_second,
        )
        self.log_event(
            "train",
            step,
            loss=loss,
            norm=norm,
            lr=learning_rate,
            loss_z=loss_z,
            norm_z=norm_z,
            applied=applied,
            seconds=seconds,
            tokens_per_second=self.config.tokens_per_step / seconds,
        )
        if not metrics.verdict.is_finite:
            problem = _not_finite(step, loss, norm, np.asarray(metrics.squared_norms), self.layout, places)
            if self.config.optimizer.nonfinite == "raise":
                raise Gpt2JaxError(
                    f"{problem}; the parameters are those before this step",
                    f"--resume --out-dir {self.folder} with a lower --learning-rate or --nonfinite skip",
                )
            self.display.line(f"update skipped: {problem}")
        elif not applied:
            self.display.line(
                f"update skipped: step {step} is an outlier, its loss {loss_z:+.2f}z, its gradient {norm_z:+.2f}z"
            )

    def validate(self, step: int, state: TrainState) -> None:
        if self.validation_loader is None:
            return
        batches = self.config.evaluation.validation_batches
        if batches == -1:  # llm.c's count: dropped tails are counted, and made up for by the first batches
            batches = self.validation_loader.num_tokens // (self.config.data.batch_size * self.config.data.sequence_length)
        self.display.line(f"validating on {batches} batches ...")
        loss = validation_loss(self.loss_function, state.params, self.validation_loader, batches)
        self.display.line(f"validation loss at step {step}: {loss:.6f}")
        self.log_event("validation", step, loss=loss)

    def answer_questions(self, step: int, state: TrainState) -> None:
        if not self.questions:
            return
        total = len(self.questions)
        self.display.line(f"scoring {total} HellaSwag questions ...")
        right = num_right_answers(self.token_loss_function, state.params, self.questions, self.config.data.batch_size)
        self.display.line(f"HellaSwag at step {step}: {right}/{total} = {right / total:.6f}")
        self.log_event("hellaswag", step, right=right, total=total, accuracy=right / total)

    def sample(self, step: int, state: TrainState) -> None:
        if self.config.evaluation.sample_every == 0:
            return
        tokenizer, vocab_size = gpt2_tokenizer(), self.layout.config.vocab_size
        prompt = self.config.evaluation.prompt
        speaks_gpt2 = vocab_size == tokenizer.n_vocab
        tokens = generate(
            state.params,
            self.layout,
            prompt_tokens(prompt, tokenizer) if speaks_gpt2 else [vocab_size - 1],
            self.config.evaluation.sample_tokens,
            dtype=self.dtype,
            matmul=self.matmul,
        )
        self.display.line(f"sample at step {step}:\n---")
        # Of a vocabulary that is not GPT-2's only the ids can be shown.
        text = prompt + tokenizer.decode(list(tokens)) if speaks_gpt2 else " ".join(map(str, tokens))
        self.display.line(f"{text}\n---")
        self.log_event("sample", step, text=text)

    def save(self, step: int, state: TrainState, *, last: bool) -> None:
        """Write a checkpoint and delete those that need not be kept. What cannot be written is reported, and the run
        goes on; but Gpt2JaxError if there is no later step to save."""
        params, m, v = (np.asarray(buffer) for buffer in (state.params, state.optimizer.m, state.optimizer.v))
        data, run = self.config.data, self.config.run
        record = RunRecord(
            batch_size=data.batch_size,
            sequence_length=data.sequence_length,
            dtype=self.config.compute.dtype,
            computed_by=self.computed_by,
            windows=dict(zip(WATCHED, np.asarray(state.windows), strict=True)),
            averages=self.clock.averages,
            settings=dataclasses.asdict(self.config),
        )
        saved = checkpoint.Checkpoint(
            model=self.layout.config,
            params=params,
            m=m,
            v=v,
            step=step,
            loader=self.train_loader.state(),
            dtype=self.config.compute.dtype,
            master_weights=self.config.optimizer.master_weights,
            rounding=self.rounding,
            record=record,
        )
        try:
            path = checkpoint.save_checkpoint(self.folder, saved)
        except Gpt2JaxError as error:
            if last:
                raise
            self.display.line(f"NO checkpoint of step {step}: {error}\nthe run goes on; {self.newest_checkpoint()}")
            return
        self.display.line(f"checkpoint of step {step}: {path}")
        self.attempt(
            lambda: checkpoint.delete_old_checkpoints(
                self.folder,
                step,
                every=run.checkpoint_every,
                keep=run.keep_checkpoints,
                major_every=run.major_checkpoint_every,
            )
        )

    def newest_checkpoint(self) -> str:
        steps = checkpoint.complete_steps(self.folder)
        return f"the newest checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint yet"

    def stop(self, step: int, request: StopRequest) -> None:
        """End the program as a signal asked, with the command that goes on."""
        assert request.signal is not None
        self.display.line(f"stopped by {request.signal.name} after step {step} of {self.steps}; {self.newest_checkpoint()}")
        if checkpoint.complete_steps(self.folder):
            folder = shlex.quote(str(self.folder))
            self.display.line(f"to go on:\npython scripts/train.py --resume --out-dir {folder}")
        request.end_program()

    def log_event(self, event: str, step: int, **values: float | int | str) -> None:
        self.attempt(lambda: self.log.write(event, step, **values))

    def attempt(self, write: Callable[[], object]) -> None:
        """Do what the run can do without; a failure is reported, the same one once."""
        try:
            write()
        except Gpt2JaxError as error:
            if str(error) not in self.failures:
                self.display.line(f"{error}\nthe run goes on without it")
            self.failures.add(str(error))

    def finish(self) -> None:
        plot_path = self.folder / "loss.png"
        self.attempt(lambda: plot_loss(self.log, plot_path, baseline=self.baseline))
        seconds = self.clock.average_seconds
        self.display.line(f"average: {seconds * 1000:.2f} ms a step, {self.config.tokens_per_step / seconds:.0f} tok/s")
        peak, of = memory.measured_peak()
        self.display.line(f"peak memory: {gigabytes(peak)} {of}")
        losses: list[float] = []
        self.attempt(lambda: losses.extend(self.log.finite_values("validation", "loss").values()))
        if self.baseline is not None and losses:
            first, last = losses[0], losses[-1]
            verdict = "below it: more than word frequencies was learned" if last < self.baseline else "not below it yet"
            self.display.line(
                f"validation loss {first:.4f} -> {last:.4f}; unigram cross-entropy {self.baseline:.4f}: {verdict}"
            )
        self.display.line(f"loss curve: {plot_path}\nlog:        {self.log.path}\nrun folder: {self.folder}")


class _StepClock:
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
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        if self._warm_up_seconds is None:
            self._warm_up_seconds = seconds
        else:
            self.averages = self.averages.with_step(seconds, self._tokens_per_step)
        return seconds

    @property
    def average_seconds(self) -> float:
        """Of the steps so far, a resumed run's earlier ones included."""
        if self.averages.steps:
            return self.averages.seconds / self.averages.steps
        return self._warm_up_seconds or 0.0

    @property
    def smoothed_tokens_per_second(self) -> float:
        return self.averages.tokens_per_second or self._tokens_per_step / self.average_seconds


def _not_finite(
    step: int, loss: float, norm: float, squared_norms: np.ndarray, layout: ParameterLayout, places: Sequence[Place]
) -> str:
    names = [tensor.name for tensor, value in zip(layout.tensors, squared_norms, strict=True) if not np.isfinite(value)]
    tensors = "all tensors" if len(names) == len(layout.tensors) else ", ".join(names) or "no single tensor"
    batches = "; ".join(f"{place.path} at token {place.token}" for place in places[:8]) + (" ..." if len(places) > 8 else "")
    return (
        f"step {step}: expected a finite loss and gradient, found a loss of {loss} and a gradient norm of {norm}, not finite "
        f"in {tensors}, for the batch of {batches}"
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _open_loaders(config: RunConfig, model: GPT2Config) -> tuple[TokenLoader, TokenLoader | None]:
    if config.data.sequence_length > model.max_sequence_length:
        raise Gpt2JaxError(
            f"--sequence-length: expected at most the model's {model.max_sequence_length}, found {config.data.sequence_length}",
            f"--sequence-length {model.max_sequence_length}",
        )
    sizes = (config.data.batch_size, config.data.sequence_length)
    overfits = config.data.overfit_one_batch
    train_loader = TokenLoader(
        config.data.validation if overfits else config.data.train,
        *sizes,
        vocab_size=model.vocab_size,
        shuffle=config.data.shuffle and not overfits,
    )
    if config.evaluation.validate_every == 0:
        return train_loader, None
    return train_loader, TokenLoader(config.data.validation, *sizes, vocab_size=model.vocab_size)


def _read_questions(config: RunConfig, model: GPT2Config) -> list[MultipleChoice]:
    path = config.evaluation.hellaswag
    if not path:
        return []
    questions = read_eval_file(path)
    check_questions(questions, path, vocab_size=model.vocab_size, sequence_length=config.data.sequence_length)
    return questions


def _refuse_used_folder(folder: Path) -> None:
    is_used = not os.path.isdir(folder) or os.path.lexists(saved_config_path(folder)) or any(folder.glob("DONE_*"))
    if os.path.lexists(folder) and is_used:
        raise Gpt2JaxError(
            f"--out-dir: expected a new folder, found that {folder} holds a run or is a file",
            f"--resume --out-dir {folder}   (continues the run), or another folder",
        )


def _open_folder(config: RunConfig, name: str) -> Path:
    """Make the run folder and write the resolved settings into it."""
    folder = Path(config.run.out_dir or f"runs/{name}-{datetime.now():%Y%m%d-%H%M%S}")
    try:
        folder.mkdir(parents=True, exist_ok=config.run.out_dir != "")
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        cause = getattr(error, "strerror", None) or error
        raise Gpt2JaxError(f"{folder}: expected to make the run folder, found: {cause}") from None
    with atomic_write(saved_config_path(folder)) as file:
        settled = dataclasses.replace(config, run=dataclasses.replace(config.run, out_dir=str(folder), resume=False))
        file.write(format_config(settled).encode("utf-8"))
    return folder
