"""evaluate as a command: one JSON line, what each flag reads, and hostile input."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

import gpt2_jax
from gpt2_jax.commands import evaluate
from gpt2_jax.data.tokenizer import gpt2_tokenizer
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.llmc.eval_file import MultipleChoice, write_eval_file
from gpt2_jax.llmc.model_file import write_model_file
from gpt2_jax.llmc.token_shard import write_token_shard
from gpt2_jax.models.initialize import initialize_parameters

TEXT = "Once upon a time<|endoftext|>there was a small model.\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    config = GPT2Config(max_sequence_length=16, vocab_size=50257, num_layers=1, num_heads=1, channels=8)
    path = tmp_path_factory.mktemp("model") / "model.bin"
    write_model_file(path, config, initialize_parameters(config))
    return str(path)


@pytest.fixture
def run(model, capsys):
    def run_with(*words):
        evaluate.main([model, "--backend", "cpu", *map(str, words)])
        shown = capsys.readouterr()
        (line,) = shown.out.splitlines()
        return json.loads(line)

    return run_with


def test_a_text_and_the_shard_of_it_are_one(run, model, tmp_path):
    tokenizer = gpt2_tokenizer()
    (tmp_path / "book.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "book.jsonl").write_text(
        "\n".join(json.dumps({"body": part}) for part in TEXT.split("<|endoftext|>")), encoding="utf-8"
    )
    tokens = [token for part in TEXT.split("<|endoftext|>") for token in (50256, *tokenizer.encode_ordinary(part))]
    write_token_shard(tmp_path / "book_val.bin", np.array(tokens))
    record = run("--text", tmp_path / "book.txt", "--shards", tmp_path / "book_val.bin", "--stride", 3)
    found = record["text"]
    assert record["shards"] | {"source": ""} == found | {"source": ""}
    assert record["model"] == model
    assert (found["tokens"], found["bytes"]) == (len(tokens) - 1, len(TEXT.replace("<|endoftext|>", "").encode()))
    assert (found["sequence_length"], found["stride"]) == (16, 3)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2) * found["tokens"] / found["bytes"])
    of_lines = run("--text", tmp_path / "book.jsonl", "--text-field", "body", "--stride", 3)["text"]
    assert of_lines["loss"] == found["loss"]
    by_library = gpt2_jax.load(model, backend="cpu").evaluate(TEXT, stride=3)
    assert by_library.loss == found["loss"]


def test_several_shards_are_texts_of_their_own_and_the_first_tokens_count(run, tmp_path):
    for number, size in enumerate((30, 20)):
        write_token_shard(tmp_path / f"a_val_{number}.bin", np.arange(size))
    everything = run("--shards", tmp_path / "a_val_*.bin")["shards"]
    assert everything["tokens"] == 29 + 19
    assert run("--shards", tmp_path / "a_val_*.bin", "--tokens", 35)["shards"]["tokens"] == 29 + 4
    assert run("--shards", tmp_path / "a_val_*.bin", "--tokens", 30)["shards"]["tokens"] == 29


def test_hellaswag_from_both_of_its_files(run, tmp_path):
    tokenizer = gpt2_tokenizer()
    endings = ["runs", "sleeps well", "is blue", "eats"]
    lines = [json.dumps({"ctx": "The dog", "endings": endings, "label": label}) for label in range(4)]
    (tmp_path / "hellaswag.jsonl").write_text("\n".join(lines), encoding="utf-8")
    parts = [np.array(tokenizer.encode_ordinary(text), np.uint16) for text in ("The dog", *(f" {end}" for end in endings))]
    questions = [MultipleChoice(label, parts[0], tuple(parts[1:])) for label in range(4)]
    write_eval_file(tmp_path / "hellaswag.bin", questions)
    for name in ("hellaswag.jsonl", "hellaswag.bin"):
        found = run("--hellaswag", tmp_path / name)["hellaswag"]
        # One of the four labels is the one that the model takes each time.
        assert (found["accuracy"], found["right"], found["questions"]) == (0.25, 1, 4)


def test_last_words(run, tmp_path):
    (tmp_path / "lambada.jsonl").write_text('{"text": "the dog runs"}\n{"text": " a b \\n"}\n', encoding="utf-8")
    found = run("--lambada", tmp_path / "lambada.jsonl")["lambada"]
    assert (found["passages"], found["right"], found["accuracy"]) == (2, 0, 0)
    assert 1e4 < found["perplexity"] < 1e6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a b"}\n{"text"', "on line 2, found: Expecting ':'"),
        ('{"txt": "a b"}', 'on line 1, found: no "text"'),
        ('{"text": 3}', "on line 1, found: 'int' object"),
        ('{"text": "alone"}', "on line 1, found: a text without two words: 'alone'"),
        ('["text"]', "on line 1, found: list indices"),
        ("[" * 100_000, "on line 1, found: maximum recursion"),
        (json.dumps({"text": "a " + "xq" * 40}), "on line 1, found: a last word of [0-9]+ tokens, more than the model's 16"),
        ("", "expected at least one passage, found none"),
        (b"\xff\xfe{}", "found UTF-16"),
    ],
    ids=range(9),
)
def test_broken_passages_are_refused(run, tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(Gpt2JaxError, match=message):
        run("--lambada", tmp_path / "bad.jsonl")


def test_a_passage_of_a_million_characters_is_scored(run, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "word " * 200_000 + "end"}), encoding="utf-8")
    assert run("--lambada", tmp_path / "long.jsonl")["lambada"]["passages"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "evaluate: expected at least one of --text, --shards, --hellaswag, --lambada, found none"),
        (["--text", "none.txt"], "none.txt: expected a text file, found no such file"),
        (["--shards", "none_*.bin"], "--shards: expected at least one token shard"),
        (["--hellaswag", "none.bin"], "none.bin: expected a multiple-choice evaluation file, found no such file"),
        (["--text", "a.txt", "--stride", "17"], "--stride: expected 1 to 16, found 17"),
        (["--text", "a.txt", "--sequence-length", "17"], "--sequence-length: expected 1 to 16, found 17"),
        (["--text", "a.txt", "--batch-size", "0"], "--batch-size: expected at least 1, found 0"),
        (["--text", "a.txt", "--tokens", "1"], "--tokens: expected at least 2, found 1"),
        (["--text", "blank.txt"], "--text: expected at least a token of text, found none in blank.txt"),
    ],
    ids=str,
)
def test_what_cannot_be_evaluated(run, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "blank.txt").write_text(" \n<|endoftext|> ")
    with pytest.raises(Gpt2JaxError, match=message.replace("*", r"\*")):
        run(*words)


def test_questions_longer_than_the_model_are_refused(run, tmp_path):
    line = json.dumps({"ctx": "word " * 20, "endings": ["a", "b", "c", "d"], "label": 0})
    (tmp_path / "long.jsonl").write_text(line)
    with pytest.raises(Gpt2JaxError, match="expected questions below 17 tokens"):
        run("--hellaswag", tmp_path / "long.jsonl")
