"""Passages whose last word is to be foretold, as LAMBADA has them: from JSON Lines of {"text": ...}."""

from __future__ import annotations

import json
import os

import numpy as np
import tiktoken

from gpt2_jax.data.tokenizer import encode
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.evaluate import LastWord
from gpt2_jax.files import json_lines, read_text_file

_MAX_BYTES = 100_000_000
HINT = "https://huggingface.co/datasets/EleutherAI/lambada_openai has data/lambada_test_en.jsonl"


def read_last_words(path: str | os.PathLike, tokenizer: tiktoken.Encoding, longest: int) -> list[LastWord]:
    """The passages of a file of JSON Lines. The word is what follows the last space, tokenized with that space, as
    lm-evaluation-harness has it.

    Gpt2JaxError, naming the line, for one that is not an object with a "text" of at least two words, and for a last word of
    more than `longest` tokens.
    """
    passages = []
    for number, line in json_lines(read_text_file(path, "passages in JSON Lines", HINT, max_bytes=_MAX_BYTES)):
        try:
            text = json.loads(line)["text"]
            context, space, word = text.strip().rpartition(" ")
            if not (context and word):
                raise ValueError(f"a text without two words: {text!r:.40}")
            parts = LastWord(*(np.array(encode(tokenizer, part), np.uint16) for part in (context, space + word)))
            if parts.word.size > longest:
                raise ValueError(f"a last word of {parts.word.size} tokens, more than the model's {longest} positions")
        except KeyError:
            raise _refusal(path, number, 'no "text"') from None
        except (ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise _refusal(path, number, error) from None
        passages.append(parts)
    if not passages:
        raise Gpt2JaxError(f"{path}: expected at least one passage, found none", HINT)
    return passages


def _refusal(path: str | os.PathLike, number: int, found: object) -> Gpt2JaxError:
    return Gpt2JaxError(f'{path}: expected an object such as {{"text": "..."}} on line {number}, found: {found}', HINT)
