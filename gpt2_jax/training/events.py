"""The events between steps, in their order: saving, validating, answering questions, sampling."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gpt2_jax.compute.stability import WATCHED
from gpt2_jax.data.tokenizer import gpt2_tokenizer, num_sampled_ids, text_of
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.evaluate import num_right_answers, validation_loss
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.generate import generate, prompt_tokens
from gpt2_jax.jax_compat import on_host
from gpt2_jax.training import checkpoint
from gpt2_jax.training.run_record import RunRecord
from gpt2_jax.training.run_state import Run


@dataclass(frozen=True)
class Event:
    """Something that a run does every so many steps."""

    name: str
    every: int  # steps; 0: not by their number
    run: Callable[[Run], None]
    at_start: bool = False  # before the first step of a fresh run
    at_end: bool = True  # after the last step
    when_stopping: bool = False  # after the step at which a signal ends the run

    def is_due(self, step: int, *, last: bool, stopping: bool) -> bool:
        """Whether it happens after this step."""
        if stopping:
            return self.when_stopping
        return (last and self.at_end) or (self.every > 0 and step % self.every == 0)


def events_of(run: Run) -> list[Event]:
    """The events of a run, in the order in which they happen after a step."""
    evaluation = run.config.evaluation
    events = [Event("save", run.config.run.checkpoint_every, save, when_stopping=True)]
    if run.data.validation is not None:
        events.append(Event("validate", evaluation.validate_every, validate, at_start=True))
    if run.data.questions and evaluation.validate_every:
        events.append(Event("answer questions", evaluation.validate_every, answer_questions))
    if evaluation.sample_every:
        events.append(Event("sample", evaluation.sample_every, sample, at_start=True))
    return events


def save(run: Run) -> None:
    """Write a checkpoint and delete those that need not be kept. What cannot be written is reported, and the run goes on;
    but Gpt2JaxError if there is no later step to save."""
    state, config = run.state, run.config
    assert isinstance(run.plan.config, GPT2Config)  # llm.c's files are of GPT-2s
    record = RunRecord(
        batch_size=config.data.batch_size,
        sequence_length=config.data.sequence_length,
        dtype=config.compute.dtype,
        computed_by=run.computed_by,
        windows=dict(zip(WATCHED, np.asarray(state.windows), strict=True)),
        averages=run.clock.averages,
        settings=dataclasses.asdict(config),
        plan=tuple(run.plan.rows()),
    )
    saved = checkpoint.Checkpoint(
        model=run.plan.config,
        params=on_host(state.params),
        m=on_host(state.optimizer.m),
        v=on_host(state.optimizer.v),
        step=run.step,
        loader=run.data.train.state(),
        dtype=config.compute.dtype,
        master_weights=config.optimizer.master_weights,
        rounding=run.rounding,
        record=record,
    )
    try:
        path = checkpoint.save_checkpoint(run.folder, saved)
    except Gpt2JaxError as error:
        if run.step == run.steps:
            raise
        run.display.line(f"NO checkpoint of step {run.step}: {error}\nthe run goes on; {run.newest_checkpoint()}")
        return
    run.display.line(f"checkpoint of step {run.step}: {path}")
    every, keep, major = config.run.checkpoint_every, config.run.keep_checkpoints, config.run.major_checkpoint_every
    run.attempt(lambda: checkpoint.delete_old_checkpoints(run.folder, run.step, every=every, keep=keep, major_every=major))


def validate(run: Run) -> None:
    """The mean loss of the validation batches."""
    assert run.data.validation is not None
    data, batches = run.config.data, run.config.evaluation.validation_batches
    if batches == -1:  # llm.c's count: dropped tails are counted, and made up for by the first batches
        batches = run.data.validation.num_tokens // (data.batch_size * data.sequence_length)
    run.display.line(f"validating on {batches} batches ...")
    loss = validation_loss(run.loss_function, run.state.params, run.data.validation, batches)
    run.display.line(f"validation loss at step {run.step}: {loss:.6f}")
    run.log_event("validation", loss=loss)


def answer_questions(run: Run) -> None:
    """HellaSwag's accuracy."""
    questions, total = run.data.questions, len(run.data.questions)
    run.display.line(f"scoring {total} HellaSwag questions ...")
    right = num_right_answers(run.token_loss_function, run.state.params, questions, run.config.data.batch_size)
    run.display.line(f"HellaSwag at step {run.step}: {right}/{total} = {right / total:.6f}")
    run.log_event("hellaswag", right=right, total=total, accuracy=right / total)


def sample(run: Run) -> None:
    """A text that the model continues, chosen as llm.c does."""
    tokenizer, vocab_size, prompt = gpt2_tokenizer(), run.plan.config.vocab_size, run.config.evaluation.prompt
    start, choices = start_of_samples(prompt, vocab_size), num_sampled_ids(tokenizer, vocab_size)
    tokens = list(generate(run.plan, run.state.params, start, run.config.evaluation.sample_tokens, num_choices=choices))
    run.display.line(f"sample at step {run.step}:\n---")
    if vocab_size >= tokenizer.n_vocab:
        text = prompt + b"".join(text_of(tokenizer, token) for token in tokens).decode(errors="replace")
    else:  # of another vocabulary only the ids can be shown
        text = " ".join(map(str, tokens))
    run.display.line(f"{text}\n---")
    run.log_event("sample", text=text)


def start_of_samples(prompt: str, vocab_size: int) -> list[int]:
    """The ids that samples continue; without a prompt llm.c's, the end-of-text token.

    A model of fewer tokens than GPT-2's has another vocabulary, whose last id is taken for that token; Gpt2JaxError for
    a prompt to it.
    """
    tokenizer = gpt2_tokenizer()
    if vocab_size >= tokenizer.n_vocab:
        return prompt_tokens(prompt, tokenizer)
    if prompt:
        raise Gpt2JaxError(
            f"--prompt: expected none for a model of {vocab_size} tokens, which are not GPT-2's {tokenizer.n_vocab}, "
            f"found {prompt!r}",
            "--prompt ''",
        )
    return [vocab_size - 1]
