"""Where weights come from: a run folder stands for its newest complete checkpoint."""

from __future__ import annotations

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
    for name in ("runs/a", "runs/a/", "runs/latest"):
        source = model_source(name)
        assert source.endswith("/model_00000010.bin")
        np.testing.assert_array_equal(load_weights(ModelSettings(init=source))[1], saved[10].params)
        assert read_sizes(ModelSettings(init=source)) == saved[10].model
    assert model_source("runs/a", 5) == "runs/a/model_00000005.bin"
    with pytest.raises(Gpt2JaxError, match=r"complete checkpoint of step 14, found those of 5, 10") as refused:
        model_source("runs/a", 14)
    assert refused.value.hint == "--step 10"


def test_what_is_no_run_folder_stays_what_it_was(tmp_path):
    (tmp_path / "config.json").touch()
    for init in ("d12", str(tmp_path), "gpt2.bin"):
        assert model_source(init) == init
        with pytest.raises(Gpt2JaxError, match="--step: expected a run folder"):
            model_source(init, 3)


def test_a_folder_of_neither_kind_names_both(tmp_path):
    with pytest.raises(Gpt2JaxError, match=r"a run folder \(.*\) or a Hugging Face folder \(config.json\), found neither"):
        model_source(str(tmp_path))
    (tmp_path / "model_00000005.bin").touch()
    with pytest.raises(Gpt2JaxError, match="with a complete checkpoint"):
        model_source(str(tmp_path))
