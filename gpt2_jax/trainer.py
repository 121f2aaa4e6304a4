"""A training run from settings to checkpoints: data in, steps, and what happens around them.

Metrics are read one step late, while the next step is computing, so that the device never waits for the display.
"""

from __future__ import annotations

import dataclasses
import math
import time
from datetime import datetime
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax import checkpoint, memory
from gpt2_jax.backend import Backend, open_device
from gpt2_jax.config import RunConfig, format_config, load_config, saved_config_path
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.evaluate import make_loss_function, unigram_cross_entropy, validation_loss
from gpt2_jax.generate import generate, prompt_tokens
from gpt2_jax.layout import ModelConfig, ParameterLayout
from gpt2_jax.llmc.header import atomic_write
from gpt2_jax.llmc.loader import TokenLoader
from gpt2_jax.matmul import Choice, choose_implementation, precision_of
from gpt2_jax.optimizer import AdamWState, adamw, learning_rate_schedule
from gpt2_jax.report import Display, RunLog, plot_loss
from gpt2_jax.tokenizer import gpt2_tokenizer
from gpt2_jax.train_step import Metrics, TrainState, create_state, make_train_step
from gpt2_jax.weights import load_weights


def train(config: RunConfig, name: str, backend: Backend) -> Path:
    """Train, and return the run folder. Raises Gpt2JaxError before anything is written for whatever can be refused.

    `backend` must have been selected before jax was imported. `name` is used for the folder when none is given.
    """
    config.validate()
    if config.compute.matmul_precision == "highest":
        jax.config.update("jax_default_matmul_precision", "highest")
    display = Display()
    device = open_device(backend)
    matmul = choose_implementation(config.compute.matmul, backend, config.compute.dtype)

    resumed = None
    if config.run.resume:
        _check_resumable(config)
        newest = checkpoint.newest_step(config.run.out_dir)
        display.line(f"loading the checkpoint of step {newest} ...")
        resumed = checkpoint.load_checkpoint(config.run.out_dir, newest)
        model, params = resumed.model, resumed.params
    else:
        if config.run.out_dir:
            _refuse_used_folder(Path(config.run.out_dir))
        display.line(f"making the weights of {config.model.init} ...")
        model, params = load_weights(config.model)
    layout = ParameterLayout(model)
    train_loader, validation_loader = _open_loaders(config, model)
    steps = config.run.steps or train_loader.num_tokens // config.tokens_per_step
    if steps < 1:
        raise Gpt2JaxError(
            f"steps: expected data for at least one step of {config.tokens_per_step} tokens, found {train_loader.num_tokens}",
            "a smaller --total-batch-size, or --steps to train on the data more than once",
        )

    schedule = learning_rate_schedule(
        config.optimizer.schedule,
        config.optimizer.learning_rate,
        steps=steps,
        warmup_steps=config.optimizer.warmup_steps,
        final_fraction=config.optimizer.final_learning_rate_fraction,
    )
    optimizer = adamw(schedule, layout, weight_decay=config.optimizer.weight_decay, custom_call=matmul.name != "xla")
    if resumed is None:
        state = create_state(params, optimizer, matmul=matmul.name)
    else:
        train_loader.restore(resumed.loader)
        moments = AdamWState(jnp.array(resumed.step, jnp.int32), jnp.array(resumed.m), jnp.array(resumed.v))
        state = dataclasses.replace(create_state(resumed.params, optimizer, matmul=matmul.name), optimizer=moments)
    first_step = 1 if resumed is None else resumed.step + 1
    del params, resumed

    folder = _open_folder(config, name)
    run = _Run(config, folder, layout, steps, train_loader, validation_loader, matmul.name, display)
    with display:
        display.table(_start_table(config, backend, device, matmul, layout, steps, train_loader, validation_loader, folder))
        if first_step > steps:
            display.line(f"nothing to do: {folder} is at step {first_step - 1} of {steps}; a larger --steps goes on")
            return folder
        step_function = make_train_step(
            layout,
            optimizer,
            schedule,
            dtype=jnp.dtype(config.compute.dtype),
            matmul=matmul.name,
            donate=backend.donates,
            loops=backend.loops,
        )
        run.train(state, step_function, first_step)
    return folder


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
        matmul: str,
        display: Display,
    ):
        self.config, self.folder, self.layout, self.steps = config, folder, layout, steps
        self.train_loader, self.validation_loader = train_loader, validation_loader
        self.dtype, self.matmul = jnp.dtype(config.compute.dtype), matmul
        self.display = display
        self.log = RunLog(folder / "log.jsonl")
        self.loss_function = make_loss_function(layout, dtype=self.dtype, matmul=self.matmul)
        self.baseline: float | None = None

    def train(self, state: TrainState, step_function: jax.stages.Wrapped, first_step: int) -> None:
        if self.validation_loader is not None:
            self.baseline = unigram_cross_entropy(
                self.train_loader.paths, self.validation_loader.paths, self.layout.config.vocab_size
            )
            self.display.line(
                f"unigram cross-entropy of the validation tokens: {self.baseline:.6f} (knowing only word frequencies)"
            )
        if first_step == 1:
            self.validate(0, state)
            self.sample(0, state)
        self.display.line("compiling the training step ...")
        started = time.perf_counter()
        x_ABT, y_ABT = self.next_batch()
        compiled = step_function.lower(state, x_ABT, y_ABT).compile()
        needed = memory.compiled_bytes(compiled)
        self.display.line(
            f"compiled in {time.perf_counter() - started:.1f} s"
            + ("" if needed is None else f"; the step has {memory.gigabytes(needed)} of memory")
        )

        in_flight: tuple[int, Metrics] | None = None
        clock = _StepClock(self.config.tokens_per_step)
        for step in range(first_step, self.steps + 1):
            state, metrics = compiled(state, x_ABT, y_ABT)
            if in_flight is not None:
                self.report(*in_flight, clock)
            in_flight = (step, metrics)
            last = step == self.steps
            validates = self.validation_loader is not None and (last or step % self.config.evaluation.validate_every == 0)
            samples = _due(step, self.config.evaluation.sample_every) or (last and self.config.evaluation.sample_every > 0)
            saves = last or _due(step, self.config.run.checkpoint_every)
            if validates or samples or saves:
                self.report(*in_flight, clock)
                in_flight = None
                if saves:
                    self.save(step, state)
                if validates:
                    self.validate(step, state)
                if samples:
                    self.sample(step, state)
                clock.restart()
            if not last:
                x_ABT, y_ABT = self.next_batch()
        self.finish(clock)

    def next_batch(self) -> tuple[np.ndarray, np.ndarray]:
        """The next step's micro-batches, inputs and targets, (A, B, T) int32 each."""
        batches = [self.train_loader.next_batch() for _ in range(self.config.num_micro_batches)]
        return np.stack([x for x, _ in batches]), np.stack([y for _, y in batches])

    def report(self, step: int, metrics: Metrics, clock: _StepClock) -> None:
        """Wait for a step's metrics, show and log them. Gpt2JaxError for a loss or norm that is not finite."""
        loss, norm, learning_rate = (float(value) for value in (metrics.loss, metrics.gradient_norm, metrics.learning_rate))
        seconds = clock.step_done()
        tokens_per_second = self.config.tokens_per_step / seconds
        self.display.step(
            step,
            self.steps,
            loss=loss,
            norm=norm,
            learning_rate=learning_rate,
            seconds=seconds,
            tokens_per_second=tokens_per_second,
        )
        self.log.write(
            "train", step, loss=loss, norm=norm, lr=learning_rate, seconds=seconds, tokens_per_second=tokens_per_second
        )
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Gpt2JaxError(
                f"step {step}: expected a finite loss and gradient norm, found {loss} and {norm}; nothing was saved from it on",
                f"a lower --learning-rate, or --resume --out-dir {self.folder} from the newest checkpoint",
            )

    def validate(self, step: int, state: TrainState) -> None:
        if self.validation_loader is None:
            return
        batches = self.validation_loader.num_batches
        if self.config.evaluation.validation_batches != -1:
            batches = min(batches, self.config.evaluation.validation_batches)
        self.display.line(f"validating on {batches} batches ...")
        loss = validation_loss(self.loss_function, state.params, self.validation_loader, batches)
        self.display.line(f"validation loss at step {step}: {loss:.6f}")
        self.log.write("validation", step, loss=loss)

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
        self.log.write("sample", step, text=text)

    def save(self, step: int, state: TrainState) -> None:
        params, m, v = (np.asarray(buffer) for buffer in (state.params, state.optimizer.m, state.optimizer.v))
        saved = checkpoint.Checkpoint(self.layout.config, params, m, v, step, self.train_loader.state())
        path = checkpoint.save_checkpoint(self.folder, saved)
        self.display.line(f"checkpoint of step {step}: {path}")

    def finish(self, clock: _StepClock) -> None:
        plot_path = self.folder / "loss.png"
        plot_loss(self.log, plot_path, baseline=self.baseline)
        self.display.line(f"average: {clock.average_seconds * 1000:.2f} ms a step, {clock.tokens_per_second:.0f} tok/s")
        peak, of = memory.measured_peak()
        self.display.line(f"peak memory: {memory.gigabytes(peak)} {of}")
        validations = self.log.records("validation")
        if self.baseline is not None and validations:
            first, last = validations[0]["loss"], validations[-1]["loss"]
            verdict = "below it: more than word frequencies was learned" if last < self.baseline else "not below it yet"
            self.display.line(
                f"validation loss {first:.4f} -> {last:.4f}; unigram cross-entropy {self.baseline:.4f}: {verdict}"
            )
        self.display.line(f"loss curve: {plot_path}\nlog:        {self.log.path}\nrun folder: {self.folder}")


