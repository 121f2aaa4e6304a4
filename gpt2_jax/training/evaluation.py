"""What a run evaluates between steps: validation loss, HellaSwag's questions, a sample. Each gives way to a run's stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import tiktoken

from gpt2_jax.data.tokenizer import gpt2_tokenizer, num_sampled_ids, text_of, tokenizer_beside, tokenizer_from_file
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.evaluate import num_batches_of, num_right_answers, validation_loss
from gpt2_jax.generate import generate, prompt_tokens
from gpt2_jax.training.run_state import Run
from gpt2_jax.training.saving import keep_best
from gpt2_jax.training.summary import draw_in_a_while


def validate(run: Run) -> None:
    """The mean loss of the validation batches."""
    assert run.data.validation is not None
    data, batches = run.config.data, run.config.evaluation.validation_batches
    if batches == -1:  # llm.c's count: dropped tails are counted, and made up for by the first batches
        batches = run.data.validation.num_tokens // (run.config.num_devices * data.batch_size * data.sequence_length)
    run.display.line(f"validating on {batches} batches ...")
    with _counted(run, "validating: batch", batches) as before_batch:
        loss = validation_loss(run.loss_function, run.whole_params(), run.data.validation, batches, before_batch=before_batch)
    run.display.line(f"validation loss at step {run.step}: {loss:.6f}")
    run.log_event("validation", loss=loss)
    keep_best(run, loss)
    draw_in_a_while(run)


def answer_questions(run: Run) -> None:
    """HellaSwag's accuracy."""
    questions, total = run.data.questions, len(run.data.questions)
    run.display.line(f"scoring {total} HellaSwag questions ...")
    batch_size, devices, params = run.config.data.batch_size, run.config.num_devices, run.whole_params()
    with _counted(run, "HellaSwag: batch", num_batches_of(total, batch_size, devices)) as before_batch:
        right = num_right_answers(
            run.token_loss_function, params, questions, batch_size, num_devices=devices, before_batch=before_batch
        )
    run.display.line(f"HellaSwag at step {run.step}: {right}/{total} = {right / total:.6f}")
    run.log_event("hellaswag", right=right, total=total, accuracy=right / total)


def sample(run: Run) -> None:
    """A text that the model continues, chosen as llm.c does."""
    vocab_size, prompt = run.plan.config.vocab_size, run.config.evaluation.prompt
    tokenizer = tokenizer_of_run(run.config.data.train, vocab_size)
    start, choices = start_of_samples(prompt, vocab_size, tokenizer), num_sampled_ids(tokenizer, vocab_size)
    tokens, number = [], run.config.evaluation.sample_tokens
    with _counted(run, "sampling: token", number) as before_token:
        for token in generate(run.plan, run.params_of_one_device(), start, number, num_choices=choices):
            before_token()
            tokens.append(token)
    run.display.line(f"sample at step {run.step}:\n---")
    if vocab_size >= tokenizer.n_vocab:
        text = prompt + b"".join(text_of(tokenizer, token) for token in tokens).decode(errors="replace")
    else:  # of another vocabulary only the ids can be shown
        text = " ".join(map(str, tokens))
    run.display.line(f"{text}\n---")
    run.log_event("sample", text=text)


@contextmanager
def _counted(run: Run, what: str, total: int) -> Iterator[Callable[[], None]]:
    """Yield what is to be called before each part of a long task: it counts them, and gives way when the run is to stop."""
    with run.display.counted(what, total) as advance:

        def before_part() -> None:
            run.give_way()
            advance()

        yield before_part


def tokenizer_of_run(train: str, vocab_size: int) -> tiktoken.Encoding:
    """The tokenizer of a run on these shards: that of the file beside them, which must have the model's number of tokens, else
    GPT-2's."""
    path = tokenizer_beside(train)
    if path is None:
        return gpt2_tokenizer()
    tokenizer = tokenizer_from_file(path)
    if tokenizer.n_vocab != vocab_size:
        raise Gpt2JaxError(
            f"--vocab-size: expected {tokenizer.n_vocab}, the tokens of {path}, found {vocab_size}",
            f"--vocab-size {tokenizer.n_vocab}",
        )
    return tokenizer


def start_of_samples(prompt: str, vocab_size: int, tokenizer: tiktoken.Encoding) -> list[int]:
    """The ids that samples continue; without a prompt llm.c's, the end-of-text token.

    A model of fewer tokens than the tokenizer's has another vocabulary, whose last id is taken for that token; Gpt2JaxError
    for a prompt to it.
    """
    if vocab_size >= tokenizer.n_vocab:
        return prompt_tokens(prompt, tokenizer)
    if prompt:
        raise Gpt2JaxError(
            f"--prompt: expected none for a model of {vocab_size} tokens, which are not GPT-2's {tokenizer.n_vocab}, "
            f"found {prompt!r}",
            "--prompt ''",
        )
    return [vocab_size - 1]
