"""What the events of a run show of models with other vocabularies than GPT-2's."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gpt2_jax.data.tokenizer import gpt2_tokenizer
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.generate import generate, prompt_tokens
from gpt2_jax.llmc.model_file import write_model_file
from gpt2_jax.models.weights import load_weights
from gpt2_jax.training.evaluation import start_of_samples
from gpt2_jax.training.run import train
from tests.conftest import CPU, change, plan_of
from tests.test_generate import model_that_prefers

NO_SIZES = dict.fromkeys(("num_layers", "num_heads", "channels", "max_sequence_length", "vocab_size"))


def first_sample(config, model_file, capsys, **evaluation):
    """The text of the sample before the first step of a run from a model file, and what the run printed."""
    model = NO_SIZES | {"init": str(model_file)}
    evaluation = {"validate_every": 0, "sample_tokens": 3, **evaluation}
    folder = train(change(config, model=model, evaluation=evaluation, run={"steps": 1}), "tiny", CPU)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return next(line["text"] for line in lines if line["event"] == "sample"), capsys.readouterr().out


@pytest.mark.parametrize(
    ("vocab_size", "logits", "expected", "remark"),
    [
        (
            50304,
            {50300: 75, 995: 60},
            "Hello world world world",
            "ids from 50257 to 50303 are taken for padding and never chosen",
        ),
        (50258, {50257: 60}, "Hello" + "<|50257|>" * 3, "ids from 50257 to 50257 are no tokens of the tokenizer"),
    ],
)
def test_samples_of_a_larger_vocabulary_are_text(config, tmp_path, capsys, vocab_size, logits, expected, remark):
    plan, params = model_that_prefers(vocab_size, logits)
    write_model_file(tmp_path / "model.bin", plan.config, params)
    text, printed = first_sample(config, tmp_path / "model.bin", capsys, prompt="Hello")
    assert text == expected
    assert printed.count(remark) == 1


def test_samples_of_gpt2s_vocabulary_are_llmcs(config, tmp_path, capsys):
    """From the end-of-text token, at temperature 1, over all tokens."""
    model = {"init": "d6", "num_layers": 1, "num_heads": 1, "channels": 8, "max_sequence_length": 16, "vocab_size": 50257}
    changed = change(config, model=model, evaluation={"validate_every": 0, "sample_tokens": 6}, run={"steps": 1})
    sizes, params = load_weights(changed.model)
    write_model_file(tmp_path / "model.bin", sizes, params)
    text, printed = first_sample(config, tmp_path / "model.bin", capsys, sample_tokens=6)
    assert text == gpt2_tokenizer().decode(list(generate(plan_of(sizes), params, [50256], 6)))
    assert "vocabulary:" not in printed


def test_a_prompt_to_a_smaller_vocabulary_is_refused_before_anything_is_written(config, tmp_path):
    with pytest.raises(Gpt2JaxError, match=r"--prompt: expected none for a model of 203 tokens, .* found 'Hello'"):
        train(change(config, evaluation={"prompt": "Hello"}), "tiny", CPU)
    assert not (tmp_path / "run").exists()
    assert start_of_samples("", 203, gpt2_tokenizer()) == [202]


def test_prompts_of_runs_and_of_generate_are_read_alike():
    for prompt in ("", "Hello", "a<|endoftext|>b", "<|endoftext|>"):
        assert start_of_samples(prompt, 50257, gpt2_tokenizer()) == prompt_tokens(prompt, gpt2_tokenizer())
    assert np.max(start_of_samples("a<|endoftext|>b", 50304, gpt2_tokenizer())) == 50256
