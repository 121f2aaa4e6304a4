"""HellaSwag's JSONL file: which lines are questions, and what is refused."""

from __future__ import annotations

import json

import pytest

from gpt2_jax.data.hellaswag import read_hellaswag, write_hellaswag
from gpt2_jax.data.tokenizer import gpt2_tokenizer
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc.eval_file import read_eval_file

QUESTION = {
    "ind": 24,
    "ctx": "Roof shingle removal: A man is sitting on a roof. he",
    "endings": ["a.", "b b.", "c.", "d."],
    "label": 3,
}


def test_hellaswags_questions_have_endings_after_a_space(tmp_path):
    path = tmp_path / "hellaswag_val.jsonl"
    path.write_text("\n".join(json.dumps(QUESTION | {"label": label}) for label in (3, 0)), encoding="utf-8")
    examples = read_hellaswag(path)
    assert [example.label for example in examples] == [3, 0]
    tokenizer = gpt2_tokenizer()
    assert tokenizer.decode(examples[0].context.tolist()) == QUESTION["ctx"]
    assert [tokenizer.decode(part.tolist()) for part in examples[1].completions] == [" a.", " b b.", " c.", " d."]
    written = write_hellaswag(examples, "hellaswag_val", tmp_path / "data")
    assert written == tmp_path / "data" / "hellaswag_val.bin"
    assert [example.label for example in read_eval_file(written)] == [3, 0]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "7",
        json.dumps({"ctx": "a"}),
        json.dumps(QUESTION | {"label": 4}),
        json.dumps(QUESTION | {"label": "x"}),
        json.dumps(QUESTION | {"label": ""}),
        json.dumps(QUESTION | {"label": "4"}),
        json.dumps(QUESTION | {"label": -1}),
        json.dumps(QUESTION | {"label": True}),
        json.dumps(QUESTION | {"label": 1.0}),
        json.dumps(QUESTION | {"endings": "abcd"}),
        json.dumps(QUESTION | {"endings": ["a"]}),
        json.dumps(QUESTION | {"endings": 5}),
        json.dumps(QUESTION | {"ctx": ""}),
        json.dumps(QUESTION | {"ctx": 5}),
        "[" * 100_000,
    ],
    ids=range(17),
)
def test_a_line_that_is_no_question_is_named(tmp_path, line):
    path = tmp_path / "hellaswag_val.jsonl"
    path.write_text(json.dumps(QUESTION) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(Gpt2JaxError, match="expected an object with ctx, 4 endings and the label of one on line 2"):
        read_hellaswag(path)


def test_only_a_line_feed_ends_a_line(tmp_path):
    """JSON's strings may hold all other characters at which Python's splitlines ends one."""
    path = tmp_path / "hellaswag_val.jsonl"
    odd = "a\u2028b\u2029c\x85d"
    line = json.dumps(QUESTION | {"ctx": odd, "label": "2"}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + f"\n{line}\r\n\r\n  \n{line}".encode())
    examples = read_hellaswag(path)
    assert [example.label for example in examples] == [2, 2]
    assert gpt2_tokenizer().decode(examples[1].context.tolist()) == odd
