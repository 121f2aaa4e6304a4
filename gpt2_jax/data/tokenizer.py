"""GPT-2's byte-pair encoding with no network: tiktoken over the merges that lie in the package."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex
import tiktoken

from gpt2_jax.data.chunks import Chunk, CutRuns, chunks
from gpt2_jax.errors import Gpt2JaxError, announce
from gpt2_jax.llmc.tokenizer_file import read_tokenizer_file
from gpt2_jax.machine import available_cpus

END_OF_TEXT = "<|endoftext|>"
# Tables of tokens are padded to a multiple of it: nanoGPT's 50304, Megatron's 51200.
_PADDING_MULTIPLE = 64
_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # OpenAI's vocab.bpe
# How GPT-2 splits text before merging; the form that tiktoken's regex engine runs fastest.
_SPLIT_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

_CHARACTERS_AT_ONCE, _CHUNKS_AT_ONCE = 2**18, 2**10  # one thread's task


@cache
def gpt2_tokenizer() -> tiktoken.Encoding:
    """GPT-2's 50257 tokens; 'Hello world' is [15496, 995], the end of text 50256."""
    merges = files("gpt2_jax").joinpath("assets/gpt2_vocab.bpe").read_bytes()
    if hashlib.sha256(merges).hexdigest() != _MERGES_SHA256:
        raise Gpt2JaxError("gpt2_jax/assets/gpt2_vocab.bpe: expected GPT-2's merges, found a changed file", "pip install -e .")
    ranks = _ranks_from_merges(merges.decode("utf-8"))
    return _encoding("gpt2", ranks, end_of_text=len(ranks))


def huggingface_files(tokenizer: tiktoken.Encoding, max_length: int) -> dict[str, bytes]:
    """The files of a tokenizer with GPT-2's pieces as transformers reads them, by their names; `max_length`: the model's
    positions."""
    character_of = {byte: character for character, byte in _byte_of_character().items()}

    def written(token: bytes) -> str:
        return "".join(character_of[byte] for byte in token)

    tokens = token_bytes(tokenizer)
    vocabulary = {written(token): token_id for token_id, token in enumerate(tokens) if token_id != tokenizer.eot_token}
    vocabulary[END_OF_TEXT] = tokenizer.eot_token
    pairs = _merges(tokens, tokenizer.eot_token)
    merges = "#version: 0.2\n" + "".join(f"{written(left)} {written(right)}\n" for left, right in pairs)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    settings = {"add_prefix_space": False, "model_max_length": max_length, "tokenizer_class": "GPT2Tokenizer", **special}
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False, separators=(",", ":")).encode(),
        "merges.txt": merges.encode(),
        "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
    }


def _merges(tokens: Sequence[bytes], end_of_text: int) -> Iterator[tuple[bytes, bytes]]:
    """The two parts of every token of more than a byte, by its rank: what merging by the lower ranks alone leaves of it."""
    ranks = {token: rank for rank, token in enumerate(tokens) if rank != end_of_text}
    for token, rank in ranks.items():
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            lower = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
            place = min(range(len(lower)), key=lower.__getitem__)
            if lower[place] >= rank:
                break
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]
        elif len(parts) > 2:
            raise Gpt2JaxError(f"tokenizer: expected tokens that merges of two make, found {token!r}, which none make")


def tokenizer_from_file(path: str | os.PathLike) -> tiktoken.Encoding:
    """The full encoder and decoder that llm.c's tokenizer file implies: a token's id is its merge rank.

    Raises Gpt2JaxError for a damaged file, and for a vocabulary that lacks one of the 256 bytes or repeats a token.
    """
    token_bytes, end_of_text = read_tokenizer_file(path)
    ranks = {token: token_id for token_id, token in enumerate(token_bytes) if token_id != end_of_text}
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or len(ranks) != len(token_bytes) - 1:
        found = f"no token for byte {missing[0]}" if missing else "two ids for one token"
        raise Gpt2JaxError(f"{path}: expected a byte-level vocabulary with every byte and no token twice, found {found}")
    return _encoding(os.fspath(path), ranks, end_of_text)


