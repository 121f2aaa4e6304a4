"""Continue a text with a trained model, streaming to the terminal.

python scripts/generate.py runs/latest --prompt "In the beginning"
python scripts/generate.py runs/NAME --step 300 --prompt "In the beginning"
"""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from gpt2_jax.commands.command_line import parse
from gpt2_jax.compute.backend import select_backend
from gpt2_jax.config import BackendName, ModelSettings
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.files import FilePath
from gpt2_jax.output import without_controls


@dataclass(frozen=True)
class Arguments:
    checkpoint: Annotated[FilePath, tyro.conf.Positional]
    """A run folder (its newest complete checkpoint), a llm.c model file, a Hugging Face GPT-2 folder, or nanoGPT's
    ckpt.pt."""
    step: int | None = None
    """Of a run folder the checkpoint of this step instead."""
    prompt: str = ""
    """Text to continue; empty: begin a document. <|endoftext|> in it ends a document and begins the next, as in the texts
    of prepare. Of a prompt longer than its positions the model sees the end."""
    max_tokens: int = 256
    """Tokens to generate; the end of the document stops earlier."""
    temperature: float = 0.8
    """Below 1: safer, above: wilder; 1: the model's own probabilities; 0: always the likeliest token."""
    top_k: int = 50
    """Choose among the k likeliest tokens only; 0: among all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens whose probabilities first reach this sum; 1: among all."""
    min_p: float = 0.0
    """Leave out tokens below this fraction of the likeliest one's probability; 0: none."""
    seed: int = 1337
    """The same seed gives the same text."""
    tokenizer: FilePath | None = None
    """A llm.c tokenizer file; by default the tokenizer.bin beside the model file, else GPT-2's own vocabulary. Ids of the
    model beyond it are never chosen where they pad the model's table to a multiple of 64 (50304); otherwise they are added
    tokens, shown as <|50257|>."""
    backend: BackendName = "auto"
    """Where the forward pass is computed."""

    def validate(self) -> None:
        for name, lowest in (("max_tokens", 1), ("top_k", 0), ("seed", 1)):
            if getattr(self, name) < lowest:
                flag = f"--{name.replace('_', '-')}"
                raise Gpt2JaxError(f"{flag}: expected at least {lowest}, found {getattr(self, name)}", f"{flag} {lowest}")
        for flag, value, fits, expected in (
            ("--top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("--min-p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1"),
        ):
            if not fits:
                raise Gpt2JaxError(f"{flag}: expected a number {expected}, found {value}", f"{flag} 0.9")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise Gpt2JaxError(
                f"--temperature: expected a finite number of at least 0, found {self.temperature}", "--temperature 0.8"
            )


def main(words: list[str]) -> None:
    arguments = parse(Arguments, __doc__, words)
    arguments.validate()
    backend = select_backend(arguments.backend)  # before anything imports jax

    from gpt2_jax.compute.backend import open_device
    from gpt2_jax.compute.plan import make_plan
    from gpt2_jax.config import ComputeSettings
    from gpt2_jax.data.tokenizer import gpt2_tokenizer, tokenizer_beside, tokenizer_from_file
    from gpt2_jax.generate import complete
    from gpt2_jax.models.weights import load_weights, model_source

    source = model_source(arguments.checkpoint, arguments.step)
    if source != arguments.checkpoint:
        print(f"reading {source}", file=sys.stderr, flush=True)  # not among the text, which may go into a file
    tokenizer_path = arguments.tokenizer or tokenizer_beside(source)
    tokenizer = gpt2_tokenizer() if tokenizer_path is None else tokenizer_from_file(tokenizer_path)
    config, params = load_weights(ModelSettings(init=source))
    open_device(backend)
    plan = make_plan(ComputeSettings(), backend, config)
    pieces = complete(
        plan,
        params,
        tokenizer,
        arguments.prompt,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        seed=arguments.seed,
    )
    for text in itertools.chain([arguments.prompt], pieces):
        print(without_controls(text) if sys.stdout.isatty() else text, end="", flush=True)
    print()
