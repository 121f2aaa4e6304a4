"""A vocabulary of a text's own: what it has, that tiktoken merges as it was made, and that a run keeps it."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_jax.commands import generate, prepare
from gpt2_jax.data.kjv import kjv_chapters
from gpt2_jax.data.tokenizer import own_tokenizer, split_into_pieces, tokenizer_beside, tokenizer_from_file
from gpt2_jax.data.vocabulary import train_vocabulary
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc.token_shard import open_token_shard
from gpt2_jax.training.run import train
from tests.conftest import CPU, change


def plain_vocabulary(text: str, size: int) -> list[bytes]:
    """The same by counting everything anew after each merge."""
    words = Counter(tuple(bytes([byte]) for byte in piece.encode()) for piece in split_into_pieces(text))
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < size - 1:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if best[0] + best[1] not in tokens:
            tokens.append(best[0] + best[1])
        merged: Counter[tuple[bytes, ...]] = Counter()
        for word, count in words.items():
            out: list[bytes] = []
            for part in word:
                # Pairs are merged from the left, each part once.
                if out and (out[-1], part) == best and not (len(out[-1]) > len(best[0])):
                    out[-1] += part
                else:
                    out.append(part)
            merged[tuple(out)] += count
        words = merged
    return [*tokens, b"<|endoftext|>"]


@pytest.mark.parametrize("size", [257, 300, 400])
def test_it_is_the_plain_algorithms(size):
    text = "".join(kjv_chapters()[:3]) + " naïve 日本日本 aaaa aaaaa bcbc"
    assert train_vocabulary([text[:5000], text[5000:]], size)[:256] == [bytes([byte]) for byte in range(256)]
    assert train_vocabulary([text], size) == plain_vocabulary(text, size)


@given(st.text(max_size=60))
def test_any_text_comes_back(text):
    tokenizer = own_tokenizer(train_vocabulary(["the quick brown fox, the lazy dog; " * 9], 280), "x")
    tokens = tokenizer.encode_ordinary(text)
    assert max(tokens, default=0) < 279
    assert tokenizer.decode_bytes(tokens) == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


@pytest.mark.parametrize(
    ("text", "size", "found"),
    [("a b", 256, "expected 257 to 65536"), ("a b", 70000, "expected 257 to 65536"), ("ab ab", 300, "found only 2")],
)
def test_sizes_that_a_text_has_not_are_refused(text, size, found):
    with pytest.raises(Gpt2JaxError, match=found) as refused:
        train_vocabulary([text], size)
    assert refused.value.hint.startswith("--vocabulary ")


def test_a_run_on_it_keeps_it_and_generate_finds_it(config, tmp_path, capsys, monkeypatch):
    (tmp_path / "book.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    prepare.main(["--source", str(tmp_path / "book.txt"), "--output-dir", str(tmp_path / "data"), "--vocabulary", "280"])
    shard = tmp_path / "data" / "book280_train.bin"
    tokenizer = tokenizer_from_file(tmp_path / "data" / "book280_tokenizer.bin")
    assert tokenizer.decode(np.asarray(open_token_shard(shard))[:40].tolist()).startswith("<|endoftext|>the quick brown fox")
    assert [tokenizer_beside(shard.with_name(name)) for name in ("book280_train_*.bin", "other_train.bin")] == [
        tmp_path / "data" / "book280_tokenizer.bin",
        None,
    ]
    settings = change(
        config,
        model={"vocab_size": 280},
        data={"train": str(shard), "validation": ""},
        evaluation={"prompt": "the quick", "sample_tokens": 8},
        run={"steps": 4},
    )
    folder = train(settings, "tiny", CPU)
    assert (folder / "tokenizer.bin").read_bytes() == (tmp_path / "data" / "book280_tokenizer.bin").read_bytes()
    assert "\nthe quick" in capsys.readouterr().out  # a sample is text, not numbers
    generate.main([str(folder), "--prompt", "the quick", "--max-tokens", "4", "--backend", "cpu"])
    assert capsys.readouterr().out.startswith("the quick")
    with pytest.raises(Gpt2JaxError, match=r"--vocab-size: expected 280, the tokens of .*, found 281"):
        train(change(settings, model={"vocab_size": 281}, run={"out_dir": str(tmp_path / "run2")}), "tiny", CPU)
    assert not Path(tmp_path / "run2").exists()
