"""Text from a model, one token at a time. The forward pass runs on the device, the choice of the token on the host."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from itertools import takewhile

import jax
import jax.numpy as jnp
import numpy as np
import tiktoken

from gpt2_jax.compute.forward import next_token_logits
from gpt2_jax.compute.plan import Plan
from gpt2_jax.data.tokenizer import encode
from gpt2_jax.errors import Gpt2JaxError
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
    top_k: int | None = None,
    seed: int = SEED,
) -> Iterator[int]:
    """Yield `num_tokens` token ids that continue `prompt` (at least one id).

    The model sees as much of the text's end as it has positions. There is no cache: every token costs a full forward
    pass over the text so far, padded to a power of two so that few lengths are compiled.
    """
    tokens = list(prompt)
    generator, longest = XorShift(seed), plan.config.max_sequence_length
    for _ in range(num_tokens):
        context = tokens[-longest:]
        length = min(max(_SHORTEST_COMPILED_LENGTH, 1 << (len(context) - 1).bit_length()), longest)
        x_1T = np.zeros((1, length), dtype=np.int32)
        x_1T[0, : len(context)] = context
        logits_V = next_token_logits(plan, params_N, x_1T, np.int32(len(context) - 1))
        token = sample(np.asarray(logits_V), generator.uniform(), temperature=temperature, top_k=top_k)
        tokens.append(token)
        yield token


def sample(logits_V: np.ndarray, coin: np.float32, *, temperature: float = 1.0, top_k: int | None = None) -> int:
    """The token that a uniform `coin` in [0, 1) picks from softmax(logits / temperature), float32.

    With `top_k` only the k largest logits count; temperature 0 takes the largest. At temperature 1 without top_k this
    is llm.c's sample_softmax: exponentials without a shift, their total in float64, the running sum in float32.
    """
    if temperature == 0:
        return int(np.argmax(logits_V))
    scaled_V = logits_V if temperature == 1 else logits_V / np.float32(temperature)
    if top_k is not None and top_k < scaled_V.size:
        threshold = np.partition(scaled_V, -top_k)[-top_k]
        scaled_V = np.where(scaled_V >= threshold, scaled_V, -np.inf)
    if scaled_V.max() > _LARGEST_EXPONENT:
        scaled_V = scaled_V - scaled_V.max()
    weights_V = np.exp(scaled_V)
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
    top_k: int | None = None,
    seed: int = SEED,
) -> Iterator[str]:
    """Yield pieces of text that continue `prompt` up to an end-of-text token or `max_tokens`.

    `params` is the flat buffer. Raises Gpt2JaxError when the tokenizer's vocabulary is not the model's.
    """
    if tokenizer.n_vocab != plan.config.vocab_size:
        raise Gpt2JaxError(
            f"tokenizer: expected the model's {plan.config.vocab_size} tokens, found {tokenizer.n_vocab}",
            "--tokenizer FILE.bin   (the tokenizer file that the model was trained with)",
        )
    tokens = generate(
        plan,
        jnp.asarray(params),
        prompt_tokens(prompt, tokenizer),
        max_tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
    )
    # A character's bytes may span tokens; it appears with its last byte.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in takewhile(lambda token: token != tokenizer.eot_token, tokens):
        yield decoder.decode(tokenizer.decode_single_token_bytes(token))
    yield decoder.decode(b"", final=True)


def prompt_tokens(prompt: str, tokenizer: tiktoken.Encoding) -> list[int]:
    """A prompt's ids after an end-of-text token, with which every training document began."""
    return [tokenizer.eot_token, *encode(tokenizer, prompt)]
