r"""Text of any length in chunks, so that the chunks' tokens one after another are the tokens of the whole text.

GPT-2 first cuts text into pieces by a regular expression (`tokenizer.py`) and then merges bytes within each piece. The
expression matches from left to right and never looks back, so the text after a place is tokenized as if it stood alone as
soon as a piece begins there. What is before the place is tokenized as if it stood alone if no piece before it changes when
the text ends there. Both hold at these places, which are called safe:

1. Between a character that is no white space and one that is. No piece holds the two in this order, and of the pieces
   before it none looks further ahead.
2. Before the last of several white-space characters when no white space follows it: `\s+(?!\S)` leaves this last one to
   the piece after it. If the text ended here, `\s++$` would take the same characters before it.
3. Between a letter, a digit and any other character that is no white space, where two of these kinds meet: no piece holds
   two kinds. The exception are contractions (`'s`, `'ll` …): between an apostrophe and a letter a place is only safe when
   the apostrophe ends several other characters, which are then one piece.

So between safe places there are runs of one kind of character, each with at most a space or an apostrophe before it. A run
that is longer than a chunk may be is cut into parts of a chunk's length, and each part has the tokens that a run of its
length has. Without this, tiktoken would end the process for a million spaces ("StackOverflow" of its regular expressions),
and its older versions would take time that grows with the square of a run's length.

Where the cuts lie depends on the text and the chunks' length alone, not on how the text was read.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

CHUNK_LENGTH = 2**14  # characters; a multiple of how many characters of one kind GPT-2's longest tokens have
# Unicode's White_Space, which `\s` is in tiktoken's expressions. Python's `\s` and str.isspace have U+001C to U+001F too.
_WHITE_SPACE = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | {chr(0x2000 + i) for i in range(11)}


class Chunk(NamedTuple):
    """A part of a document."""

    text: str
    ends_document: bool
    cuts_run: bool  # the text was cut at a place that is not safe


@dataclass
class CutRuns:
    """The runs of one kind of character that were too long for one chunk, to be announced."""

    number: int = 0
    first: str = ""  # how the first of them begins
    position: int = 0  # and at which character
    _position: int = 0  # of the next chunk
    _is_cut: bool = False  # whether the last chunk ended within a run

    def watch(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """The same chunks, counted while they pass."""
        for chunk in chunks:
            if chunk.cuts_run and not self._is_cut:
                self.number += 1
                if self.number == 1:
                    self.first, self.position = chunk.text[:8], self._position
            self._is_cut = chunk.cuts_run
            self._position += len(chunk.text)
            yield chunk

    def __str__(self) -> str:
        runs = "1 run" if self.number == 1 else f"{self.number:,} runs"
        return (
            f"{runs} of more than {CHUNK_LENGTH:,} characters of one kind (white space, letters, digits or others) cut after "
            f"every {CHUNK_LENGTH:,}, as tiktoken splits no longer ones; tokens at the cuts may differ from uncut ones; "
            f"the first run begins with {self.first!a} at character {self.position:,} of the documents"
        )


def documents(blocks: Iterable[str], separator: str) -> Iterator[tuple[str, bool]]:
    """The text between separators, in parts of which each may be empty, and whether a document ends with the part.

    `blocks` are the whole text, in order; a separator may lie across their borders.
    """
    held = ""
    for block in blocks:
        *ended, last = (held + block).split(separator)
        yield from ((part, True) for part in ended)
        # The last part may end with the beginning of a separator.
        length = next(
            n for n in range(min(len(separator) - 1, len(last)), -1, -1) if separator.startswith(last[len(last) - n :])
        )
        yield last[: len(last) - length], False
        held = last[len(last) - length :]
    yield held, True


def chunks(parts: Iterable[tuple[str, bool]], length: int = CHUNK_LENGTH) -> Iterator[Chunk]:
    """The text of each document in chunks of at most `length` characters (4 or more), the last of a document marked.

    `parts` are as `documents` yields them. An empty document is one empty chunk.
    """
    text = ""
    for part, ends_document in parts:
        text += part
        start = 0
        # Two characters behind a chunk decide where it ends; at a document's end there are none.
        while len(text) - start > length + (0 if ends_document else 2):
            stop, cuts_run = _chunk_end(text, start, start + length)
            yield Chunk(text[start:stop], False, cuts_run)
            start = stop
        text = text[start:]
        if ends_document:
            yield Chunk(text, True, False)
            text = ""


def _chunk_end(text: str, start: int, limit: int) -> tuple[int, bool]:
    """The last safe place up to `limit`; if there is none, a place within a run, and True."""
    for place in range(limit, start, -1):
        if _is_safe(text, place):
            return place, False
    # A part of one character would not always be cut as the end of a run: an apostrophe might begin a contraction.
    return (limit - 1 if _is_safe(text, limit + 1) else limit), True


def _is_safe(text: str, place: int) -> bool:
    """Whether the tokens before and after `place` do not depend on one another; False at the text's end."""
    if place >= len(text):
        return False
    before, after = text[place - 1], text[place]
    if after in _WHITE_SPACE:
        return before not in _WHITE_SPACE or (place + 1 < len(text) and text[place + 1] not in _WHITE_SPACE)
    kinds = _kind(before), _kind(after)
    if "" in kinds or kinds[0] == kinds[1]:
        return False
    return before != "'" or kinds[1] != "L" or (place >= 2 and _kind(text[place - 2]) == "O")


@lru_cache(maxsize=2**16)
def _kind(character: str) -> str:
    """L (letter), N (digit) or O (other); empty for white space, and where versions of Unicode may differ.

    tiktoken has a Unicode of its own. A character of the same kind in Unicode 3.2 and in Python's has it there too.
    """
    old, new = unicodedata.ucd_3_2_0.category(character), unicodedata.category(character)
    if character in _WHITE_SPACE or old in ("Cn", "Cs"):  # not assigned then; half of a pair, which tiktoken joins
        return ""
    kinds = {category[0] if category[0] in "LN" else "O" for category in (old, new)}
    return kinds.pop() if len(kinds) == 1 else ""
