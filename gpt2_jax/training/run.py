"""A training run from settings to checkpoints: prepare, then the loop.

Preparing refuses everything that can be refused before anything is written, and compiles the step from shapes before
weights are made, so that the memory a run needs is the compiler's own count.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np

from gpt2_jax.compute import memory
from gpt2_jax.compute.backend import Backend, num_devices, open_device
from gpt2_jax.compute.flops import peak_flops
from gpt2_jax.compute.forward import make_loss_function, make_token_loss_function, of_all_rows, of_own_rows
from gpt2_jax.compute.parallel import own_ranks
from gpt2_jax.compute.plan import Plan, make_plan
from gpt2_jax.compute.step import compile_step, create_state
from gpt2_jax.config import RunConfig, load_saved_config
from gpt2_jax.data.batches import RunData, open_data
from gpt2_jax.data.tokenizer import other_ids, tokenizer_beside
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.evaluate import unigram_cross_entropy
from gpt2_jax.families.family import is_descriptor
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.files import atomic_write, remove_temporaries
from gpt2_jax.llmc.checkpoint_set import complete_steps, newest_step, set_paths
from gpt2_jax.llmc.model_file import read_model_config
from gpt2_jax.llmc.rounding import rounded_to_nearest
from gpt2_jax.llmc.token_shard import checksum
from gpt2_jax.models.weights import load_weights, model_source, read_sizes
from gpt2_jax.processes.group import Group
from gpt2_jax.report.display import Display
from gpt2_jax.report.log import RunLog
from gpt2_jax.report.trackers import check_tracker, open_tracker
from gpt2_jax.training import checkpoint, resume
from gpt2_jax.training.dry_run import dry_run, estimate, share_of_travel, time_step
from gpt2_jax.training.evaluation import start_of_samples, tokenizer_of_run
from gpt2_jax.training.folder import folder_of, open_folder, refuse_used_folder
from gpt2_jax.training.interrupts import StopRequest, stop_requests
from gpt2_jax.training.loop import train_loop
from gpt2_jax.training.origin import origin
from gpt2_jax.training.profiling import steps_to_profile
from gpt2_jax.training.run_lock import locked
from gpt2_jax.training.run_record import Averages
from gpt2_jax.training.run_state import Run, StepClock
from gpt2_jax.training.start_table import start_table

# Within which something must go on where several processes train: so many seconds, or the time of so many steps.
_STUCK_SECONDS, _STUCK_STEPS = 600.0, 20


@dataclass(frozen=True)
class Prepared:
    """A run of which nothing has been written and no weights have been made."""

    config: RunConfig
    plan: Plan
    device: str
    data: RunData
    steps: int
    folder: Path
    resumes_from: int | None  # the step of the checkpoint that it goes on from


def train(config: RunConfig, name: str, backend: Backend, group: Group | None = None) -> Path | None:
    """Train, and return the run folder; None for a dry run. Raises Gpt2JaxError before anything is written for whatever
    can be refused.

    `backend` must have been selected before jax was imported. `name` is used for the folder when none is given. `group` has
    the processes that train together, each of which calls this with the same settings; None: this one is alone.
    """
    group = group or Group()
    with Display() as display:
        with group.agreed():
            prepared = prepare(config, name, backend, display.line, group=group)
        prepared = dataclasses.replace(prepared, folder=Path(group.broadcast(lambda: str(prepared.folder))))
        group.check_same(_facts(prepared))
        config = dataclasses.replace(prepared.config, model=config.model)  # the source of the weights as it was named
        plan, steps = prepared.plan, prepared.steps
        if prepared.resumes_from is not None and prepared.resumes_from >= steps and not config.run.dry_run:
            done = prepared.resumes_from
            display.line(f"nothing to do: {prepared.folder} is at step {done} of {steps}; a larger --steps goes on")
            return prepared.folder
        less = memory.needing_less(plan, config.data.batch_size, config.tokens_per_step)
        batch = config.data.batch_size, config.data.sequence_length
        estimated = memory.estimate(plan, *batch, num_micro_batches=config.num_micro_batches)
        with (
            memory.out_of_memory_explained(estimated, less),
            # A dry run has nothing to save: a signal ends it.
            nullcontext(StopRequest()) if config.run.dry_run else _requests(config, group) as request,
            ExitStack() as stack,
        ):
            with group.agreed():
                compiled = _compile(prepared, display)
            needed = memory.compiled_memory(plan, compiled) or estimated
            display.table(start_table(config, plan, prepared.device, prepared.data, steps, needed, prepared.folder))
            if config.run.dry_run:
                limit = group.broadcast(memory.device_limit)
                dry_run(config, plan, compiled, needed, prepared.data.train.num_tokens, steps, display, limit)
                return None
            with group.agreed():
                memory.check_memory(needed, memory.device_limit(), less)
            if group.number > 1:
                request.hear(max(group.gather(request.wish)))
            seconds = 0.0
            # Before there are weights, so that their memory serves for the step.
            if request.reason is None:
                seconds = time_step(config, plan, compiled)
                display.line(estimate(config, steps - (prepared.resumes_from or 0), seconds))
                if plan.devices > 1:
                    display.line(share_of_travel(config, plan, seconds))
            with group.agreed():
                run = _start(prepared, compiled, display, stack, group)
            group.watch(max(_STUCK_SECONDS, _STUCK_STEPS * seconds))
            train_loop(run, request)
        return prepared.folder


def _requests(config: RunConfig, group: Group) -> AbstractContextManager[StopRequest]:
    """By process 0's clock alone the time of several processes has passed."""
    minutes = config.run.max_minutes if group.is_first else 0.0
    return stop_requests(minutes, waits=group.number > 1)


