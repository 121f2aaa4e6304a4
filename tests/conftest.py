"""Settings and pieces that all tests share. Tests run on the CPU, under jax's strictest rules."""

from __future__ import annotations

import atexit
import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import signal
import sys
import tempfile

# Runs heed what was ignored when they began, and a shell has what it starts in the background ignore Ctrl-C: the tests'
# programs must not have that from here.
for name in ("SIGINT", "SIGHUP"):
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
        signal.signal(getattr(signal, name), signal.SIG_DFL)

os.environ["JAX_PLATFORMS"] = os.environ.get("GPT2_JAX_TEST_PLATFORMS", "cpu")
# Four virtual devices: code that takes the first device for the only one shows.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4".strip()
# Tests, and the programs that they run, compile the same few functions again and again; pytest-xdist's workers share them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="gpt2_jax-test-cache-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

import tests.shapes

# Before the modules are imported: the shapes in arrays' names are checked at every call.
install_import_hook(
    ["gpt2_jax.ops", "gpt2_jax.models", "gpt2_jax.buffer", "gpt2_jax.compute.step", "gpt2_jax.compute.forward"],
    f"{tests.shapes.checked.__module__}.{tests.shapes.checked.__name__}",
)

import gpt2_jax
from gpt2_jax import jax_compat
from gpt2_jax.buffer.layout import ParameterLayout
from gpt2_jax.compute import backend, metal_plugins
from gpt2_jax.compute.backend import Backend, cpu_backend
from gpt2_jax.compute.plan import Plan, make_plan
from gpt2_jax.config import ComputeSettings, RunConfig
from gpt2_jax.families.family import FamilyConfig
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.llmc.token_shard import write_token_shard
from gpt2_jax.models.initialize import initialize_parameters

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Machines are shared: a slow example is no failure, and the same examples run everywhere.
settings.register_profile("project", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("project")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("torch") and importlib.util.find_spec("torch") is None:
        pytest.skip("PyTorch is not installed")


REPOSITORY = Path(gpt2_jax.__file__).parents[1]

# Two layers and a vocabulary that is no multiple of 128, so that there are padding rows.
TINY = GPT2Config(max_sequence_length=16, vocab_size=203, num_layers=2, num_heads=4, channels=32)
CPU = cpu_backend("test")


def plan_of(
    config: FamilyConfig = TINY, *, backend: Backend = CPU, matmul: str = "xla", dtype: str = "float32", **compute: Any
) -> Plan:
    """How a test computes: by XLA's products on the CPU unless it says otherwise."""
    settings: dict[str, Any] = {"matmul": matmul, "dtype": dtype, **compute}
    return make_plan(ComputeSettings(**settings), backend, config)


# jax before 0.4.38: gradients are joined rather than written in place, and the barrier is XLA's.
can_alias = pytest.mark.skipif(
    not jax_compat.ffi_call_can_alias(), reason="this jax cannot alias a custom call's argument and result"
)


def available(implementations: Iterable[str]) -> list[Any]:
    """Names of matrix products as a test's parameters; what this machine cannot run is skipped with the reason."""
    refusals = dict(plan_of(matmul="auto").linear.refusals)
    return [
        pytest.param(name, marks=pytest.mark.skipif(name in refusals, reason=f"{name}: {refusals.get(name)}"))
        for name in implementations
    ]


@pytest.fixture(scope="session")
def tiny_layout() -> ParameterLayout:
    return TINY.layout


@pytest.fixture(scope="session")
def tiny_params() -> np.ndarray:
    """llm.c's initialization, then every tensor moved a little, so that biases and LayerNorm gains matter too."""
    params = initialize_parameters(TINY)
    layout = TINY.layout
    params += np.random.default_rng(0).normal(0, 0.02, params.shape).astype(np.float32)
    params[slice(*layout["wte"].padding_span)] = 0
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


@pytest.fixture
def config(tiny_shards: tuple[str, str], tmp_path: Path) -> RunConfig:
    """A run of eight steps of TINY, in the folder 'run'."""
    base = RunConfig()
    return RunConfig(
        model=dataclasses.replace(base.model, init="d6", **dataclasses.asdict(TINY)),
        data=dataclasses.replace(base.data, train=tiny_shards[0], validation=tiny_shards[1], batch_size=2, sequence_length=16),
        optimizer=dataclasses.replace(base.optimizer, learning_rate=1e-2, weight_decay=0.1),
        evaluation=dataclasses.replace(
            base.evaluation, validate_every=4, validation_batches=-1, sample_every=4, sample_tokens=5
        ),
        run=dataclasses.replace(base.run, steps=8, out_dir=str(tmp_path / "run")),
    )


def change(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """A copy with settings replaced: change(config, run={"steps": 3})."""
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    )


# What the wheels say of jax.
REQUIRES = {
    ("jax-mps", "0.11.1"): ["jax<0.12,>=0.11.0", "jaxlib<0.12,>=0.11.0"],
    ("metaljax", "0.11.9"): ["jax<0.12,>=0.11", "ml-dtypes", "numpy"],
    ("jax-graft", "0.0.5"): ["jax>=0.10.0", "jaxlib>=0.10.0", 'pytest; extra == "test"'],
    ("jax-metallib", "0.10.1.0"): ["jax<0.11,>=0.10.0", "jaxlib<0.11,>=0.10.0"],
    ("jax-metal", "0.1.1"): ["wheel~=0.35", "six>=1.15.0", "jaxlib>=0.4.34", "jax>=0.4.34"],
    ("gpt2_jax", "0.1.0"): ["jax!=0.10.0,!=0.10.1,<0.13,>=0.4.34", 'jax==0.5.0; extra == "metal"', "numpy>=1.26"],
}


@pytest.fixture
def machine(monkeypatch):
    """A function that pretends to be a machine: its system and processor, and the versions of what is installed there."""
    # Set first, so that what select_backend writes is undone after the test.
    for name in ("JAX_PLATFORMS", "ENABLE_PJRT_COMPATIBILITY", "MLX_ENABLE_TF32"):
        monkeypatch.setenv(name, "")

    def pretend(system="linux", processor="x86_64", nvidia=False, cuda_plugin=False, macos="", rosetta=False, **versions):
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr(platform, "machine", lambda: processor)
        monkeypatch.setattr(platform, "system", lambda: {"linux": "Linux", "darwin": "Darwin"}[system])
        monkeypatch.setattr(platform, "mac_ver", lambda: (macos, ("", "", ""), processor))
        monkeypatch.setattr(metal_plugins, "_runs_under_rosetta", lambda: rosetta)
        monkeypatch.setattr(backend, "has_nvidia_driver", lambda: nvidia)
        monkeypatch.setattr(backend, "_cuda_plugin_installed", lambda: cuda_plugin)
        installed = {name.replace("_", "-"): version for name, version in versions.items()}
        installed["gpt2_jax"] = "0.1.0"
        installed.setdefault("jaxlib", installed.get("jax"))
        monkeypatch.setattr("gpt2_jax.compute.metal_plugins.version_text", installed.get)
        monkeypatch.setattr("gpt2_jax.jax_compat.version_text", installed.get)
        # The tests' own jax has started, and stays as it is.
        monkeypatch.setattr("gpt2_jax.jax_compat.started_platform", lambda: None)
        monkeypatch.setattr("gpt2_jax.jax_compat.configure_imported_jax", lambda settings: None)
        monkeypatch.setattr(importlib.metadata, "requires", lambda name: REQUIRES[name, installed[name]])

    return pretend