def own_tokenizer(token_bytes: Sequence[bytes], name: str) -> tiktoken.Encoding:
    """The encoder and decoder of a vocabulary by the bytes of its tokens, whose last is the end of text."""
    return _encoding(name, {token: token_id for token_id, token in enumerate(token_bytes[:-1])}, len(token_bytes) - 1)


def tokenizer_beside(path: str | os.PathLike) -> Path | None:
    """The tokenizer file that belongs to token shards (NAME_tokenizer.bin beside NAME_train.bin, a path or a glob) or to a
    model file (tokenizer.bin in its folder), which then have a vocabulary of their own; None where GPT-2's is meant."""
    path = Path(path)
    name = re.split(r"_(?:train|val)(?:_|\.|\*)", path.name)[0]
    found = path.with_name("tokenizer.bin") if name == path.name else path.with_name(f"{name}_tokenizer.bin")
    return found if found.is_file() else None


def split_into_pieces(text: str) -> list[str]:
    """The pieces of a text within which bytes are merged."""
    return regex.findall(_SPLIT_PATTERN, text)


def encode(tokenizer: tiktoken.Encoding, text: str) -> list[int]:
    """The ids of an ordinary text of any length, in which '<|endoftext|>' is no token.

    A run of one kind of character that has to be cut (see chunks.py) is announced on standard error, once.
    """
    cuts = CutRuns()
    rows = [tokenizer.encode_ordinary(chunk.text) for chunk in cuts.watch(chunks([(text, True)]))]
    if cuts.number:
        _announce_once(str(cuts))
    return rows[0] if len(rows) == 1 else [token for row in rows for token in row]


class Encoded(NamedTuple):
    """A chunk with its tokens; the first of a document's begins with the end-of-text token."""

    chunk: Chunk
    begins_document: bool
    tokens: np.ndarray  # uint16


def encode_chunks(
    tokenizer: tiktoken.Encoding, chunks: Iterable[Chunk], *, workers: int | None = None, begins: bool = True
) -> Generator[Encoded, None, None]:
    """Each chunk with its tokens, in order, by as many threads as there are CPUs or as `workers` says. `begins` says whether
    a document begins with the first chunk.

    What comes out does not depend on the number of threads. Few chunks are held at a time.
    """
    workers = workers or available_cpus()
    waiting: deque[tuple[list[tuple[Chunk, bool]], Future[list[np.ndarray]]]] = deque()

    def finished() -> Iterator[Encoded]:
        batch, future = waiting.popleft()
        return (Encoded(*parts, tokens) for parts, tokens in zip(batch, future.result(), strict=True))

    with ThreadPoolExecutor(workers) as pool:
        try:
            for batch in _batches(chunks, begins):
                waiting.append((batch, pool.submit(_encode_batch, tokenizer, batch)))
                # Twice the threads, so that none waits while the results are written.
                if len(waiting) > 2 * workers:
                    yield from finished()
            while waiting:
                yield from finished()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _batches(chunks: Iterable[Chunk], begins: bool) -> Iterator[list[tuple[Chunk, bool]]]:
    """Chunks, and whether a document begins with each, as many as make one thread's task."""
    batch: list[tuple[Chunk, bool]] = []
    size = 0
    for chunk in chunks:
        batch.append((chunk, begins))
        begins = chunk.ends_document
        size += len(chunk.text)
        if size >= _CHARACTERS_AT_ONCE or len(batch) == _CHUNKS_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_batch(tokenizer: tiktoken.Encoding, batch: list[tuple[Chunk, bool]]) -> list[np.ndarray]:
    end_of_text = np.array([tokenizer.eot_token], np.uint16)
    rows = [_encode_to_numpy(tokenizer, chunk.text) for chunk, _ in batch]
    return [np.concatenate((end_of_text, row)) if begins else row for row, (_, begins) in zip(rows, batch, strict=True)]


