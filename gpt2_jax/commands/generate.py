"""Continue texts with a trained model, streaming to the terminal.

python scripts/generate.py runs/latest --prompt "In the beginning"
python scripts/generate.py runs/NAME --step 300 --num-samples 4 --json
python scripts/generate.py runs/latest --prompt-file prompts.jsonl --stop "." --top-p 0.9 --top-k 0
python scripts/generate.py runs/latest --interactive

Standard output has the text, or with --json one line for each sample. How fast it was goes to standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from gpt2_jax.commands.command_line import parse
from gpt2_jax.compute.backend import select_backend
from gpt2_jax.config import BackendName
from gpt2_jax.errors import Gpt2JaxError, announce, as_typed
from gpt2_jax.files import FilePath, decoded_blocks, json_lines, read_text_file
from gpt2_jax.output import without_controls

if TYPE_CHECKING:
    from gpt2_jax.api import Model
    from gpt2_jax.generate import Sample, Speed

_MAX_BYTES = 16_000_000  # of a file of prompts
_STANDARD_INPUT = "standard input"


@dataclass(frozen=True)
class Arguments:
    checkpoint: Annotated[FilePath, tyro.conf.Positional]
    """A run folder (its newest complete checkpoint), a llm.c model file, a Hugging Face GPT-2 folder, a model of the hub, or
    nanoGPT's ckpt.pt."""
    step: int | None = None
    """Of a run folder the checkpoint of this step instead."""
    prompt: str = ""
    """Text to continue; empty: begin a document. <|endoftext|> in it ends a document and begins the next, as in the texts
    of prepare. Of a prompt longer than its positions the model sees the end."""
    prompt_file: FilePath | None = None
    """A file that is the prompt, but for the line feed at its end, or - for standard input. Each line of a file
    NAME.jsonl is an object with a prompt of its own: {"prompt": "In the beginning"}."""
    interactive: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Ask for a prompt, continue it, and ask again. Ctrl-C ends a text, Ctrl-D the program."""
    max_tokens: int = 256
    """Tokens to generate; the end of the document stops earlier."""
    num_samples: int = 1
    """Texts for each prompt, computed together; the first has the seed --seed, the second the next one, and so on."""
    stop: tuple[str, ...] = ()
    """A text ends in front of the first of these strings."""
    temperature: float = 0.8
    """Below 1: safer, above: wilder; 1: the model's own probabilities; 0: always the likeliest token."""
    top_k: int = 50
    """Choose among the k likeliest tokens only; 0: among all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens whose probabilities first reach this sum; 1: among all."""
    min_p: float = 0.0
    """Leave out tokens below this fraction of the likeliest one's probability; 0: none."""
    repetition_penalty: float = 1.0
    """Above 1: divide the logits of tokens that the text or its prompt already has; 1.1 to 1.3 is usual."""
    seed: int = 1337
    """The same seed gives the same text."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object a line for each sample: prompt, text, tokens, finish (length, stop or end_of_text), sample, seed,
    and of all samples of its prompt seconds to the first token and tokens_per_second after it."""
    tokenizer: FilePath | None = None
    """A llm.c tokenizer file; by default the tokenizer.bin beside the model file, else GPT-2's own vocabulary. Ids of the
    model beyond it are never chosen where they pad the model's table to a multiple of 64 (50304); otherwise they are added
    tokens, shown as <|50257|>."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of products and activations; in bfloat16 half as many bytes of weights are read for each token."""
    backend: BackendName = "auto"
    """Where the forward pass is computed."""

    def validate(self) -> None:
        sources = [flag for flag in ("--prompt", "--prompt-file", "--interactive") if getattr(self, flag[2:].replace("-", "_"))]
        if len(sources) > 1:
            raise Gpt2JaxError(f"{sources[0]}: expected one source of prompts, found also {sources[1]}", sources[1])


def main(words: list[str]) -> None:
    arguments = parse(Arguments, __doc__, words)
    arguments.validate()
    backend = select_backend(arguments.backend)  # before anything imports jax
    prompts = [] if arguments.interactive else _prompts(arguments)

    from gpt2_jax.api import load
    from gpt2_jax.generate import Sampling, check_request

    # Before the model is read, which may take long.
    Sampling(**_choice(arguments))
    check_request(arguments.max_tokens, arguments.num_samples, arguments.stop, arguments.seed)
    model = load(
        arguments.checkpoint,
        step=arguments.step,
        tokenizer=arguments.tokenizer,
        dtype=arguments.dtype,
        backend=backend,
    )
    if model.source != arguments.checkpoint:
        announce(f"read {model.source}")  # not among the text, which may go into a file
    for prompt in prompts:
        _answer(model, arguments, prompt)
    if arguments.interactive:
        _talk(model, arguments)


