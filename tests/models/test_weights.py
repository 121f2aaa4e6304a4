"""Where weights come from: a run folder stands for its newest complete checkpoint."""

from __future__ import annotations

import os
import shlex

import numpy as np
import pytest

from gpt2_jax.config import ModelSettings
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.models.weights import load_weights, model_source, read_sizes
from gpt2_jax.training.checkpoint import save_checkpoint
from tests.contract.checkpoint_sets import checkpoint_of


def test_a_run_folder_is_its_newest_complete_checkpoint(tmp_path, monkeypatch):
    saved = {step: checkpoint_of(step) for step in (5, 10, 15)}
    (tmp_path / "runs" / "a").mkdir(parents=True)
    for checkpoint in saved.values():
        save_checkpoint(tmp_path / "runs" / "a", checkpoint)
    (tmp_path / "runs" / "a" / "DONE_00000015").unlink()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "latest").symlink_to("a")
    for name in ("runs/a", "runs/a/", "runs/latest", "runs/latest/"):
        source = model_source(name)
        assert source == "runs/a/model_00000010.bin"
        np.testing.assert_array_equal(load_weights(ModelSettings(init=source))[1], saved[10].params)
        assert read_sizes(ModelSettings(init=source)) == saved[10].model
    assert model_source("runs/a", 5) == "runs/a/model_00000005.bin"
    with pytest.raises(Gpt2JaxError, match=r"complete checkpoint of step 14, found those of 5, 10") as refused:
        model_source("runs/a", 14)
    assert refused.value.hint == "--step 10"


def test_what_is_no_run_folder_stays_what_it_was(tmp_path):
    (tmp_path / "config.json").touch()
    (tmp_path / "gpt2.bin").touch()
    for init in ("d12", str(tmp_path), str(tmp_path / "gpt2.bin")):
        assert model_source(init) == init
        with pytest.raises(Gpt2JaxError, match="--step: expected a run folder"):
            model_source(init, 3)


def test_a_folder_of_neither_kind_names_both(tmp_path):
    with pytest.raises(Gpt2JaxError, match=r"a run folder \(.*\) or a Hugging Face folder \(config.json\), found neither"):
        model_source(str(tmp_path))
    (tmp_path / "model_00000005.bin").touch()
    with pytest.raises(Gpt2JaxError, match="with a complete checkpoint"):
        model_source(str(tmp_path))


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two runs, of which 'my run' was started last, in the runs/ of the working folder."""
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("my run", "older")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        save_checkpoint(tmp_path / "runs" / name, checkpoint_of(10))
        (tmp_path / "runs" / name / "config.toml").touch()
        os.utime(tmp_path / "runs" / name / "config.toml", (1000 - age, 1000 - age))
    (tmp_path / "runs" / "gone").symlink_to("nowhere")
    (tmp_path / "runs" / "latest").symlink_to("my run")
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("init", "found", "hint"),
    [
        ("runs/myrun", "no such name; there is my run in runs", "'runs/my run'   (the nearest name"),
        ("runs/latst", "no such name; there is latest in runs", "runs/latest   (the nearest name"),
        ("rns/older", "no such name; there is older in runs", "runs/older   (the nearest name"),
        ("runs/zzz", "no such name", "'runs/my run'   (the run that was started last)"),
        ("runs/gone", "a link to nowhere, which is not there", "'runs/my run'   (the run that was started last)"),
        ("runs", "found neither", "'runs/my run'   (the run that was started last)"),
        ("runs/myrun/model_10.bin", "there is model_00000010.bin", "'runs/my run/model_00000010.bin'"),
        ("d12x", "no such name", "d12   (random weights of this size)"),
        ("D24", "no such name", "d24   (random"),
        ("gpt3:768", "no such name", "gpt3:c768   (random"),
        ("gpt2_124M.bin", "no such name", "curl -fL -o gpt2_124M.bin https://"),
        ("elsewhere.bin", "no such name", "curl -fL --create-dirs -o 'gpt2/#1'"),
    ],
)
def test_a_name_that_is_not_there_brings_the_one_that_was_meant(runs, init, found, hint):
    with pytest.raises(Gpt2JaxError) as refused:
        model_source(init)
    assert found in refused.value.problem
    assert refused.value.hint.startswith(hint)
    if "curl" not in hint:  # a path or a descriptor, which stands for a model
        assert read_sizes(ModelSettings(init=model_source(shlex.split(refused.value.hint)[0])))


def test_where_there_is_no_run_the_command_that_makes_one_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for make in (lambda: None, (tmp_path / "runs").mkdir):
        make()
        for init in ("runs/latest", "runs/a"):
            with pytest.raises(Gpt2JaxError) as refused:
                model_source(init)
            assert refused.value.hint == "python scripts/train.py   (makes a run)"


def test_a_run_without_a_complete_checkpoint_is_a_run(runs):
    (runs / "older" / "DONE_00000010").unlink()
    with pytest.raises(Gpt2JaxError, match=r"with a complete checkpoint .* found model_00000010.bin") as refused:
        model_source("runs/older")
    assert refused.value.hint.startswith("runs/older/model_00000010.bin   (its weights alone")


@pytest.mark.parametrize(
    ("descriptor", "nearest"),
    [("d13", "d12"), ("d30", "d24"), ("d999", "d84"), ("gpt3:c769", "gpt3:c768"), ("gpt2:d13", "d12")],
)
def test_a_descriptor_of_no_known_size_brings_the_nearest_size(descriptor, nearest):
    with pytest.raises(Gpt2JaxError, match="expected one of d6, d12") as refused:
        read_sizes(ModelSettings(init=descriptor))
    assert refused.value.hint == nearest