def _encode_to_numpy(tokenizer: tiktoken.Encoding, text: str) -> np.ndarray:
    """The ids uint16 of a text in which nothing is a special token; tiktoken before 0.9 gives them as a list alone."""
    if hasattr(tokenizer, "encode_to_numpy"):
        with suppress(UnicodeEncodeError):  # half a pair of UTF-16, which encode_ordinary replaces
            return tokenizer.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
    return np.array(tokenizer.encode_ordinary(text), np.uint16)


@cache
def _announce_once(text: str) -> None:
    announce(f"note: {text}")


def refuse_larger_vocabulary(tokenizer: tiktoken.Encoding, vocab_size: int) -> None:
    """Gpt2JaxError for a tokenizer with more tokens than a model has: it is not the one that the model was trained with."""
    if vocab_size < tokenizer.n_vocab:
        raise Gpt2JaxError(
            f"tokenizer: expected at most the model's {vocab_size} tokens, found {tokenizer.n_vocab}",
            "--tokenizer FILE.bin   (the tokenizer file that the model was trained with)",
        )


def num_sampled_ids(tokenizer: tiktoken.Encoding, vocab_size: int) -> int:
    """How many of a model's `vocab_size` ids, from 0 on, may be chosen when it writes text.

    Ids beyond the tokenizer's are padding where their number fills the table to a multiple of 64, and never chosen: 50257
    of 50304. Otherwise somebody added tokens, and all ids may be chosen: 50258 of 50258.
    """
    padded = vocab_size > tokenizer.n_vocab and vocab_size % _PADDING_MULTIPLE == 0
    return tokenizer.n_vocab if padded else vocab_size


def other_ids(tokenizer: tiktoken.Encoding, vocab_size: int) -> str | None:
    """The remark on a model that has ids beyond the tokenizer's; None for a model without them."""
    first, last = tokenizer.n_vocab, vocab_size - 1
    if last < first:
        return None
    if num_sampled_ids(tokenizer, vocab_size) == first:
        return f"vocabulary: the model's ids from {first} to {last} are taken for padding and never chosen"
    return f"vocabulary: the model's ids from {first} to {last} are no tokens of the tokenizer, and shown as <|{first}|>"


def text_of(tokenizer: tiktoken.Encoding, token_id: int) -> bytes:
    """The bytes of one token of a text; an id beyond the tokenizer's is shown as '<|50257|>'."""
    return tokenizer.decode_single_token_bytes(token_id) if token_id < tokenizer.n_vocab else f"<|{token_id}|>".encode()


def num_bytes_of_tokens(tokenizer: tiktoken.Encoding, vocab_size: int) -> np.ndarray:
    """The bytes of text (vocab_size,) int64 that each of a model's ids stands for: none for the end-of-text token, and for
    ids beyond the tokenizer's."""
    sizes = np.zeros(vocab_size, np.int64)
    sizes[: tokenizer.n_vocab] = [len(token) for token in token_bytes(tokenizer)]
    sizes[tokenizer.eot_token] = 0
    return sizes


def token_bytes(tokenizer: tiktoken.Encoding) -> list[bytes]:
    """The bytes of every token by id, as llm.c's tokenizer file lists them."""
    return [tokenizer.decode_single_token_bytes(token_id) for token_id in range(tokenizer.n_vocab)]


def _encoding(name: str, ranks: dict[bytes, int], end_of_text: int) -> tiktoken.Encoding:
    return tiktoken.Encoding(name, pat_str=_SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: end_of_text})


def _ranks_from_merges(merges: str) -> dict[bytes, int]:
    """Rank of every token: the 256 bytes in GPT-2's order, then the result of each merge in the file's order.

    The file writes each byte as one printable character: itself where it is printable, else the next code point from
    256 on.
    """
    byte_of = _byte_of_character()
    ranks = {bytes([byte]): rank for rank, byte in enumerate(byte_of.values())}
    for line in merges.splitlines()[1:]:
        left, right = line.split()
        ranks[bytes(byte_of[character] for character in left + right)] = len(ranks)
    return ranks


def _byte_of_character() -> dict[str, int]:
    """The byte that each printable character of the merges' file stands for, in GPT-2's order of the bytes."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
