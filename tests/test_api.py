"""What `import gpt2_jax` offers, through that door."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

import gpt2_jax
from gpt2_jax.config import format_config
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.llmc.model_file import read_model_file, write_model_file
from gpt2_jax.models.initialize import initialize_parameters
from tests.conftest import change


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> gpt2_jax.Model:
    config = GPT2Config(max_sequence_length=16, vocab_size=50257, num_layers=1, num_heads=1, channels=8)
    path = tmp_path_factory.mktemp("model") / "model.bin"
    write_model_file(path, config, initialize_parameters(config))
    return gpt2_jax.load(path, backend="cpu")


def test_importing_is_light():
    code = (
        "import sys, gpt2_jax\n"
        "assert not {'jax', 'numpy', 'tyro'} & set(sys.modules)\n"
        "assert {'load', 'train', 'Model', 'Gpt2JaxError'} <= set(dir(gpt2_jax))\n"
        "from gpt2_jax import load\n"
        "assert callable(load) and 'jax' in sys.modules"
    )
    ended = subprocess.run([sys.executable, "-c", code], timeout=120, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    with pytest.raises(AttributeError, match="module 'gpt2_jax' has no attribute 'laod'"):
        _ = gpt2_jax.laod


def test_a_model_writes(model):
    text = model.generate("In the", max_tokens=6, seed=3)
    assert "".join(model.stream("In the", max_tokens=6, seed=3)) == text
    *_, samples = model.samples("In the", max_tokens=6, num_samples=2, seed=2)
    assert [sample.text for sample in samples][1] == text
    assert model.generate("In the", max_tokens=6, seed=3, stop=[text[4:7]]) == text[: text.index(text[4:7])]
    assert model.config.num_layers == 1


def test_a_model_in_bfloat16_and_from_a_folder_of_checkpoints(model, config, tiny_shards, tmp_path):
    folder = gpt2_jax.train(change(config, run={"steps": 2, "checkpoint_every": 1}, compute={"backend": "cpu"}))
    assert folder == tmp_path / "run"
    for step in (1, 2):
        loaded = gpt2_jax.load(folder, step=step, backend="cpu", dtype="bfloat16")
        assert loaded.source == str(folder / f"model_{step:08}.bin")
        np.testing.assert_array_equal(loaded.params, read_model_file(loaded.source)[1])
        assert loaded.plan.dtype == "bfloat16"
    with pytest.raises(gpt2_jax.Gpt2JaxError, match="expected at most the model's 203 tokens, found 50257"):
        loaded.generate("In")
    with pytest.raises(gpt2_jax.Gpt2JaxError, match="expected at most the model's 203 tokens, found 50257"):
        loaded.evaluate("In the beginning")
    assert loaded.evaluate(np.arange(40) % 203, stride=4).num_tokens == 39


def test_training_takes_a_file_and_its_tables(config, tmp_path):
    settings = change(config, run={"steps": 1, "out_dir": str(tmp_path / "a")}, compute={"backend": "cpu"})
    (tmp_path / "mine.toml").write_text(format_config(settings))
    tables = {
        name: {key: value for key, value in table.items() if value is not None}
        for name, table in dataclasses.asdict(change(settings, run={"out_dir": str(tmp_path / "b")})).items()
    }
    folders = [gpt2_jax.train(tmp_path / "mine.toml"), gpt2_jax.train(tables)]
    assert folders == [tmp_path / "a", tmp_path / "b"]
    first, second = (folder / "model_00000001.bin" for folder in folders)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": {"trian": "x"}}, "config: expected a setting of .data., found 'trian'; did you mean 'train'"),
        ({"dta": {}}, "config: expected only the tables"),
        ({"run": {"steps": "3"}}, "config: run.steps: expected int, found '3'"),
        ({"run": {"steps": -1}}, "--steps: expected at least 0"),
        ("demoo", "--config: expected a TOML file or one of"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(gpt2_jax.Gpt2JaxError, match=message):
        gpt2_jax.train(settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "--temperature: expected"),
        ({"max_tokens": 0}, "--max-tokens: expected"),
        ({"stop": [""]}, "--stop: expected"),
    ],
)
def test_requests_that_mean_nothing(model, options, message):
    with pytest.raises(gpt2_jax.Gpt2JaxError, match=message):
        model.generate("a", **options)


def test_a_string_is_no_list_of_stop_strings(model):
    with pytest.raises(gpt2_jax.Gpt2JaxError, match="--stop: expected a list of strings, found 'end'"):
        model.generate("a", stop="end")