def prepare(
    config: RunConfig,
    name: str,
    backend: Backend,
    say: Callable[[str], None] = print,
    *,
    group: Group | None = None,
) -> Prepared:
    """Open and check everything that a run needs but its weights; Gpt2JaxError for settings that cannot be met. `say` is
    given a line about the folder's old lock. Of several processes nobody waits for another one here."""
    group = group or Group()
    config.validate()
    check_tracker(config.run.track)
    steps_to_profile(config.run.profile)
    device = open_device(backend, config.compute.devices)
    newest = None
    if config.run.resume:
        resume.check_settings(config)
        if os.path.isdir(config.run.out_dir) and not config.run.dry_run and group.is_first:
            with locked(folder_of(config, name), say):  # an unfinished save of a process that is gone is undone
                pass
        newest = newest_step(config.run.out_dir)
        model = read_model_config(set_paths(config.run.out_dir, newest)[0])
    else:
        if config.run.out_dir and not config.run.dry_run and group.is_first:
            refuse_used_folder(Path(config.run.out_dir))
        init = model_source(config.model.init)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, init=init))
        model = read_sizes(config.model)
    if config.evaluation.sample_every:
        tokenizer = tokenizer_of_run(config.data.train, model.vocab_size)
        start_of_samples(config.evaluation.prompt, model.vocab_size, tokenizer)
    config = _with_devices(config, num_devices(backend, config.compute.devices))
    plan = make_plan(
        config.compute, backend, model, devices=config.num_devices, zero=config.compute.zero, optimizer=config.optimizer
    )
    data = open_data(config, model, own_ranks(plan))
    steps = config.run.steps or data.train.num_tokens // config.tokens_per_step
    if steps < 1:
        raise Gpt2JaxError(
            f"steps: expected data for at least one step of {config.tokens_per_step} tokens, found {data.train.num_tokens}",
            "a smaller --total-batch-size, or --steps to train on the data more than once",
        )
    return Prepared(config, plan, device, data, steps, folder_of(config, name), newest)


def _with_devices(config: RunConfig, devices: int) -> RunConfig:
    """The settings with the number of devices that was found. A resumed run keeps its tokens of a step, whatever its devices
    and --batch-size; Gpt2JaxError where these cannot share them."""
    config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, devices=devices))
    saved = load_saved_config(config.run.out_dir) if config.run.resume else None
    if saved is not None:
        tokens, B, T = saved.tokens_per_step, config.data.batch_size, config.data.sequence_length
        processes = max(1, config.compute.processes)

        def fits(devices: int, batch_size: int) -> bool:
            return tokens % (batch_size * T * processes * devices) == 0

        if not fits(devices, B):
            launched, alone = (f"--processes {processes} ", "--processes 1 ") if processes > 1 else ("", "")
            fewer = [f"{launched}--devices {number}" for number in range(devices, 0, -1) if fits(number, B)]
            smaller = [f"{launched}--devices {devices} --batch-size {n}" for n in range(B, 0, -1) if fits(devices, n)]
            fitting = [*fewer[:1], *smaller[:1]] or [f"{alone}--devices 1 --batch-size {saved.data.batch_size}"]
            raise Gpt2JaxError(
                f"--resume: expected devices and a batch size that share the run's {tokens} tokens of a step, "
                f"found {processes * devices} x {B} x {T}",
                "   or ".join(fitting),
            )
        if config.tokens_per_step != tokens:
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, total_batch_size=tokens))
    if config.compute.processes > 1:  # whose number is not kept with the settings
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, total_batch_size=config.tokens_per_step))
    config.validate()
    return config


def _compile(prepared: Prepared, display: Display) -> jax.stages.Compiled:
    config = prepared.config
    display.line("compiling the training step ...")
    started = time.perf_counter()
    compiled = compile_step(
        prepared.plan,
        config.optimizer,
        prepared.steps,
        config.batch_shape,
        rounds=config.rounds_parameters,
        seed=config.run.seed,
    )
    display.line(f"compiled in {time.perf_counter() - started:.1f} s")
    return compiled


def starting_weights(config: RunConfig, say: Callable[[str], None]) -> tuple[GPT2Config, np.ndarray]:
    """The sizes and the flat buffer (num_parameters,) float32 that a run begins with; `say` as in `load_weights`."""
    sizes, params = load_weights(config.model, config.run.seed, say=say)
    begins_in_bfloat16 = config.compute.dtype == "bfloat16" and is_descriptor(config.model.init)  # as llm.c's build does
    return sizes, rounded_to_nearest(params) if config.rounds_parameters or begins_in_bfloat16 else params