class _StepClock:
    """Seconds from one step's end to the next; what happens between two segments (validation, checkpoints) is left out.

    The first step of a run is left out of the average, as it includes warming up.
    """

    def __init__(self, tokens_per_step: int):
        self._tokens_per_step = tokens_per_step
        self._seconds: list[float] = []
        self.restart()

    def restart(self) -> None:
        self._last = time.perf_counter()

    def step_done(self) -> float:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._seconds.append(seconds)
        return seconds

    @property
    def average_seconds(self) -> float:
        return float(np.mean(self._seconds[1:] or self._seconds))

    @property
    def tokens_per_second(self) -> float:
        return self._tokens_per_step / self.average_seconds


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _open_loaders(config: RunConfig, model: ModelConfig) -> tuple[TokenLoader, TokenLoader | None]:
    if config.data.sequence_length > model.max_sequence_length:
        raise Gpt2JaxError(
            f"--sequence-length: expected at most the model's {model.max_sequence_length}, found {config.data.sequence_length}",
            f"--sequence-length {model.max_sequence_length}",
        )
    sizes = (config.data.batch_size, config.data.sequence_length)
    train_loader = TokenLoader(config.data.train, *sizes, vocab_size=model.vocab_size, shuffle=config.data.shuffle)
    if config.evaluation.validate_every == 0:
        return train_loader, None
    return train_loader, TokenLoader(config.data.validation, *sizes, vocab_size=model.vocab_size)


