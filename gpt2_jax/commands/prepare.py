"""Make token shards for training: DATA_train.bin and DATA_val.bin in llm.c's format.

python scripts/prepare_data.py                                  the built-in text (King James Bible), no network
python scripts/prepare_data.py --source tinyshakespeare         llm.c's recipe, downloaded
python scripts/prepare_data.py --source my_book.txt             any UTF-8 text file
python scripts/prepare_data.py --hellaswag hellaswag_val.jsonl  HellaSwag's questions, for training with --hellaswag
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gpt2_jax.commands.command_line import parse
from gpt2_jax.data import corpus


@dataclass(frozen=True)
class Arguments:
    source: str = "kjv"
    """kjv (built in), tinyshakespeare (downloaded), or the path of a UTF-8 text file, in which <|endoftext|> ends a document
    and begins the next, as in prompts."""
    output_dir: str = "data"
    """Folder for the two shards."""
    hellaswag: str | None = None
    """HellaSwag's JSONL file: write its questions as llm.c's evaluation file instead."""


def main(words: list[str]) -> None:
    arguments = parse(Arguments, __doc__, words)
    if arguments.hellaswag is not None:
        examples = corpus.hellaswag(arguments.hellaswag)
        path = corpus.write_examples(examples, Path(arguments.hellaswag).stem, arguments.output_dir)
        print(f"{path}: {len(examples):,} questions")
        return
    print(f"reading and tokenizing {arguments.source} ...", flush=True)
    makers = {"kjv": corpus.kjv, "tinyshakespeare": corpus.tinyshakespeare}
    made = makers[arguments.source]() if arguments.source in makers else corpus.text_file(arguments.source)
    for path, tokens in zip(corpus.write_corpus(made, Path(arguments.source).stem, arguments.output_dir), made, strict=True):
        print(f"{path}: {len(tokens):,} tokens")
