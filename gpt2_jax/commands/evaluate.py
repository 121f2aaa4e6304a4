"""How good a model is: its loss on texts and shards, HellaSwag's questions, LAMBADA's last words. Prints one JSON line.

python scripts/evaluate.py runs/latest --shards data/kjv_val.bin
python scripts/evaluate.py gpt2 --text my_book.txt --stride 512
python scripts/evaluate.py runs/NAME --hellaswag data/hellaswag_val.bin --lambada lambada_test_en.jsonl

The line is on standard output, progress and what it means on standard error. For any other benchmark convert the model to a
Hugging Face folder and give that to lm-evaluation-harness:

python scripts/convert.py runs/NAME gpt2-mine
"""

from __future__ import annotations

import glob
import json
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from gpt2_jax.commands.command_line import parse
from gpt2_jax.compute.backend import select_backend
from gpt2_jax.config import BackendName
from gpt2_jax.errors import Gpt2JaxError, announce
from gpt2_jax.files import FilePath
from gpt2_jax.names import near

if TYPE_CHECKING:
    import numpy as np

    from gpt2_jax.api import Model

Task = Callable[[], dict[str, Any]]  # computes what the record says of it
_TASKS = ("text", "shards", "hellaswag", "lambada")


@dataclass(frozen=True)
class Arguments:
    checkpoint: Annotated[FilePath, tyro.conf.Positional]
    """A run folder (its newest complete checkpoint), a llm.c model file, a Hugging Face GPT-2 folder, a model of the hub, or
    nanoGPT's ckpt.pt."""
    step: int | None = None
    """Of a run folder the checkpoint of this step instead."""
    text: FilePath | None = None
    """Loss, perplexity and bits per byte of a text: whatever prepare takes as --source (a file of text, JSON Lines or Parquet,
    a folder, a glob, - for standard input, hf:OWNER/NAME)."""
    text_field: str = "text"
    """Name of the text in JSON Lines and in Parquet."""
    shards: FilePath | None = None
    """The same of token shards: a path or a glob."""
    hellaswag: FilePath | None = None
    """HellaSwag's accuracy, by llm.c's rule: its hellaswag_val.bin, or HellaSwag's own hellaswag_val.jsonl."""
    lambada: FilePath | None = None
    """LAMBADA's accuracy and perplexity of last words: JSON Lines of {"text": ...}."""
    tokens: int | None = None
    """Of --text and of --shards take the first so many tokens only; default: all."""
    sequence_length: int | None = None
    """Tokens that a window of a text has; default: the model's positions."""
    stride: int | None = None
    """Tokens from the beginning of a window to that of the next; the fewer, the more context each token has. Default: half
    of a window."""
    batch_size: int = 4
    """Windows, passages or endings that are computed together."""
    tokenizer: FilePath | None = None
    """A llm.c tokenizer file; by default the tokenizer.bin beside the model file, else GPT-2's own vocabulary."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of products and activations."""
    backend: BackendName = "auto"
    """Where the forward pass is computed."""

    def validate(self) -> None:
        if not any(getattr(self, task) for task in _TASKS):
            flags = ", ".join(f"--{task}" for task in _TASKS)
            raise Gpt2JaxError(f"evaluate: expected at least one of {flags}, found none", "--text FILE")
        for name in ("tokens", "sequence_length", "stride", "batch_size"):
            lowest = 2 if name == "tokens" else 1
            if (value := getattr(self, name)) is not None and value < lowest:
                flag = f"--{name.replace('_', '-')}"
                raise Gpt2JaxError(f"{flag}: expected at least {lowest}, found {value}", f"{flag} {max(lowest, 4)}")


def main(words: list[str]) -> None:
    arguments = parse(Arguments, __doc__, words)
    arguments.validate()
    backend = select_backend(arguments.backend)  # before anything imports jax

    from gpt2_jax.api import load

    model = load(
        arguments.checkpoint, step=arguments.step, tokenizer=arguments.tokenizer, dtype=arguments.dtype, backend=backend
    )
    record: dict[str, Any] = {"model": model.source, "dtype": arguments.dtype}
    # Everything is opened before anything is computed, which may take hours.
    tasks = {
        name: prepare(model, arguments)
        for name, prepare in (("text", _text), ("shards", _shards), ("hellaswag", _hellaswag), ("lambada", _lambada))
        if getattr(arguments, name)
    }
    for name, task in tasks.items():
        record[name] = {"source": getattr(arguments, name), **task()}
        shown = ", ".join(f"{key} {_short(value)}" for key, value in record[name].items())
        announce(f"{name}: {shown}")
    # JSON has no infinity.
    print(json.dumps(_without_infinities(record), allow_nan=False), flush=True)


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _without_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinities(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Each of these opens what it reads, refuses what can be refused, and returns what computes.


def _text(model: Model, arguments: Arguments) -> Task:
    from gpt2_jax.data.prepare import tokens_of_source
    from gpt2_jax.data.sources import open_source

    source = open_source(str(arguments.text), arguments.text_field)
    tokens = tokens_of_source(source, model.tokenizer, arguments.tokens)
    if len(tokens) < 2:
        raise Gpt2JaxError(f"--text: expected at least a token of text, found none in {arguments.text}")
    return partial(_losses, model, arguments, "--text", [tokens])


def _shards(model: Model, arguments: Arguments) -> Task:
    from gpt2_jax.llmc.token_shard import hint_for, open_token_shard

    pattern = str(arguments.shards)
    paths = [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern))
    if not paths:
        raise Gpt2JaxError(
            f"--shards: expected at least one token shard, found no file of that name or pattern{near(pattern)}",
            hint_for(pattern),
        )
    tokens, left = [], math.inf if arguments.tokens is None else arguments.tokens
    for shard in map(open_token_shard, paths):
        if left >= 2:
            tokens.append(shard[: int(min(left, len(shard)))])
        left -= len(shard)
    return partial(_losses, model, arguments, "--shards", [each for each in tokens if len(each) >= 2])


