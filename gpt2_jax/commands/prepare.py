"""Make token shards for training: DATA_train.bin and DATA_val.bin in llm.c's format.

python scripts/prepare_data.py                                  the built-in text (King James Bible), no network
python scripts/prepare_data.py --source my_book.txt             UTF-8 text, JSON Lines or Parquet, of any size
python scripts/prepare_data.py --source texts/                  a folder of such files, or a glob in quotes
python scripts/prepare_data.py --source -                       standard input
python scripts/prepare_data.py --source fineweb --tokens 100M   a dataset of the Hugging Face hub, streamed
python scripts/prepare_data.py --source hf:OWNER/NAME           any other; hf:OWNER/NAME:GLOB names its files
python scripts/prepare_data.py --vocabulary 1024                a vocabulary of the text's own, for small models
python scripts/prepare_data.py --source tinyshakespeare         llm.c's recipe, downloaded
python scripts/prepare_data.py --source edu_fineweb-shards      llm.c's ready-made shards of FineWeb-Edu
python scripts/prepare_data.py --source openwebtext/train.bin --source-format nanogpt
python scripts/prepare_data.py --hellaswag hellaswag_val.jsonl  HellaSwag's questions, for training with --hellaswag
python scripts/prepare_data.py --source hellaswag               the same, downloaded

A preparation that was stopped or killed goes on where it was when the same command is given again.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from gpt2_jax.commands.command_line import parse
from gpt2_jax.data import corpus
from gpt2_jax.data.chunks import CutRuns
from gpt2_jax.data.hellaswag import download_hellaswag, read_hellaswag, write_hellaswag
from gpt2_jax.data.prepare import Limits, prepare
from gpt2_jax.data.published import PUBLISHED_SHARDS, download_shards
from gpt2_jax.data.sources import DATASETS, STANDARD_INPUT, Source, beginning, built_in_source, open_source
from gpt2_jax.data.tokenizer import own_tokenizer, token_bytes
from gpt2_jax.data.vocabulary import MAX_CHARACTERS, train_vocabulary
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.files import FilePath, file_size
from gpt2_jax.llmc.tokenizer_file import write_tokenizer_file
from gpt2_jax.names import nearest, nearest_path
from gpt2_jax.output import output_is_no_result
from gpt2_jax.report.progress import bytes_progress, tokens_progress

_BY_NAME: dict[str, corpus.Recipe] = {"kjv": corpus.kjv, "tinyshakespeare": corpus.tinyshakespeare}
_NAMES = (*_BY_NAME, *DATASETS, *PUBLISHED_SHARDS, "hellaswag")
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}
_HUB_VALIDATION_FRACTION = 0.01


@dataclass(frozen=True)
class Arguments:
    source: FilePath = "kjv"
    """kjv (built in); a UTF-8 text, JSON Lines (.jsonl) or Parquet file, a folder or glob of them, - for standard input; of
    the Hugging Face hub tinystories, fineweb, fineweb-100B, fineweb-edu, openwebtext, or hf:OWNER/NAME; tinyshakespeare and
    hellaswag (downloaded); edu_fineweb-shards and fineweb-shards (llm.c's, ready-made). In texts <|endoftext|> ends a
    document and begins the next, as in prompts."""
    source_format: Literal["text", "nanogpt"] = "text"
    """What the file holds: text, or nanogpt: GPT-2 tokens of 16 bits without a header, as in nanoGPT's train.bin, whose
    val.bin is taken from beside it."""
    text_field: str = "text"
    """Name of the text in JSON Lines and in Parquet."""
    output_dir: FilePath = "data"
    """Folder for the shards."""
    tokens: str | None = None
    """Stop with the document that reaches so many tokens: 100M, 2.5B, 1000000."""
    shard_tokens: str = "100M"
    """Tokens of a shard; the document that reaches this number stays whole."""
    validation_fraction: float | None = None
    """Part of the tokens that is for validation, in whole documents; default: 0.1, of the hub's datasets 0.01."""
    vocabulary: int | None = None
    """Make a vocabulary of so many tokens from the text's beginning, for small models, rather than use GPT-2's: shards and
    NAME_tokenizer.bin, with this number in their name. 257: bytes alone."""
    workers: int | None = None
    """Threads that tokenize; default: the CPUs. The shards are the same whatever their number."""
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
    if arguments.source == "hellaswag":
        path, num_questions = download_hellaswag(arguments.output_dir)
        print(f"{path}: {num_questions:,} questions")
        return
    for path, num_tokens in _write(arguments).items():
        print(f"{path}: {num_tokens:,} tokens")


def _write(arguments: Arguments) -> dict[Path, int]:
    source = arguments.source
    if arguments.source_format == "text" and source in PUBLISHED_SHARDS:
        return download_shards(source, arguments.output_dir, _count("--tokens", arguments.tokens or "100M"))
    if arguments.source_format == "text" and source in _BY_NAME and not (source == "kjv" and arguments.vocabulary):
        print(f"reading and tokenizing {source} ...", flush=True)
        return corpus.write_corpus(_BY_NAME[source], source, arguments.output_dir)
    if arguments.source_format == "nanogpt":
        return _take_over(arguments)
    return _prepare(arguments)


def _prepare(arguments: Arguments) -> dict[Path, int]:
    """Shards of texts, as a stream."""
    source = arguments.source
    of_hub = source in DATASETS or source.startswith("hf:")
    fraction = arguments.validation_fraction
    if fraction is None:
        fraction = _HUB_VALIDATION_FRACTION if of_hub else corpus.VALIDATION_FRACTION
    if not 0 <= fraction < 1:
        raise Gpt2JaxError(f"--validation-fraction: expected 0 or more, below 1, found {fraction}", "--validation-fraction 0.1")
    if arguments.workers is not None and not 1 <= arguments.workers <= 1024:
        raise Gpt2JaxError(f"--workers: expected 1 to 1024, found {arguments.workers}", "--workers 2")
    limits = Limits(
        fraction,
        None if arguments.tokens is None else _count("--tokens", arguments.tokens),
        _count("--shard-tokens", arguments.shard_tokens),
        numbered=of_hub,
    )
    print(f"reading and tokenizing {'standard input' if source == STANDARD_INPUT else source} ...", flush=True)
    opened = built_in_source() if source == "kjv" else open_source(source, arguments.text_field, _meant_by(source))
    tokenizer, cuts = None, CutRuns()
    if arguments.vocabulary is not None:
        if source == STANDARD_INPUT:
            found = "found standard input"
            raise Gpt2JaxError(f"--vocabulary: expected a source that can be read twice, {found}", "--source FILE")
        vocabulary = train_vocabulary(beginning(opened, MAX_CHARACTERS), arguments.vocabulary)
        opened = Source(f"{opened.name}{arguments.vocabulary}", opened.files)
        tokenizer = own_tokenizer(vocabulary, opened.name)
    with tokens_progress("tokenizing", opened.size, limits.tokens) as advance:
        written = prepare(
            opened, arguments.output_dir, limits, tokenizer=tokenizer, workers=arguments.workers, cuts=cuts, advance=advance
        )
    if tokenizer is not None:
        path = Path(arguments.output_dir) / f"{opened.name}_tokenizer.bin"
        write_tokenizer_file(path, token_bytes(tokenizer), tokenizer.eot_token)
        print(f"{path}: {tokenizer.n_vocab:,} tokens of its own")
    if cuts.number:
        print(f"note: {source}: {cuts}")
    return written


def _take_over(arguments: Arguments) -> dict[Path, int]:
    """Shards of nanoGPT's tokens."""
    source = arguments.source
    if Path(source).is_dir():
        source = str(Path(source) / "train.bin")
    other = corpus.nanogpt_validation(source)
    files = [source] if other is None else [source, str(other)]
    name = Path(source).resolve().parent.name if Path(source).name == "train.bin" else Path(source).stem
    print(f"taking over the tokens of {' and '.join(files)} ...", flush=True)
    what = "nanoGPT's tokens"
    with bytes_progress(f"reading {what}", sum(file_size(path, what, corpus.NANOGPT_HINT) for path in files)) as advance:
        return corpus.write_corpus(partial(corpus.nanogpt, source, advance=advance), name, arguments.output_dir)


def _count(flag: str, text: str) -> int:
    """A number of tokens such as 100M."""
    unit = text[-1:] if text[-1:] in _UNITS else ""
    try:
        number = float(text.removesuffix(unit).replace("_", "").replace(",", "")) * _UNITS[unit]
    except (ValueError, OverflowError):
        number = 0.0
    if not 1 <= number < 10**15:
        raise Gpt2JaxError(f"{flag}: expected a number of tokens such as 100M, found {text!r}", f"{flag} 100M")
    return round(number)


def _meant_by(source: str) -> str | None:
    """For a source that is not there, the flag with the nearest name of a text; None for one that is there."""
    if Path(source).exists():
        return None
    path = nearest_path(source)
    text = str(path) if path is not None and path.is_file() else next(iter(nearest(source, _NAMES)), "kjv")
    return f"--source {shlex.quote(text)}"
