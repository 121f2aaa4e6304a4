"""Settings and pieces that all tests share. Tests run on the CPU, under jax's strictest rules."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests, and the programs that they run, compile the same few functions again and again.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="gpt2_jax-test-cache-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import settings

import gpt2_jax
from gpt2_jax.initialize import initialize_parameters
from gpt2_jax.layout import ModelConfig, ParameterLayout
from gpt2_jax.llmc.token_shard import write_token_shard

atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Machines are shared: a slow example is no failure, and the same examples run everywhere.
settings.register_profile("project", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("project")

REPOSITORY = Path(gpt2_jax.__file__).parents[1]

# Two layers and a vocabulary that is no multiple of 128, so that there are padding rows.
TINY = ModelConfig(max_sequence_length=16, vocab_size=203, num_layers=2, num_heads=4, channels=32)


@pytest.fixture(scope="session")
def tiny_layout() -> ParameterLayout:
    return ParameterLayout(TINY)


@pytest.fixture(scope="session")
def tiny_params() -> np.ndarray:
    """llm.c's initialization, then every tensor moved a little, so that biases and LayerNorm gains matter too."""
    params = initialize_parameters(TINY)
    layout = ParameterLayout(TINY)
    params += np.random.default_rng(0).normal(0, 0.02, params.shape).astype(np.float32)
    params[slice(*layout.padding_span)] = 0
    params.setflags(write=False)
    return params


@pytest.fixture(scope="session")
def tiny_batch() -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets (3, 16) int32."""
    tokens = np.random.default_rng(1).integers(0, TINY.vocab_size, (3, 17)).astype(np.int32)
    return tokens[:, :-1], tokens[:, 1:]


@pytest.fixture
def tiny_shards(tmp_path: Path) -> tuple[str, str]:
    """Paths of a training shard (2,000 tokens with a pattern to learn) and a validation shard (300) for TINY."""
    tokens = np.cumsum(np.random.default_rng(2).integers(1, 4, 2300)) % TINY.vocab_size
    paths = str(tmp_path / "tiny_train.bin"), str(tmp_path / "tiny_val.bin")
    write_token_shard(paths[0], tokens[:2000])
    write_token_shard(paths[1], tokens[2000:])
    return paths