def _refuse_used_folder(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or saved_config_path(folder).exists() or any(folder.glob("DONE_*"))):
        raise Gpt2JaxError(
            f"--out-dir: expected a new folder, found that {folder} holds a run or is a file",
            f"--resume --out-dir {folder}   (continues the run), or another folder",
        )


def _check_resumable(config: RunConfig) -> None:
    """The model and the data of a run cannot change under it."""
    saved = load_config(saved_config_path(config.run.out_dir))
    for section in ("model", "data"):
        before, now = dataclasses.asdict(getattr(saved, section)), dataclasses.asdict(getattr(config, section))
        for key, value in now.items():
            if value != before[key]:
                raise Gpt2JaxError(
                    f"--resume: expected the run's {section}.{key} = {before[key]!r}, found {value!r}",
                    "leave it out: a resumed run takes its settings from its folder",
                )


def _open_folder(config: RunConfig, name: str) -> Path:
    """Make the run folder and write the resolved settings into it."""
    folder = Path(config.run.out_dir or f"runs/{name}-{datetime.now():%Y%m%d-%H%M%S}")
    try:
        folder.mkdir(parents=True, exist_ok=config.run.out_dir != "")
    except OSError as error:
        raise Gpt2JaxError(f"{folder}: expected to make the run folder, found: {error.strerror}") from None
    with atomic_write(saved_config_path(folder)) as file:
        settled = dataclasses.replace(config, run=dataclasses.replace(config.run, out_dir=str(folder), resume=False))
        file.write(format_config(settled).encode("utf-8"))
    return folder


