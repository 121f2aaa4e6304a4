"""Make token shards for training: DATA_train.bin and DATA_val.bin in llm.c's format.

python scripts/prepare_data.py                                  the built-in text (King James Bible), no network
python scripts/prepare_data.py --source tinyshakespeare         llm.c's recipe, downloaded
python scripts/prepare_data.py --source my_book.txt             any UTF-8 text file, of any size
python scripts/prepare_data.py --source openwebtext/train.bin --source-format nanogpt
python scripts/prepare_data.py --hellaswag hellaswag_val.jsonl  HellaSwag's questions, for training with --hellaswag
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from gpt2_jax.commands.command_line import parse
from gpt2_jax.data import corpus
from gpt2_jax.data.chunks import CutRuns
from gpt2_jax.data.hellaswag import read_hellaswag, write_hellaswag
from gpt2_jax.files import FilePath, file_size
from gpt2_jax.names import nearest, nearest_path
from gpt2_jax.output import output_is_no_result
from gpt2_jax.report.progress import bytes_progress

_BY_NAME: dict[str, corpus.Recipe] = {"kjv": corpus.kjv, "tinyshakespeare": corpus.tinyshakespeare}


@dataclass(frozen=True)
class Arguments:
    source: FilePath = "kjv"
    """kjv (built in), tinyshakespeare (downloaded), or the path of a UTF-8 text file; <|endoftext|> in it ends a
    document and begins the next, as in prompts, and its last tenth is for validation."""
    source_format: Literal["text", "nanogpt"] = "text"
    """What the file holds: text, or nanogpt: GPT-2 tokens of 16 bits without a header, as in nanoGPT's train.bin, whose
    val.bin is taken from beside it."""
    output_dir: FilePath = "data"
    """Folder for the two shards."""
    hellaswag: FilePath | None = None
    """HellaSwag's JSONL file: write its questions as llm.c's evaluation file instead."""


def main(words: list[str]) -> None:
    arguments = parse(Arguments, __doc__, words)
    output_is_no_result()
    if arguments.hellaswag is not None:
        examples = read_hellaswag(arguments.hellaswag)
        path = write_hellaswag(examples, Path(arguments.hellaswag).stem, arguments.output_dir)
        print(f"{path}: {len(examples):,} questions")
        return
    for path, num_tokens in _write(arguments).items():
        print(f"{path}: {num_tokens:,} tokens")


def _write(arguments: Arguments) -> dict[Path, int]:
    source = arguments.source
    if arguments.source_format == "text" and source in _BY_NAME:
        print(f"reading and tokenizing {source} ...", flush=True)
        return corpus.write_corpus(_BY_NAME[source], source, arguments.output_dir)
    if arguments.source_format == "nanogpt":
        if Path(source).is_dir():
            source = str(Path(source) / "train.bin")
        other = corpus.nanogpt_validation(source)
        files = [source] if other is None else [source, str(other)]
        name = Path(source).resolve().parent.name if Path(source).name == "train.bin" else Path(source).stem
        print(f"taking over the tokens of {' and '.join(files)} ...", flush=True)
        return _with_progress(
            "nanoGPT's tokens", corpus.NANOGPT_HINT, files, partial(corpus.nanogpt, source), name, arguments.output_dir
        )
    cuts = CutRuns()
    print(f"reading and tokenizing {source} ...", flush=True)
    recipe = partial(corpus.text_file, source, cuts=cuts)
    written = _with_progress("a text file", _meant_by(source), [source], recipe, Path(source).stem, arguments.output_dir)
    if cuts.number:
        print(f"note: {source}: {cuts}")
    return written


def _meant_by(source: str) -> str | None:
    """For a source that is not there, the flag with the nearest name of a text; None for one that is there."""
    if Path(source).exists():
        return None
    path = nearest_path(source)
    text = str(path) if path is not None and path.is_file() else next(iter(nearest(source, _BY_NAME)), "kjv")
    return f"--source {shlex.quote(text)}"


def _with_progress(
    what: str, hint: str | None, files: list[str], recipe: Callable[..., None], name: str, output_dir: str
) -> dict[Path, int]:
    with bytes_progress(f"reading {what}", sum(file_size(path, what, hint) for path in files)) as advance:
        return corpus.write_corpus(partial(recipe, advance=advance), name, output_dir)
