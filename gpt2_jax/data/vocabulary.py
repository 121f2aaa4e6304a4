"""A vocabulary of a text's own: byte-pair encoding (Sennrich et al. 2016) over GPT-2's pieces of text, for small models.

Of GPT-2's 50,257 tokens a small model spends most of its work on the classifier. With some hundred tokens of its own it
learns words in minutes.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable

from gpt2_jax.data.tokenizer import END_OF_TEXT, split_into_pieces
from gpt2_jax.errors import Gpt2JaxError

SMALLEST, LARGEST = 257, 65536  # all bytes and the end of text; what 16 bits hold
MAX_CHARACTERS = 2**24  # of the text that it is made of
_MAX_PIECE_BYTES = 64  # longer ones are no words


def train_vocabulary(texts: Iterable[str], size: int) -> list[bytes]:
    """The bytes of `size` tokens by their ids: the 256 bytes, the results of merges by their rank, the end of text.

    Each merge is of the pair that is most frequent in the text's beginning of 16 million characters; of pairs that are
    equally frequent the one with the smaller bytes, so that a text always gives the same vocabulary. Gpt2JaxError for a
    size out of range and for a text with too few pairs.
    """
    if not SMALLEST <= size <= LARGEST:
        raise Gpt2JaxError(f"--vocabulary: expected {SMALLEST} to {LARGEST} tokens, found {size}", "--vocabulary 1024")
    counts = _counted_pieces(texts)
    tokens = [bytes([byte]) for byte in range(256)]
    id_of = {token: token_id for token_id, token in enumerate(tokens)}
    words = [list(piece) for piece in counts]
    numbers = list(counts.values())
    pairs: Counter[tuple[int, int]] = Counter()
    places: dict[tuple[int, int], set[int]] = defaultdict(set)  # the words in which a pair may be

    def count(index: int, sign: int) -> None:
        for pair in itertools.pairwise(words[index]):
            pairs[pair] += sign * numbers[index]
            places[pair].add(index)

    for index in range(len(words)):
        count(index, 1)
    while len(tokens) < size - 1:
        best = min(pairs, key=lambda pair: (-pairs[pair], tokens[pair[0]], tokens[pair[1]]), default=None)
        if best is None or pairs[best] < 2:
            raise Gpt2JaxError(
                f"--vocabulary {size}: expected a text with enough repeated pairs, found only {len(tokens) + 1} tokens in it",
                f"--vocabulary {len(tokens) + 1}",
            )
        token = tokens[best[0]] + tokens[best[1]]
        if token not in id_of:  # else two ways lead to the same bytes, which are one token
            id_of[token] = len(tokens)
            tokens.append(token)
        for index in places.pop(best):
            count(index, -1)
            words[index] = _merged(words[index], best, id_of[token])
            count(index, 1)
        del pairs[best]
    return [*tokens, END_OF_TEXT.encode()]


def _counted_pieces(texts: Iterable[str]) -> Counter[bytes]:
    counts: Counter[bytes] = Counter()
    room = MAX_CHARACTERS
    for text in texts:
        counts.update(piece.encode("utf-8", "replace") for piece in split_into_pieces(text[:room]))
        room -= len(text)
        if room <= 0:
            break
    return Counter({piece: count for piece, count in counts.items() if len(piece) <= _MAX_PIECE_BYTES})


def _merged(word: list[int], pair: tuple[int, int], token_id: int) -> list[int]:
    merged, index = [], 0
    while index < len(word):
        if index + 1 < len(word) and (word[index], word[index + 1]) == pair:
            merged.append(token_id)
            index += 2
        else:
            merged.append(word[index])
            index += 1
    return merged
