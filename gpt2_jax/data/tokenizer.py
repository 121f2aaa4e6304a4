"""GPT-2's byte-pair encoding with no network: tiktoken over the merges that lie in the package."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.resources import files

import tiktoken

from gpt2_jax.data.chunks import Chunk, CutRuns, chunks
from gpt2_jax.errors import Gpt2JaxError, announce
from gpt2_jax.llmc.tokenizer_file import read_tokenizer_file

END_OF_TEXT = "<|endoftext|>"
# Tables of tokens are padded to a multiple of it: nanoGPT's 50304, Megatron's 51200.
_PADDING_MULTIPLE = 64
_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # OpenAI's vocab.bpe
# How GPT-2 splits text before merging; the form that tiktoken's regex engine runs fastest.
_SPLIT_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

_CHARACTERS_AT_ONCE, _CHUNKS_AT_ONCE = 2**20, 2**12


@cache
def gpt2_tokenizer() -> tiktoken.Encoding:
    """GPT-2's 50257 tokens; 'Hello world' is [15496, 995], the end of text 50256."""
    merges = files("gpt2_jax").joinpath("assets/gpt2_vocab.bpe").read_bytes()
    if hashlib.sha256(merges).hexdigest() != _MERGES_SHA256:
        raise Gpt2JaxError("gpt2_jax/assets/gpt2_vocab.bpe: expected GPT-2's merges, found a changed file", "pip install -e .")
    ranks = _ranks_from_merges(merges.decode("utf-8"))
    return _encoding("gpt2", ranks, end_of_text=len(ranks))


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


def encode(tokenizer: tiktoken.Encoding, text: str) -> list[int]:
    """The ids of an ordinary text of any length, in which '<|endoftext|>' is no token.

    A run of one kind of character that has to be cut (see chunks.py) is announced on standard error, once.
    """
    cuts = CutRuns()
    rows = [tokenizer.encode_ordinary(chunk.text) for chunk in cuts.watch(chunks([(text, True)]))]
    if cuts.number:
        _announce_once(str(cuts))
    return rows[0] if len(rows) == 1 else [token for row in rows for token in row]


def encode_chunks(tokenizer: tiktoken.Encoding, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, list[int]]]:
    """Each chunk with its ids, by as many threads as there are CPUs, of as many chunks at a time as keep them busy."""
    batch: list[Chunk] = []
    size = 0
    for chunk in chunks:
        batch.append(chunk)
        size += len(chunk.text)
        if size >= _CHARACTERS_AT_ONCE or len(batch) == _CHUNKS_AT_ONCE:
            yield from _encode_batch(tokenizer, batch)
            batch, size = [], 0
    yield from _encode_batch(tokenizer, batch)


def _encode_batch(tokenizer: tiktoken.Encoding, batch: list[Chunk]) -> Iterator[tuple[Chunk, list[int]]]:
    rows = tokenizer.encode_ordinary_batch([chunk.text for chunk in batch], num_threads=os.cpu_count() or 1)
    return zip(batch, rows, strict=True)


@cache
def _announce_once(text: str) -> None:
    announce(f"note: {text}")


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
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    ranks = {bytes([byte]): rank for rank, byte in enumerate(printable + others)}
    for line in merges.splitlines()[1:]:
        left, right = line.split()
        ranks[bytes(byte_of[character] for character in left + right)] = len(ranks)
    return ranks