def _hint_after_loss(folder: Path) -> str:
    """How a run goes on of which a process is gone."""
    steps = complete_steps(folder)
    if not steps:
        return "the same command on each   (there is no checkpoint yet)"
    return f"the same command on each, with --resume --out-dir {shlex.quote(str(folder))}   (goes on from step {steps[-1]})"


def _facts(prepared: Prepared) -> dict[str, str]:
    """What all processes must have the same beside their settings: how they compute, their data, and where they begin."""
    shards = {"--train": prepared.data.train.paths}
    if prepared.data.validation is not None:
        shards["--validation"] = prepared.data.validation.paths
    contents = {name: ", ".join(f"{Path(path).name} {checksum(path)}" for path in paths) for name, paths in shards.items()}
    return {
        "--devices": str(prepared.plan.devices // prepared.plan.processes),
        **contents,
        "the questions of --hellaswag": str(len(prepared.data.questions)),
        "the implementations": "; ".join(f"{seam} {choice.name}" for seam, choice in prepared.plan.choices()),
        "steps": str(prepared.steps),
        "the newest checkpoint": str(prepared.resumes_from),
    }


def _start(prepared: Prepared, compiled: jax.stages.Compiled, display: Display, stack: ExitStack, group: Group) -> Run:
    """Make or load the weights, and the folder; the stack undoes at the run's end what has to be undone. Of several processes
    nobody waits for another one here but to find the folder."""
    config, plan, data, folder = prepared.config, prepared.plan, prepared.data, prepared.folder
    computed_by, resumed = resume.computed_by(plan), None
    if prepared.resumes_from is not None:
        display.line(f"loading the checkpoint of step {prepared.resumes_from} ...")
        masters = not config.rounds_parameters
        resumed = checkpoint.load_checkpoint(
            config.run.out_dir,
            prepared.resumes_from,
            master_weights=masters,
            ranks=own_ranks(plan) if plan.zero else None,
            num_ranks=plan.devices,
        )
        params = rounded_to_nearest(resumed.params) if config.rounds_parameters else resumed.params
    else:
        display.line(f"making the weights of {config.model.init} ...")
        params = starting_weights(config, display.line)[1]
    state = create_state(plan, params)
    if resumed is not None:
        state = resume.resumed_state(plan, state, config, resumed, data.train, display, computed_by=computed_by)
    streams = resume.roundings(plan, resumed)
    record = None if resumed is None else resumed.record
    if config.evaluation.sample_every and (
        remark := other_ids(tokenizer_of_run(config.data.train, plan.config.vocab_size), plan.config.vocab_size)
    ):
        display.line(remark)
    stack.enter_context(open_folder(folder, config, display.line, group))
    if group.is_first and (path := tokenizer_beside(config.data.train)) is not None:
        # With the model, so that it can be talked to wherever the folder goes.
        with atomic_write(folder / "tokenizer.bin") as file:
            file.write(path.read_bytes())
    group.before_loss = partial(remove_temporaries, folder, socket.gethostname(), os.getpid())
    group.hint = partial(_hint_after_loss, folder)
    peak = peak_flops(jax.devices()[0].device_kind, plan.dtype, plan.matmul_precision or "default")
    run = Run(
        config=config,
        plan=plan,
        data=data,
        steps=prepared.steps,
        folder=folder,
        display=display,
        log=RunLog(folder / "log.jsonl", config.tokens_per_step, writes=group.is_first),
        group=group,
        computed_by=computed_by,
        peak_flops=None if peak is None else peak * plan.devices,
        compiled=compiled,
        loss_function=of_own_rows(plan, make_loss_function(plan)),
        token_loss_function=of_all_rows(plan, make_token_loss_function(plan)),
        state=state,
        step=0 if resumed is None else resumed.step,
        rounding=streams[0],
        other_roundings=tuple(streams[1:]),
        clock=StepClock(config.tokens_per_step, Averages() if record is None else record.averages),
        best=None if record is None else record.best,
        profiled=steps_to_profile(config.run.profile),
    )
    if run.profiled is not None and 0 < run.step >= run.profiled[0] - 1:
        display.line(f"--profile {config.run.profile}: nothing is traced, as the run goes on after step {run.step}")
    if config.run.track != "none" and group.is_first:
        flat = {f"{group}.{key}": value for group, table in dataclasses.asdict(config).items() for key, value in table.items()}
        run.log.tracker = open_tracker(config.run.track, folder, flat, resumes=resumed is not None)
        stack.callback(run.attempt, run.log.tracker.close)
        display.line(f"tracked by {run.log.tracker.where}")
    run.log_event("start", **origin(prepared.device))
    if data.validation is not None and group.is_first:
        run.baseline = unigram_cross_entropy(data.train.paths, data.validation.paths, plan.config.vocab_size)
        display.line(f"unigram cross-entropy of the validation tokens: {run.baseline:.6f} (knowing only word frequencies)")
    return run
