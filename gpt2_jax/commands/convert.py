"""Convert a model: llm.c's model file, a Hugging Face folder, nanoGPT's ckpt.pt, each to each.

python scripts/convert.py runs/NAME gpt2-mine                       for transformers, vLLM, lm-evaluation-harness ...
python scripts/convert.py gpt2-mine gpt2-mine.bin                   for llm.c
python scripts/convert.py gpt2-mine.bin out/ckpt.pt                 for nanoGPT
python scripts/convert.py gpt2_124M.bin small --dtype bfloat16      half the size

There and back again gives the same bytes. The result is compared with the source: bit by bit, and where one of both is a
Hugging Face folder and transformers is installed, by the logits that it computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from gpt2_jax.commands.command_line import parse
from gpt2_jax.compute.backend import select_backend
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.files import FilePath
from gpt2_jax.output import output_is_no_result


@dataclass(frozen=True)
class Arguments:
    source: Annotated[FilePath, tyro.conf.Positional]
    """A run folder (its newest complete checkpoint), a llm.c model file, a Hugging Face GPT-2 folder, a model of the hub, or
    nanoGPT's ckpt.pt."""
    target: Annotated[FilePath, tyro.conf.Positional]
    """NAME.bin for llm.c, NAME.pt for nanoGPT, any other name for a Hugging Face folder; must not exist."""
    step: int | None = None
    """Of a run folder the checkpoint of this step instead."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights; by default as in the source."""
    check: bool = True
    """Compare the result with the source."""


def main(words: list[str]) -> None:
    arguments = parse(Arguments, __doc__, words)
    output_is_no_result()
    backend = select_backend("cpu")  # before anything imports jax

    from gpt2_jax.convert import HUGGINGFACE, convert, differing_tensor, kind_of_target
    from gpt2_jax.models.weights import model_source

    source, kind = model_source(arguments.source, arguments.step), kind_of_target(arguments.target)
    print(f"converting {source} ...", flush=True)
    written = convert(source, arguments.target, kind, dtype=arguments.dtype)
    for path in written.paths:
        print(f"{path}: {path.stat().st_size:,} bytes")
    if not arguments.check:
        return
    if (tensor := differing_tensor(source, arguments.target, written.dtype)) is not None:
        raise Gpt2JaxError(f"{arguments.target}: expected the source's weights, found another {tensor}")
    print(f"checked: all {written.num_parameters:,} weights are the source's, in {written.dtype}")
    folder = arguments.target if kind == HUGGINGFACE else source if _is_folder(source) else None
    if folder is None:
        return

    from gpt2_jax.logits_check import compare_with_transformers

    model = source if kind == HUGGINGFACE else arguments.target
    if written.dtype == "bfloat16" and kind == HUGGINGFACE:
        model = arguments.target  # the source may have more digits
    print(f"checked: {compare_with_transformers(model, folder, backend)}")


def _is_folder(source: str) -> bool:
    from pathlib import Path

    return Path(source).is_dir()