def _losses(model: Model, arguments: Arguments, flag: str, texts: list[np.ndarray]) -> dict[str, Any]:
    """The loss of texts, each for itself, and of all together."""
    from gpt2_jax.evaluate import TextLoss, num_windows

    length, stride = model.window(max(map(len, texts)), arguments.sequence_length, arguments.stride)
    batches = sum(-(-num_windows(len(text), length, stride) // arguments.batch_size) for text in texts)
    loss = TextLoss(0.0, 0, 0)
    with _progress(f"{flag[2:]}: batch", batches) as advance:
        for text in texts:
            loss += model.evaluate(
                text, sequence_length=length, stride=stride, batch_size=arguments.batch_size, before_batch=advance
            )
    return {
        "loss": loss.loss,
        "perplexity": loss.perplexity,
        "bits_per_byte": loss.bits_per_byte,
        "tokens": loss.num_tokens,
        "bytes": loss.num_bytes,
        "sequence_length": length,
        "stride": stride,
    }


def _hellaswag(model: Model, arguments: Arguments) -> Task:
    from gpt2_jax.data.hellaswag import read_hellaswag
    from gpt2_jax.data.tokenizer import gpt2_tokenizer, token_bytes
    from gpt2_jax.evaluate import num_batches_of, num_right_answers
    from gpt2_jax.llmc.eval_file import check_questions, read_eval_file

    path, tokenizer = str(arguments.hellaswag), gpt2_tokenizer()
    if model.tokenizer is not tokenizer and token_bytes(model.tokenizer) != token_bytes(tokenizer):
        found = f"one of {model.tokenizer.n_vocab} tokens of its own"
        raise Gpt2JaxError(f"--hellaswag: expected a model with GPT-2's vocabulary, found {found}", "leave --hellaswag out")
    questions = read_hellaswag(path) if Path(path).suffix == ".jsonl" else read_eval_file(path)
    config = model.config
    check_questions(
        questions,
        path,
        vocab_size=config.vocab_size,
        sequence_length=config.max_sequence_length + 1,
        hint="a model with more positions, or leave --hellaswag out",
    )

    def score() -> dict[str, Any]:
        with _progress("hellaswag: batch", num_batches_of(len(questions), arguments.batch_size)) as advance:
            right = num_right_answers(model.token_losses, model.params, questions, arguments.batch_size, before_batch=advance)
        return {"accuracy": right / len(questions), "right": right, "questions": len(questions)}

    return score


def _lambada(model: Model, arguments: Arguments) -> Task:
    from gpt2_jax.compute.forward import target_scores
    from gpt2_jax.data.lambada import read_last_words
    from gpt2_jax.data.tokenizer import refuse_larger_vocabulary
    from gpt2_jax.evaluate import last_words

    longest = model.config.max_sequence_length
    refuse_larger_vocabulary(model.tokenizer, model.config.vocab_size)
    passages = read_last_words(str(arguments.lambada), model.tokenizer, longest)

    def score() -> dict[str, Any]:
        with _progress("lambada: batch", -(-len(passages) // arguments.batch_size)) as advance:
            found = last_words(
                partial(target_scores, model.plan),
                model.params,
                passages,
                arguments.batch_size,
                longest=longest,
                before_batch=advance,
            )
        return {
            "accuracy": found.accuracy,
            "perplexity": found.perplexity,
            "right": found.num_right,
            "passages": found.num_words,
        }

    return score


def _progress(what: str, total: int) -> AbstractContextManager[Callable[[], None]]:
    from rich.console import Console

    from gpt2_jax.report.progress import counted_progress

    return counted_progress(what, total, Console(stderr=True, highlight=False, soft_wrap=True))