def _start_table(
    config: RunConfig,
    backend: Backend,
    device: str,
    matmul: Choice,
    layout: ParameterLayout,
    steps: int,
    train_loader: TokenLoader,
    validation_loader: TokenLoader | None,
    folder: Path,
) -> list[tuple[str, object]]:
    model, optimizer = layout.config, config.optimizer
    sizes = (
        f"{model.num_layers} layers, {model.num_heads} heads, {model.channels} channels, "
        f"{model.vocab_size} tokens (padded to {model.padded_vocab_size}), {model.max_sequence_length} positions"
    )
    micro_batches = f"{config.num_micro_batches} x {config.data.batch_size} x {config.data.sequence_length}"
    batch = f"{micro_batches} = {config.tokens_per_step:,} tokens a step"
    needed = memory.estimate(
        layout,
        config.data.batch_size,
        config.data.sequence_length,
        config.compute.dtype,
        gradient_buffers=2 if config.num_micro_batches > 1 and matmul.name == "xla" else 1,
    )
    rate = (
        f"{optimizer.schedule}, peak {optimizer.learning_rate:g}, {optimizer.warmup_steps} warmup steps, "
        f"ends at {optimizer.final_learning_rate_fraction:g} of it; weight decay {optimizer.weight_decay:g}"
    )
    rows: list[tuple[str, object]] = [
        ("backend", f"{backend.name}: {backend.reason}"),
        ("device", device),
        *(("environment", f"{name}={value}, set for {backend.plugin}") for name, value in backend.environment),
        ("compute", f"{config.compute.dtype}, matmul precision {config.compute.matmul_precision}, jax {jax.__version__}"),
        ("matmul", f"{matmul.name} in {precision_of(matmul.name, jnp.dtype(config.compute.dtype))}: {matmul.reason}"),
    ]
    for reason in dict.fromkeys(matmul.refusals.values()):
        refused = ", ".join(name for name, why in matmul.refusals.items() if why == reason)
        rows.append(("", f"not {refused}: {reason}"))
    order = "shuffled" if config.data.shuffle else "in order"
    rows += [
        ("weights", config.model.init if not config.run.resume else f"resumed from {folder}"),
        ("model", sizes),
        ("parameters", f"{layout.num_parameters:,} with padding, {layout.num_true_parameters:,} without"),
        ("training data", f"{config.data.train}: {train_loader.num_tokens:,} tokens, {order}"),
    ]
    if validation_loader is not None:
        rows.append(("validation data", f"{config.data.validation}: {validation_loader.num_tokens:,} tokens"))
    rows += [
        ("batch", batch),
        ("memory", f"{needed} expected in a step"),
        ("steps", f"{steps} ({steps * config.tokens_per_step / train_loader.num_tokens:.2f} epochs)"),
        ("learning rate", rate),
        ("run folder", folder),
    ]
    return rows
