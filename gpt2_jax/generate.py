"""Text from a model, one token at a time. The forward pass runs on the device, the choice of the token on the host."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile

import jax
import jax.numpy as jnp
import numpy as np
import tiktoken

from gpt2_jax.compute.decode import Cache, empty_cache, extend
from gpt2_jax.compute.forward import next_token_logits
from gpt2_jax.compute.plan import Plan
from gpt2_jax.data.tokenizer import END_OF_TEXT, encode, num_sampled_ids, other_ids, text_of
from gpt2_jax.errors import Gpt2JaxError, announce
from gpt2_jax.llmc.random import XorShift

SEED = 1337  # llm.c's; every sample of a run starts from it, so that samples of different steps can be compared
_SHORTEST_COMPILED_LENGTH = 64
_LARGEST_EXPONENT = 80.0  # exp in float32 overflows from 88.7


def generate(
    plan: Plan,
    params_N: jax.Array,
    prompt: Sequence[int],
    num_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    num_choices: int | None = None,
    seed: int = SEED,
    cached: bool = True,
) -> Iterator[int]:
    """Yield `num_tokens` token ids that continue `prompt` (at least one id), all below `num_choices` if it is given.

    The model sees as much of the text's end as it has positions. Keys and values of earlier tokens are cached while the
    text fits the positions; behind that, and with `cached` off, every token costs a full forward pass over the text so
    far. Lengths are padded to powers of two so that few are compiled. Gpt2JaxError for a prompt with an id that is none
    of the model's.
    """
    tokens, vocab_size = list(prompt), plan.config.vocab_size
    if not tokens or not 0 <= min(tokens) <= max(tokens) < vocab_size:
        found = next((token for token in tokens if not 0 <= token < vocab_size), "none")
        raise Gpt2JaxError(f"prompt: expected at least one token id, all below the model's {vocab_size}, found {found}")
    generator = XorShift(seed)
    make = _cached_logits if cached and plan.backend.caches_keys else _uncached_logits
    next_logits = make(plan, params_N, len(tokens) + num_tokens)
    choice = {"temperature": temperature, "top_p": top_p, "min_p": min_p}
    for _ in range(num_tokens):
        logits_V = next_logits(tokens)
        token = sample(logits_V[:num_choices], generator.uniform(), top_k=top_k, **choice)
        tokens.append(token)
        yield token


def _compiled_length(length: int, longest: int) -> int:
    """The length that is compiled for texts of this one: a power of two, so that few are, or all positions."""
    return min(max(_SHORTEST_COMPILED_LENGTH, 1 << (length - 1).bit_length()), longest)


def _padded(tokens: Sequence[int], length: int) -> np.ndarray:
    x_1T = np.zeros((1, length), dtype=np.int32)
    x_1T[0, : len(tokens)] = tokens
    return x_1T


def _uncached_logits(plan: Plan, params_N: jax.Array, most_tokens: int) -> Callable[[list[int]], np.ndarray]:
    """The logits (vocab_size,) after a text, by a full forward pass over its end."""
    longest = plan.config.max_sequence_length

    def next_logits(tokens: list[int]) -> np.ndarray:
        context = tokens[-longest:]
        x_1T = _padded(context, _compiled_length(len(context), longest))
        return np.asarray(next_token_logits(plan, params_N, x_1T, np.int32(len(context) - 1)))

    return next_logits


def _cached_logits(plan: Plan, params_N: jax.Array, most_tokens: int) -> Callable[[list[int]], np.ndarray]:
    """The same for a text that grows by one token from call to call, up to `most_tokens`.

    The first call computes the whole text, the others its last token. When the text no longer fits the positions, its
    window moves and every token gets another position: nothing of the cache holds then, and full passes go on.
    """
    longest = plan.config.max_sequence_length
    length = _compiled_length(min(most_tokens, longest), longest)
    uncached = _uncached_logits(plan, params_N, most_tokens)
    cache: Cache | None = None

    def next_logits(tokens: list[int]) -> np.ndarray:
        nonlocal cache
        if len(tokens) > longest:
            cache = None
            return uncached(tokens)
        if cache is None:
            x_1T, start = _padded(tokens, _compiled_length(len(tokens), longest)), 0
            cache = empty_cache(plan, 1, length)
        else:
            x_1T, start = _padded(tokens[-1:], 1), len(tokens) - 1
        last = len(tokens) - 1 - start
        logits_1V, cache = extend(plan, params_N, cache, x_1T, np.int32(start), np.int32(last))
        return np.asarray(logits_1V)[0]

    return next_logits


def sample(
    logits_V: np.ndarray,
    coin: np.float32,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> int:
    """The token that a uniform `coin` in [0, 1) picks from softmax(logits / temperature), float32.

    With `top_k` above 0 only the k largest logits count; of these, with `top_p` below 1, the likeliest whose probabilities
    first reach that sum; of all, those of at least `min_p` times the largest probability. Temperature 0 takes the largest.
    At temperature 1 without these this is llm.c's sample_softmax: exponentials without a shift, their total in float64,
    the running sum in float32.
    """
    if temperature == 0:
        return int(np.argmax(logits_V))
    scaled_V = logits_V
    if temperature != 1:
        with np.errstate(over="ignore"):  # near temperature 0 the others' weights are exp(-inf), zero
            scaled_V = ((logits_V - logits_V.max()).astype(np.float64) / temperature).astype(np.float32)
    if 0 < top_k < scaled_V.size:
        threshold = np.partition(scaled_V, -top_k)[-top_k]
        scaled_V = np.where(scaled_V >= threshold, scaled_V, -np.inf)
    if scaled_V.max() > _LARGEST_EXPONENT:
        scaled_V = scaled_V - scaled_V.max()
    weights_V = np.exp(scaled_V)
    if top_p < 1:
        order = np.argsort(-weights_V, kind="stable")
        sums = np.cumsum(weights_V[order], dtype=np.float64)
        reached = int(np.searchsorted(sums, top_p * sums[-1]))  # the token with which the sum is reached stays
        weights_V[order[reached + 1 :]] = 0
    if min_p > 0:
        weights_V[weights_V < np.float32(min_p) * weights_V.max()] = 0
    target = np.float32(coin * weights_V.sum(dtype=np.float64))
    index = int(np.searchsorted(np.cumsum(weights_V, dtype=np.float32), target, side="right"))
    return min(index, scaled_V.size - 1)


def complete(
    plan: Plan,
    params: np.ndarray,
    tokenizer: tiktoken.Encoding,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = SEED,
    say: Callable[[str], None] = announce,
) -> Iterator[str]:
    """Pieces of text that continue `prompt` up to an end-of-text token or `max_tokens`; `params` is the flat buffer.

    A model with more ids than the tokenizer is one with padding or with added tokens, as `num_sampled_ids` has it, which is
    told to `say`. Gpt2JaxError for one with fewer: it was trained with another tokenizer.
    """
    vocab_size = plan.config.vocab_size
    if vocab_size < tokenizer.n_vocab:
        raise Gpt2JaxError(
            f"tokenizer: expected at most the model's {vocab_size} tokens, found {tokenizer.n_vocab}",
            "--tokenizer FILE.bin   (the tokenizer file that the model was trained with)",
        )
    if remark := other_ids(tokenizer, vocab_size):
        say(remark)
    if not plan.backend.caches_keys:
        say(f"generating: without a cache, which is not checked on {plan.backend.name}; every token costs a full forward pass")
    tokens = generate(
        plan,
        jnp.asarray(params),
        prompt_tokens(prompt, tokenizer),
        max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        num_choices=num_sampled_ids(tokenizer, vocab_size),
        seed=seed,
    )
    return _text_pieces(tokens, tokenizer)


def _text_pieces(tokens: Iterator[int], tokenizer: tiktoken.Encoding) -> Iterator[str]:
    # A character's bytes may span tokens; it appears with its last byte.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in takewhile(lambda token: token != tokenizer.eot_token, tokens):
        yield decoder.decode(text_of(tokenizer, token))
    yield decoder.decode(b"", final=True)


def prompt_tokens(prompt: str, tokenizer: tiktoken.Encoding) -> list[int]:
    """A prompt's ids after an end-of-text token, with which every training document began.

    '<|endoftext|>' in the prompt is that token, as in the text of a training corpus: it ends a document and begins the
    next. No document but the last may be blank, so one at the prompt's beginning adds nothing.
    """
    *ended, begun = prompt.split(END_OF_TEXT)
    documents = [*(document for document in ended if document.strip()), begun]
    return [token for document in documents for token in (tokenizer.eot_token, *encode(tokenizer, document))]