def _choice(arguments: Arguments) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}


def _prompts(arguments: Arguments) -> list[str]:
    """The prompts of a command line that is not interactive; Gpt2JaxError for a file that has none."""
    path = arguments.prompt_file
    if path is None:
        return [arguments.prompt]
    if path == "-":
        return [_without_line_feed(_read_standard_input())]
    text = read_text_file(path, "a prompt", max_bytes=_MAX_BYTES)
    if Path(path).suffix != ".jsonl":
        return [_without_line_feed(text)]
    prompts = []
    for number, line in json_lines(text):
        try:
            prompt = json.loads(line)["prompt"]
            if not isinstance(prompt, str):
                raise ValueError(f"a prompt that is no text: {prompt!r:.40}")
            prompt.encode()  # half a pair of UTF-16 can be written in JSON
        except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
            found = "no prompt" if isinstance(error, KeyError) else error
            expected = f'expected an object such as {{"prompt": "Once"}} on line {number}'
            raise Gpt2JaxError(f"{path}: {expected}, found: {found}") from None
        prompts.append(prompt)
    if not prompts:
        raise Gpt2JaxError(f"{path}: expected at least one line with a prompt, found none")
    return prompts


def _read_standard_input() -> str:
    blocks, size = [], 0

    def advance(num_bytes: int) -> None:
        nonlocal size
        size += num_bytes
        if size > _MAX_BYTES:
            raise Gpt2JaxError(f"{_STANDARD_INPUT}: expected a prompt of at most {_MAX_BYTES} bytes, found more")

    for block in decoded_blocks(sys.stdin.buffer, _STANDARD_INPUT, "a prompt", advance=advance):
        blocks.append(block)
    return "".join(blocks)


def _without_line_feed(text: str) -> str:
    """Editors end a file with one, which belongs to no prompt."""
    return text.removesuffix("\n").removesuffix("\r")


def _talk(model: Model, arguments: Arguments) -> None:
    """Prompts from the terminal, one a line, until there are no more."""
    while True:
        try:
            prompt = input("prompt> " if sys.stdin.isatty() else "")
        except EOFError:
            print()
            return
        try:
            _answer(model, arguments, prompt)
        except KeyboardInterrupt:
            print("\n(stopped)", flush=True)
        except Gpt2JaxError as error:
            announce(f"error: {as_typed(str(error))}")


def _answer(model: Model, arguments: Arguments, prompt: str) -> None:
    """Continue one prompt and print what was asked for."""
    from rich.console import Console

    from gpt2_jax.generate import Speed
    from gpt2_jax.report.progress import counted_progress

    speed = Speed()
    grown = speed.of(
        model.samples(
            prompt,
            max_tokens=arguments.max_tokens,
            num_samples=arguments.num_samples,
            stop=arguments.stop,
            seed=arguments.seed,
            **_choice(arguments),
        )
    )
    if arguments.num_samples == 1 and not arguments.json:
        _show(prompt)
        for (text,) in grown:
            _show(text.new)
        print()
    else:
        texts: list[Sample] = []
        with counted_progress(
            "generating: token", arguments.max_tokens, Console(stderr=True, highlight=False, soft_wrap=True)
        ) as advance:
            for latest in grown:
                texts = latest
                advance()
        _print_all(prompt, texts, arguments, speed)
    announce(str(speed))


def _print_all(prompt: str, texts: Sequence[Sample], arguments: Arguments, speed: Speed) -> None:
    for number, text in enumerate(texts):
        seed = arguments.seed + number
        if arguments.json:
            record = {
                "prompt": prompt,
                "text": text.text,
                "tokens": text.num_tokens,
                "finish": text.finish,
                "sample": number,
                "seed": seed,
                "seconds_to_first_token": round(speed.first_seconds, 4),
                "tokens_per_second": None if speed.rate is None else round(speed.rate, 2),
            }
            print(json.dumps(record), flush=True)
        else:
            print(f"--- sample {number + 1} of {len(texts)}, seed {seed}")
            _show(prompt + text.text)
            print(flush=True)


def _show(text: str) -> None:
    print(without_controls(text) if sys.stdout.isatty() else text, end="", flush=True)
