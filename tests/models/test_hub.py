"""Models of the hub, from a server on this machine; in processes of their own, as the client reads its address once."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from gpt2_jax.llmc.model_file import write_model_file
from tests.conftest import REPOSITORY, TINY
from tests.hub_server import hub
from tests.interop.folders import state_dict, write_folder

pytest.importorskip("huggingface_hub")
LOAD = """
import sys
import numpy as np
from gpt2_jax.config import ModelSettings
from gpt2_jax.errors import run_program
from gpt2_jax.models.weights import load_weights, model_source
def main():
    for name in sys.argv[2:]:
        source = model_source(name)
        np.testing.assert_array_equal(load_weights(ModelSettings(init=source))[1], np.load(sys.argv[1]))
        print(source)
run_program(main)
"""


@pytest.fixture
def load(tmp_path, tiny_params):
    """A function that loads models by name in a process of its own, compares them, and gives what it prints."""
    np.save(tmp_path / "expected.npy", tiny_params)

    def run(endpoint, *names, status=0, **environment):
        variables = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": "", **environment}
        variables |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-c", LOAD, str(tmp_path / "expected.npy"), *names]
        ended = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300)
        assert ended.returncode == status, ended.stdout + ended.stderr
        return ended.stdout + ended.stderr

    return run


def test_models_by_name_come_from_the_hub_once(load, tmp_path, tiny_params):
    for name in ("openai-community/gpt2", "some/one"):
        folder = tmp_path / "hub" / "models" / name
        folder.mkdir(parents=True)
        write_folder(folder, TINY, state_dict(TINY, tiny_params))
        (folder / "tf_model.h5").write_bytes(b"not wanted")
    with hub(tmp_path / "hub") as (endpoint, requests):
        output = load(endpoint, "gpt2", "some/one", "hf:some/one")
        assert [line.split("/snapshots/")[0].rpartition("/")[2] for line in output.split()] == [
            "models--openai-community--gpt2",
            *["models--some--one"] * 2,
        ]
        assert not any("tf_model" in request for request in requests)
        assert sum(request.startswith("GET /some/one/resolve") for request in requests) == 2  # config and weights
        error = load(endpoint, "no/body", status=2)
        assert "no/body: expected the model no/body of the Hugging Face hub, found no such name there" in error
        assert "---> HINT: " in error
    # The cache is enough, offline and where nobody answers.
    load("http://127.0.0.1:9", "gpt2", HF_HUB_OFFLINE="1")
    load("http://127.0.0.1:9", "gpt2")
    error = load("http://127.0.0.1:9", "gpt2-xl", HF_HUB_OFFLINE="1", status=2)
    assert "gpt2-xl: expected the model openai-community/gpt2-xl of the Hugging Face hub, found offline mode" in error


def test_what_is_here_comes_first(load, tmp_path, tiny_params):
    (tmp_path / "some").mkdir()
    write_folder(tmp_path / "gpt2", TINY, state_dict(TINY, tiny_params))
    write_model_file(tmp_path / "some" / "model", TINY, tiny_params)
    assert load("http://127.0.0.1:9", "gpt2", "some/model").split() == ["gpt2", "some/model"]
    for name in ("some/modle", "runs/none", "missing/file.bin"):
        assert "hub" not in load("http://127.0.0.1:9", name, status=2).partition("HINT")[0]
