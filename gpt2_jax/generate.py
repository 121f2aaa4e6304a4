"""Text from a model, one token at a time. The forward pass runs on the device, the choice of the token on the host."""

from __future__ import annotations

import codecs
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import tiktoken

from gpt2_jax.compute.decode import Cache, DecodingWeights, decoding_weights, empty_cache, extend
from gpt2_jax.compute.forward import next_token_logits
from gpt2_jax.compute.plan import Plan
from gpt2_jax.data.tokenizer import END_OF_TEXT, encode, num_sampled_ids, other_ids, refuse_larger_vocabulary, text_of
from gpt2_jax.errors import Gpt2JaxError, announce
from gpt2_jax.llmc.random import XorShift

SEED = 1337  # llm.c's; every sample of a run starts from it, so that samples of different steps can be compared
_LARGEST_SEED = 2**64 - 1  # XorShift's state
_MOST_SAMPLES = 1024
_LONGEST_STOP = 1000  # characters of a stop string
_SHORTEST_COMPILED_LENGTH = 64
_SORTED_AT_FIRST = 256  # tokens, to find those that top_p leaves
_LARGEST_EXPONENT = 80.0  # exp in float32 overflows from 88.7


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from its logits. Gpt2JaxError, naming the flag, for a value that means nothing."""

    temperature: float = 1.0  # below 1 safer, above wilder; 0: always the likeliest token
    top_k: int = 0  # only the k likeliest tokens; 0: all
    top_p: float = 1.0  # of these the likeliest whose probabilities first reach that sum
    min_p: float = 0.0  # of all, those of at least this fraction of the likeliest one's probability
    repetition_penalty: float = 1.0  # divides what speaks for a token that the text already has; 1: none

    def __post_init__(self) -> None:
        for name, fits, expected, instead in (
            ("temperature", self.temperature >= 0, "a finite number of at least 0", 0.8),
            ("top_k", self.top_k >= 0, "at least 0", 0),
            ("top_p", 0 < self.top_p <= 1, "a number above 0 and at most 1", 0.9),
            ("min_p", 0 <= self.min_p <= 1, "a number from 0 to 1", 0.9),
            ("repetition_penalty", self.repetition_penalty > 0, "a finite number above 0", 1.1),
        ):
            value = getattr(self, name)
            if not (fits and math.isfinite(value)):
                flag = f"--{name.replace('_', '-')}"
                raise Gpt2JaxError(f"{flag}: expected {expected}, found {value}", f"{flag} {instead}")


def generate(
    plan: Plan,
    weights: jax.Array | DecodingWeights,
    prompt: Sequence[int],
    num_tokens: int,
    *,
    sampling: Sampling = Sampling(),
    num_choices: int | None = None,
    seed: int = SEED,
    cached: bool = True,
) -> Iterator[int]:
    """The token ids of `generate_samples` with one sample."""
    samples = generate_samples(
        plan, weights, prompt, num_tokens, sampling=sampling, num_choices=num_choices, seed=seed, cached=cached
    )
    return (tokens[0] for tokens in samples)


def generate_samples(
    plan: Plan,
    weights: jax.Array | DecodingWeights,
    prompt: Sequence[int],
    num_tokens: int,
    *,
    num_samples: int = 1,
    sampling: Sampling = Sampling(),
    num_choices: int | None = None,
    seed: int = SEED,
    cached: bool = True,
) -> Iterator[list[int]]:
    """Yield `num_tokens` times the next token id of each of `num_samples` texts that continue `prompt` (at least one id),
    all below `num_choices` if it is given. Sample i draws from the seed `seed` + i.

    The texts are computed as one batch, from the flat buffer or what `decoding_weights` makes of it. The model sees as
    much of a text's end as it has positions. Keys and values of earlier tokens are cached while the texts fit the
    positions; behind that, and with `cached` off, every token costs a full forward pass over the text so far. Lengths are
    padded to powers of two so that few are compiled. Gpt2JaxError for a prompt with an id that is none of the model's, and
    for logits that are not finite.
    """
    vocab_size = plan.config.vocab_size
    if not prompt or not 0 <= min(prompt) <= max(prompt) < vocab_size:
        found = next((token for token in prompt if not 0 <= token < vocab_size), "none")
        raise Gpt2JaxError(f"prompt: expected at least one token id, all below the model's {vocab_size}, found {found}")
    if not isinstance(weights, DecodingWeights):
        weights = decoding_weights(plan, weights) if cached else DecodingWeights(weights, {})
    return _samples(plan, weights, np.array(prompt), num_tokens, num_samples, sampling, num_choices, seed, cached)


def _samples(
    plan: Plan,
    weights: DecodingWeights,
    prompt: np.ndarray,
    num_tokens: int,
    num_samples: int,
    sampling: Sampling,
    num_choices: int | None,
    seed: int,
    cached: bool,
) -> Iterator[list[int]]:
    generators = [XorShift(seed + number) for number in range(num_samples)]
    make = _cached_logits if cached and plan.backend.caches_keys else _uncached_logits
    next_logits = make(plan, weights, num_samples, len(prompt) + num_tokens)
    # The last positions alone are ever read; a prompt may be much longer.
    kept = prompt[-plan.config.max_sequence_length :].astype(np.int32)
    text_BT = np.tile(kept, (num_samples, 1))
    has_BV = np.zeros((num_samples, plan.config.vocab_size), dtype=bool)
    has_BV[:, prompt] = True
    for number in range(num_tokens):
        logits_BV = next_logits(text_BT, len(prompt) + number)
        tokens = []
        for row, generator in enumerate(generators):
            logits_V = logits_BV[row]
            if sampling.repetition_penalty != 1:
                logits_V = penalized(logits_V, has_BV[row], sampling.repetition_penalty)
            tokens.append(sample(logits_V[:num_choices], generator.uniform(), sampling))
        has_BV[np.arange(num_samples), tokens] = True
        text_BT = np.concatenate([text_BT, np.array(tokens, np.int32)[:, None]], axis=1)[:, -plan.config.max_sequence_length :]
        yield tokens


def compiled_length(length: int, longest: int) -> int:
    """The length that is compiled for texts of this one: a power of two, so that few are, or all positions."""
    return min(max(_SHORTEST_COMPILED_LENGTH, 1 << (length - 1).bit_length()), longest)


def _padded(tokens_BT: np.ndarray, length: int) -> np.ndarray:
    return np.pad(tokens_BT, ((0, 0), (0, length - tokens_BT.shape[1])))


# (the end of each text (B, T), of at most the positions; the length of the whole texts) -> logits (B, vocab_size)
_NextLogits = Callable[[np.ndarray, int], np.ndarray]


def _uncached_logits(plan: Plan, weights: DecodingWeights, num_samples: int, most_tokens: int) -> _NextLogits:
    """The logits after texts, by a full forward pass over their ends."""
    longest = plan.config.max_sequence_length

    def next_logits(text_BT: np.ndarray, length: int) -> np.ndarray:
        T = text_BT.shape[1]
        x_BT = _padded(text_BT, compiled_length(T, longest))
        return np.asarray(next_token_logits(plan, weights.flat_N, x_BT, np.int32(T - 1)))

    return next_logits


def _cached_logits(plan: Plan, weights: DecodingWeights, num_samples: int, most_tokens: int) -> _NextLogits:
    """The same for texts that grow by one token from call to call, up to `most_tokens`.

    The first call computes the whole text, the others its last token. When the text no longer fits the positions, its
    window moves and every token gets another position: nothing of the cache holds then, and full passes go on.
    """
    longest = plan.config.max_sequence_length
    room = compiled_length(min(most_tokens, longest), longest)
    uncached = _uncached_logits(plan, weights, num_samples, most_tokens)
    cache: Cache | None = None

    def next_logits(text_BT: np.ndarray, length: int) -> np.ndarray:
        nonlocal cache
        if length > longest:
            cache = None
            return uncached(text_BT, length)
        if cache is None:
            x_BT, start = _padded(text_BT, compiled_length(length, longest)), 0
            cache = empty_cache(plan, num_samples, room)
        else:
            x_BT, start = text_BT[:, -1:], length - 1
        logits_BV, cache = extend(plan, weights, cache, x_BT, start=start, last=length - 1 - start)
        return np.asarray(logits_BV)

    return next_logits


def penalized(logits_V: np.ndarray, has_V: np.ndarray, penalty: float) -> np.ndarray:
    """Logits in which those of the tokens that a text has are divided by the penalty where they are positive, and multiplied
    by it where they are not (the rule of CTRL, arXiv:1909.05858, as transformers has it)."""
    less_V = np.where(logits_V > 0, logits_V / np.float32(penalty), logits_V * np.float32(penalty))
    return np.where(has_V, less_V, logits_V)


def sample(logits_V: np.ndarray, coin: np.float32, sampling: Sampling = Sampling()) -> int:
    """The token that a uniform `coin` in [0, 1) picks from softmax(logits / temperature), float32. Of equal logits at the
    border of the k largest all count. Gpt2JaxError for logits that are not finite.

    At temperature 1 without other limits this is llm.c's sample_softmax: exponentials without a shift, their total in
    float64, the running sum in float32.
    """
    largest = logits_V.max()
    if not np.isfinite(largest):
        raise Gpt2JaxError(f"model: expected finite logits, found {largest}: its weights are damaged, or its training diverged")
    if sampling.temperature == 0:
        return int(np.argmax(logits_V))
    ids_K, scaled_K = None, logits_V
    if 0 < sampling.top_k < logits_V.size:
        # All other weights are zero, and zeros change no sum.
        ids_K = np.flatnonzero(logits_V >= np.partition(logits_V, -sampling.top_k)[-sampling.top_k])
        scaled_K = logits_V[ids_K]
    if sampling.temperature != 1:
        with np.errstate(over="ignore"):  # near temperature 0 the others' weights are exp(-inf), zero
            scaled_K = ((scaled_K - largest).astype(np.float64) / sampling.temperature).astype(np.float32)
    if scaled_K.max() > _LARGEST_EXPONENT:
        scaled_K = scaled_K - scaled_K.max()
    weights_K = np.exp(scaled_K)
    if sampling.top_p < 1:
        weights_K[_unlikely(weights_K, sampling.top_p)] = 0
    if sampling.min_p > 0:
        weights_K[weights_K < np.float32(sampling.min_p) * weights_K.max()] = 0
    target = np.float32(coin * weights_K.sum(dtype=np.float64))
    index = int(np.searchsorted(np.cumsum(weights_K, dtype=np.float32), target, side="right"))
    index = min(index, scaled_K.size - 1)
    return index if ids_K is None else int(ids_K[index])


def _unlikely(weights_K: np.ndarray, top_p: float) -> np.ndarray:
    """Which tokens come behind those whose weights, the largest first, first reach the fraction `top_p` of all, (K,) bool.
    Of equal weights the earlier ones come first."""
    enough = top_p * weights_K.sum(dtype=np.float64)
    # Few tokens reach it as a rule, and sorting all of them would take longer than the forward pass on a GPU.
    number = _SORTED_AT_FIRST
    while True:
        number = min(number, weights_K.size)
        ids = np.flatnonzero(weights_K >= np.partition(weights_K, -number)[-number])
        order = ids[np.argsort(-weights_K[ids], kind="stable")]
        sums = np.cumsum(weights_K[order], dtype=np.float64)
        if sums[-1] >= enough or ids.size == weights_K.size:
            break
        number *= 8
    is_unlikely = np.ones(weights_K.size, dtype=bool)
    is_unlikely[order[: int(np.searchsorted(sums, enough)) + 1]] = False  # the token with which the sum is reached stays
    return is_unlikely


class Sample:
    """A text as it grows, token by token."""

    def __init__(self, tokenizer: tiktoken.Encoding, stop: Sequence[str]):
        self.text = ""  # that can no longer change: a stop string may have begun behind it
        self.new = ""  # what the last token added to it
        self.num_tokens = 0
        self.finish = ""  # why it has ended: end_of_text, stop or length
        self._tokenizer, self._stop = tokenizer, stop
        # A character's bytes may span tokens; it appears with its last byte.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def add(self, token: int) -> None:
        """The next token, of a text that has not ended."""
        self.new = ""
        self.num_tokens += 1
        if token == self._tokenizer.eot_token:
            self.end("end_of_text")
        else:
            self._add_text(self._decoder.decode(text_of(self._tokenizer, token)))

    def end(self, finish: str) -> None:
        """No token follows."""
        self._add_text(self._decoder.decode(b"", final=True))
        if not self.finish:
            self._show(len(self._held))
            self.finish = finish

    def _add_text(self, text: str) -> None:
        before = len(self._held)
        self._held += text
        # A stop string that ends in the new text; what was held before has none.
        found = [place for stop in self._stop if (place := self._held.find(stop, max(0, before - len(stop) + 1))) >= 0]
        if found:
            self._show(min(found))
            self._held, self.finish = "", "stop"
        else:
            self._show(len(self._held) - max((_begun(self._held, stop) for stop in self._stop), default=0))

    def _show(self, length: int) -> None:
        self.text, self.new, self._held = self.text + self._held[:length], self.new + self._held[:length], self._held[length:]


def _begun(text: str, stop: str) -> int:
    """The characters at the end of a text that a stop string may begin with."""
    return next((length for length in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:length])), 0)


def check_request(max_tokens: int, num_samples: int, stop: Sequence[str], seed: int) -> None:
    """Gpt2JaxError, naming the flag, for a request that no model can meet."""
    if max_tokens < 1:
        raise Gpt2JaxError(f"--max-tokens: expected at least 1, found {max_tokens}", "--max-tokens 256")
    if isinstance(stop, str):  # a sequence of strings too: its characters
        raise Gpt2JaxError(f"--stop: expected a list of strings, found {stop!r}", f"stop=[{stop!r}]")
    for string in stop:
        if not 1 <= len(string) <= _LONGEST_STOP:
            found = f"one of {len(string)}"
            raise Gpt2JaxError(
                f"--stop: expected strings of 1 to {_LONGEST_STOP} characters, found {found}", "leave --stop out"
            )
    if not 1 <= num_samples <= _MOST_SAMPLES:
        raise Gpt2JaxError(f"--num-samples: expected 1 to {_MOST_SAMPLES}, found {num_samples}", "--num-samples 4")
    if not 1 <= seed <= _LARGEST_SEED - num_samples:
        raise Gpt2JaxError(f"--seed: expected at least 1 and below 2^64, found {seed}", f"--seed {SEED}")


def samples(
    plan: Plan,
    weights: jax.Array | DecodingWeights,
    tokenizer: tiktoken.Encoding,
    prompt: str,
    *,
    max_tokens: int,
    num_samples: int = 1,
    sampling: Sampling = Sampling(),
    stop: Sequence[str] = (),
    seed: int = SEED,
    say: Callable[[str], None] = announce,
) -> Iterator[list[Sample]]:
    """Yield the texts that continue `prompt`, always the same objects, after each token, until all have ended: by an
    end-of-text token, in front of one of the `stop` strings, or after `max_tokens`.

    A model with more ids than the tokenizer is one with padding or with added tokens, as `num_sampled_ids` has it, which is
    told to `say`. Gpt2JaxError for one with fewer: it was trained with another tokenizer; and as `generate_samples`.
    """
    vocab_size = plan.config.vocab_size
    refuse_larger_vocabulary(tokenizer, vocab_size)
    check_request(max_tokens, num_samples, stop, seed)
    if remark := other_ids(tokenizer, vocab_size):
        say(remark)
    if not plan.backend.caches_keys:
        say(f"generating: without a cache, which is not checked on {plan.backend.name}; every token costs a full forward pass")
    tokens = generate_samples(
        plan,
        weights,
        prompt_tokens(prompt, tokenizer),
        max_tokens,
        num_samples=num_samples,
        sampling=sampling,
        num_choices=num_sampled_ids(tokenizer, vocab_size),
        seed=seed,
    )
    return _grown([Sample(tokenizer, stop) for _ in range(num_samples)], tokens, max_tokens)


def _grown(texts: list[Sample], tokens: Iterator[list[int]], max_tokens: int) -> Iterator[list[Sample]]:
    for number, row in enumerate(tokens, start=1):
        for text, token in zip(texts, row, strict=True):
            if text.finish:
                text.new = ""
                continue
            text.add(token)
            if number == max_tokens and not text.finish:
                text.end("length")
        yield texts
        if all(text.finish for text in texts):
            return


@dataclass
class Speed:
    """How fast texts grew."""

    first_seconds: float = 0.0  # to the first token of each: the prompt, and what had to be compiled for it
    later_seconds: float = 0.0
    num_tokens: int = 0  # of all texts
    later_tokens: int = 0

    def of(self, grown: Iterator[list[Sample]]) -> Iterator[list[Sample]]:
        """The same texts, timed."""
        started = time.perf_counter()
        for number, texts in enumerate(grown):
            seconds, tokens = time.perf_counter() - started, sum(text.num_tokens for text in texts)
            if number == 0:
                self.first_seconds = seconds
            self.later_seconds, self.later_tokens = seconds - self.first_seconds, tokens - len(texts)
            self.num_tokens = tokens
            yield texts

    @property
    def rate(self) -> float | None:
        """Tokens of all texts a second after their first; None where none has more."""
        return self.later_tokens / self.later_seconds if self.later_tokens else None

    def __str__(self) -> str:
        later = "" if self.rate is None else f", then {self.rate:,.1f} tokens/s"
        return f"{self.num_tokens:,} tokens: the first after {self.first_seconds:.2f} s{later}"


def complete(
    plan: Plan,
    params: np.ndarray | jax.Array,
    tokenizer: tiktoken.Encoding,
    prompt: str,
    *,
    max_tokens: int,
    sampling: Sampling = Sampling(),
    stop: Sequence[str] = (),
    seed: int = SEED,
    say: Callable[[str], None] = announce,
) -> Iterator[str]:
    """The pieces of the one text of `samples`."""
    grown = samples(
        plan,
        jnp.asarray(params),
        tokenizer,
        prompt,
        max_tokens=max_tokens,
        sampling=sampling,
        stop=stop,
        seed=seed,
        say=say,
    )
    return (texts[0].new for texts in grown)


def prompt_tokens(prompt: str, tokenizer: tiktoken.Encoding) -> list[int]:
    """A prompt's ids after an end-of-text token, with which every training document began.

    '<|endoftext|>' in the prompt is that token, as in the text of a training corpus: it ends a document and begins the
    next. No document but the last may be blank, so one at the prompt's beginning adds nothing.
    """
    *ended, begun = prompt.split(END_OF_TEXT)
    documents = [*(document for document in ended if document.strip()), begun]
    return [token for document in documents for token in (tokenizer.eot_token, *encode(tokenizer, document))]
