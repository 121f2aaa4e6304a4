"""The texts of one request, as they grow: the only place where the server asks the model."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import tiktoken

from gpt2_jax.compute.plan import Plan
from gpt2_jax.data.tokenizer import num_sampled_ids, text_of
from gpt2_jax.generate import generate, prompt_tokens
from gpt2_jax.serving.request import CompletionRequest, RequestError


@dataclass(frozen=True)
class ServedModel:
    name: str
    plan: Plan
    params_N: jax.Array
    tokenizer: tiktoken.Encoding


@dataclass(frozen=True)
class Piece:
    """What a token has added to a text, or the end of the text what was held back of it."""

    index: int  # of the text, among the request's
    text: str
    finish: str | None = None  # stop or length, of the last piece
    num_tokens: int = 1


def tokens_of(model: ServedModel, request: CompletionRequest) -> list[int]:
    """The prompt's ids; RequestError where they and what is asked for do not fit the model's positions."""
    tokens, longest = prompt_tokens(request.prompt, model.tokenizer), model.plan.config.max_sequence_length
    if len(tokens) + request.max_tokens > longest:
        raise RequestError(
            f"prompt: expected at most {longest} tokens with max_tokens, the model's positions, found {len(tokens)} "
            f"and max_tokens {request.max_tokens}",
            "prompt",
            code="context_length_exceeded",
        )
    return tokens


def pieces(model: ServedModel, request: CompletionRequest, tokens: list[int], seed: int) -> Iterator[Piece]:
    """The request's texts, one after the other, a piece for every token. Text i draws from the seed `seed` + i."""
    for index in range(request.n):
        ids = generate(
            model.plan,
            model.params_N,
            tokens,
            request.max_tokens,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            min_p=request.min_p,
            num_choices=num_sampled_ids(model.tokenizer, model.plan.config.vocab_size),
            seed=seed + index,
        )
        yield from _pieces_of_text(model.tokenizer, request, index, ids)


def _pieces_of_text(
    tokenizer: tiktoken.Encoding, request: CompletionRequest, index: int, ids: Iterator[int]
) -> Iterator[Piece]:
    # A character's bytes may span tokens; it appears with its last byte.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    held = ""  # a stop string may have begun in it
    for token in ids:
        ends = token == tokenizer.eot_token
        held += decoder.decode(b"" if ends else text_of(tokenizer, token), final=ends)
        found = [place for stop in request.stop if (place := held.find(stop)) >= 0]
        if ends or found:
            yield Piece(index, held[: min(found)] if found else held, "stop")
            return
        shown = len(held) - max((_begun(held, stop) for stop in request.stop), default=0)
        yield Piece(index, held[:shown])
        held = held[shown:]
    yield Piece(index, held + decoder.decode(b"", final=True), "length", num_tokens=0)


def _begun(text: str, stop: str) -> int:
    """The characters at the end of a text that a stop string may begin with."""
    return next((length for length in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:length])), 0)
