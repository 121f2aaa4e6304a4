"""The texts of one request, as they grow: the only place where the server asks the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import tiktoken

from gpt2_jax.compute.decode import DecodingWeights
from gpt2_jax.compute.plan import Plan
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.generate import Sampling, prompt_tokens, samples
from gpt2_jax.serving.request import CompletionRequest, RequestError

_FINISH = {"": None, "end_of_text": "stop", "stop": "stop", "length": "length"}


@dataclass(frozen=True)
class ServedModel:
    name: str
    plan: Plan
    weights: DecodingWeights
    tokenizer: tiktoken.Encoding


@dataclass(frozen=True)
class Piece:
    """What one token has added to a text."""

    index: int  # of the text, among the request's
    text: str
    finish: str | None = None  # stop or length, of the last piece


def check_length(model: ServedModel, request: CompletionRequest) -> int:
    """The prompt's tokens; RequestError where they and what is asked for do not fit the model's positions."""
    tokens, longest = len(prompt_tokens(request.prompt, model.tokenizer)), model.plan.config.max_sequence_length
    if tokens + request.max_tokens > longest:
        raise RequestError(
            f"prompt: expected at most {longest} tokens with max_tokens, the model's positions, found {tokens} "
            f"and max_tokens {request.max_tokens}",
            "prompt",
            code="context_length_exceeded",
        )
    return tokens


def pieces(model: ServedModel, request: CompletionRequest, seed: int) -> Iterator[Piece]:
    """The request's texts, which grow together, a piece for every token. Text i draws from the seed `seed` + i."""
    sampling = Sampling(request.temperature, request.top_k, request.top_p, request.min_p)
    grown = samples(
        model.plan,
        model.weights,
        model.tokenizer,
        request.prompt,
        max_tokens=request.max_tokens,
        num_samples=request.n,
        sampling=sampling,
        stop=request.stop,
        seed=seed,
        say=lambda remark: None,  # of the model, and said when the server began
    )
    seen = [0] * request.n
    try:
        for texts in grown:
            for index, text in enumerate(texts):
                if text.num_tokens > seen[index]:
                    seen[index] = text.num_tokens
                    yield Piece(index, text.new, _FINISH[text.finish])
    except Gpt2JaxError as error:
        raise RequestError(error.problem, status=500) from None
