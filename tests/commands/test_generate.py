"""generate as a command: where prompts come from, what is printed where, and hostile input."""

from __future__ import annotations

import io
import json
import sys

import pytest

from gpt2_jax.commands import generate
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.llmc.model_file import write_model_file
from gpt2_jax.models.initialize import initialize_parameters


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    config = GPT2Config(max_sequence_length=16, vocab_size=50257, num_layers=1, num_heads=1, channels=8)
    path = tmp_path_factory.mktemp("model") / "model.bin"
    write_model_file(path, config, initialize_parameters(config))
    return str(path)


@pytest.fixture
def run(model, capsys):
    def run_with(*words):
        generate.main([model, "--max-tokens", "4", "--backend", "cpu", *map(str, words)])
        return capsys.readouterr()

    return run_with


def type_in(monkeypatch, content: bytes):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def test_the_text_is_alone_on_standard_output(run):
    shown = run("--prompt", "In the")
    assert shown.out.startswith("In the ")
    assert shown.err.splitlines()[-1].startswith("4 tokens: the first after ")
    assert shown.err.endswith(" tokens/s\n")


def test_samples_are_one_json_line_each_and_those_of_their_seeds(run):
    lines = [json.loads(line) for line in run("--prompt", "In", "--num-samples", 2, "--json", "--seed", 7).out.splitlines()]
    assert [(line["prompt"], line["tokens"], line["finish"], line["sample"], line["seed"]) for line in lines] == [
        ("In", 4, "length", 0, 7),
        ("In", 4, "length", 1, 8),
    ]
    assert all(line["tokens_per_second"] > 0 and line["seconds_to_first_token"] > 0 for line in lines)
    assert run("--prompt", "In", "--seed", 8).out == f"In{lines[1]['text']}\n"
    assert lines[0]["text"] != lines[1]["text"]
    shown = run("--prompt", "In", "--num-samples", 2, "--seed", 7).out
    expected = [f"--- sample {number} of 2, seed {6 + number}\nIn{line['text']}\n" for number, line in enumerate(lines, 1)]
    assert shown == "".join(expected)


@pytest.mark.parametrize("from_input", [False, True])
def test_a_prompt_from_a_file_or_standard_input(run, tmp_path, monkeypatch, from_input):
    expected = run("--prompt", "In the\n\nbeginning").out
    content = b"In the\n\nbeginning\n"
    type_in(monkeypatch, content)
    (tmp_path / "prompt.txt").write_bytes(content)
    assert run("--prompt-file", "-" if from_input else tmp_path / "prompt.txt").out == expected


def test_prompts_from_json_lines(run, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "In"}\n\n{"prompt": "Käse\\n", "other": 1}\n', encoding="utf-8")
    lines = [json.loads(line) for line in run("--prompt-file", tmp_path / "prompts.jsonl", "--json").out.splitlines()]
    assert [line["prompt"] for line in lines] == ["In", "Käse\n"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "In"}\n{"prompt"', "on line 2, found: Expecting ':'"),
        ('{"text": "In"}', "on line 1, found: no prompt"),
        ('{"prompt": 3}', "on line 1, found: a prompt that is no text: 3"),
        ("[1]", "on line 1, found: "),
        ("null", "on line 1, found: "),
        ('{"prompt": "\\ud800"}', "on line 1, found: .*surrogates not allowed"),
        ("[" * 100_000, "on line 1, found: maximum recursion"),
        ("\n \n", "expected at least one line with a prompt, found none"),
        (b"\xff\xfe", "expected a prompt in UTF-8, found UTF-16"),
        (b"a\0b", "expected a prompt, found a zero byte"),
        (b"x" * 16_000_001, "expected a prompt of at most 16000000 bytes"),
    ],
    ids=range(11),
)
def test_broken_files_of_prompts_are_refused_before_any_model_is_read(tmp_path, content, message):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(Gpt2JaxError, match=message):
        generate.main(["no-such-model", "--backend", "cpu", "--prompt-file", str(path)])


def test_standard_input_without_an_end_is_refused(monkeypatch):
    class Endless(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            buffer[:] = b"a" * len(buffer)
            return len(buffer)

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Endless())))
    with pytest.raises(Gpt2JaxError, match="standard input: expected a prompt of at most 16000000 bytes, found more"):
        generate.main(["no-such-model", "--backend", "cpu", "--prompt-file", "-"])


def test_a_prompt_of_a_million_characters_is_continued(run, tmp_path):
    (tmp_path / "long.txt").write_text("word " * 200_000 + "end", encoding="utf-8")
    shown = run("--prompt-file", tmp_path / "long.txt", "--json")
    assert json.loads(shown.out)["tokens"] == 4


def test_interactive_answers_line_after_line(run, monkeypatch):
    type_in(monkeypatch, b"In\nthe\n")
    shown = run("--interactive")
    assert [line.split()[0] for line in shown.out.splitlines() if line] == ["In", "the"]
    assert shown.err.count(" tokens: ") == 2


def test_ctrl_c_ends_a_text_and_asks_again(run, monkeypatch):
    type_in(monkeypatch, b"In\nthe\n")
    texts = iter([KeyboardInterrupt, Gpt2JaxError("this one fails")])

    def fails(*arguments):
        raise next(texts)

    monkeypatch.setattr(generate, "_answer", fails)
    shown = run("--interactive")
    assert shown.out == "\n(stopped)\n\n"
    assert shown.err == "error: this one fails\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "a", "--interactive"], "--prompt: expected one source of prompts, found also --interactive"),
        (["--prompt-file", "-", "--interactive"], "--prompt-file: expected one source of prompts"),
        (["--temperature", "nan"], "--temperature: expected a finite number of at least 0, found nan"),
        (["--stop", ""], "--stop: expected strings of 1 to 1000 characters"),
        (["--max-tokens", "0"], "--max-tokens: expected at least 1, found 0"),
        (["--num-samples", "100000"], "--num-samples: expected 1 to 1024, found 100000"),
        (["--repetition-penalty", "0"], "--repetition-penalty: expected a finite number above 0, found 0"),
    ],
    ids=str,
)
def test_flags_that_mean_nothing_are_refused_before_any_model_is_read(words, message):
    with pytest.raises(Gpt2JaxError, match=message):
        generate.main(["no-such-model", "--backend", "cpu", *words])


def test_stop_and_dtype(run):
    text = json.loads(run("--prompt", "In", "--json").out)["text"]
    stopped = json.loads(run("--prompt", "In", "--json", "--stop", text[5:8]).out)
    assert (stopped["text"], stopped["finish"]) == (text[: text.index(text[5:8])], "stop")
    assert run("--prompt", "In", "--dtype", "bfloat16").out.startswith("In")
