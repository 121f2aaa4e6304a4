"""Continue a text with a trained model, streaming to the terminal.

python scripts/generate.py runs/latest --prompt "In the beginning"
python scripts/generate.py runs/NAME --step 300 --prompt "In the beginning"
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from gpt2_jax.commands.command_line import parse
from gpt2_jax.compute.backend import select_backend
from gpt2_jax.config import BackendName, ModelSettings
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.files import FilePath


@dataclass(frozen=True)
class Arguments:
    checkpoint: Annotated[FilePath, tyro.conf.Positional]
    """A run folder (its newest complete checkpoint), a llm.c model file, or a Hugging Face GPT-2 folder."""
    step: int | None = None
    """Of a run folder the checkpoint of this step instead."""
    prompt: str = ""
    """Text to continue; empty: begin a document."""
    max_tokens: int = 256
    """Tokens to generate; the end of the document stops earlier."""
    temperature: float = 1.0
    """Below 1: safer, above: wilder; 0: always the likeliest token."""
    top_k: int | None = None
    """Choose among the k likeliest tokens only."""
    seed: int = 1337
    """The same seed gives the same text."""
    tokenizer: FilePath | None = None
    """A llm.c tokenizer file; by default GPT-2's own vocabulary."""
    backend: BackendName = "auto"
    """Where the forward pass is computed."""

    def validate(self) -> None:
        if self.max_tokens < 1 or self.temperature < 0 or (self.top_k is not None and self.top_k < 1) or self.seed < 1:
            raise Gpt2JaxError(
                "expected --max-tokens, --top-k and --seed of at least 1 and --temperature of at least 0, "
                f"found {self.max_tokens}, {self.top_k}, {self.seed} and {self.temperature}"
            )


def main(words: list[str]) -> None:
    arguments = parse(Arguments, __doc__, words)
    arguments.validate()
    backend = select_backend(arguments.backend)  # before anything imports jax

    from gpt2_jax.compute.backend import open_device
    from gpt2_jax.compute.plan import make_plan
    from gpt2_jax.config import ComputeSettings
    from gpt2_jax.data.tokenizer import gpt2_tokenizer, tokenizer_from_file
    from gpt2_jax.generate import complete
    from gpt2_jax.models.weights import load_weights, model_source

    source = model_source(arguments.checkpoint, arguments.step)
    if source != arguments.checkpoint:
        print(f"reading {source}", file=sys.stderr, flush=True)  # not among the text, which may go into a file
    tokenizer = gpt2_tokenizer() if arguments.tokenizer is None else tokenizer_from_file(arguments.tokenizer)
    config, params = load_weights(ModelSettings(init=source))
    open_device(backend)
    plan = make_plan(ComputeSettings(), backend, config)
    print(arguments.prompt, end="", flush=True)
    for text in complete(
        plan,
        params,
        tokenizer,
        arguments.prompt,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        seed=arguments.seed,
    ):
        print(text, end="", flush=True)
    print()
