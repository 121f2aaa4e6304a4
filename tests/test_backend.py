"""Which backend is chosen on which machine, and how the others are refused. Machines are imitated."""

from __future__ import annotations

import os
import platform
import sys

import pytest

from gpt2_jax import backend
from gpt2_jax.errors import Gpt2JaxError


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be a machine with this system, processor, NVIDIA driver and these installed plugins."""
    # Set first, so that what select_backend writes is undone after the test.
    monkeypatch.setenv("JAX_PLATFORMS", "")

    def pretend(system="linux", processor="x86_64", nvidia=False, plugins=()):
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr(platform, "machine", lambda: processor)
        monkeypatch.setattr(platform, "system", lambda: {"linux": "Linux", "darwin": "Darwin"}[system])
        monkeypatch.setattr(backend, "has_nvidia_driver", lambda: nvidia)
        find_spec = backend.importlib.util.find_spec
        ours = (*backend._CUDA_PLUGINS, *backend._METAL_PLUGINS)
        monkeypatch.setattr(
            backend.importlib.util, "find_spec", lambda name: (name in plugins or None) if name in ours else find_spec(name)
        )

    return pretend


def test_plain_linux_computes_on_the_cpu(machine):
    machine()
    chosen = backend.select_backend("auto")
    assert (chosen.name, chosen.reason) == ("cpu", "no accelerator was found")
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    assert backend.recommended_extra() == ""


def test_nvidia_with_the_plugin_is_taken(machine):
    machine(nvidia=True, plugins=["jax_cuda12_plugin"])
    for requested in ("auto", "cuda"):
        chosen = backend.select_backend(requested)
        assert chosen.name == "cuda"
        assert "custom_calls" in chosen.lacks
        assert chosen.donates
    assert os.environ["JAX_PLATFORMS"] == "cuda,cpu"
    assert backend.recommended_extra() == "cuda"


def test_nvidia_without_the_plugin_says_what_would_bring_it(machine):
    machine(nvidia=True)
    chosen = backend.select_backend("auto")
    assert chosen.name == "cpu"
    assert "pip install -e '.[cuda]'" in chosen.reason
    with pytest.raises(Gpt2JaxError, match=r"no plugin\n.*\.\[cuda\]"):
        backend.select_backend("cuda")


def test_cuda_plugin_without_a_gpu_is_refused(machine):
    machine(plugins=["jax_cuda12_plugin"])
    assert backend.select_backend("auto").name == "cpu"
    with pytest.raises(Gpt2JaxError, match=r"expected an NVIDIA GPU.*found none on this Linux x86_64"):
        backend.select_backend("cuda")


def test_metal_is_refused_off_the_mac(machine):
    machine()
    with pytest.raises(Gpt2JaxError, match=r"expected a Mac with Apple silicon, found Linux x86_64\n.*--backend auto"):
        backend.select_backend("metal")


def test_metal_is_refused_on_an_intel_mac(machine):
    machine(system="darwin", processor="x86_64")
    with pytest.raises(Gpt2JaxError, match="found Darwin x86_64"):
        backend.select_backend("metal")
    assert backend.select_backend("auto").name == "cpu"


def test_apple_silicon_takes_the_best_plugin(machine):
    machine(system="darwin", processor="arm64", plugins=["jax_plugins.mps", "jax_plugins.metal_plugin"])
    chosen = backend.select_backend("auto")
    assert (chosen.name, chosen.platform) == ("metal", "mps")
    assert not chosen.donates
    assert "jax_plugins.mps" in chosen.reason


@pytest.mark.parametrize(
    ("module", "platform_name"),
    # The modules and names of jax-mps, metaljax, jax-graft and jax-metal, as their wheels' entry points have them.
    [("jax_plugins.mps", "mps"), ("metaljax", "metal"), ("jax_graft", "mtl"), ("jax_plugins.metal_plugin", "METAL")],
)
def test_apple_plugins_go_by_their_own_platform_names(machine, module, platform_name):
    machine(system="darwin", processor="arm64", plugins=[module])
    assert backend.select_backend("metal").platform == platform_name
    assert os.environ["JAX_PLATFORMS"] == f"{platform_name},cpu"


def test_apple_silicon_without_a_plugin(machine):
    machine(system="darwin", processor="arm64")
    assert backend.select_backend("auto").name == "cpu"
    with pytest.raises(Gpt2JaxError, match=r"found none installed\n.*pip install"):
        backend.select_backend("metal")


@pytest.mark.parametrize(("version", "extra"), [((3, 11, 9), "metal"), ((3, 12, 0), "mps"), ((3, 14, 0), "mps")])
def test_the_extra_for_apple_silicon_depends_on_python(machine, monkeypatch, version, extra):
    machine(system="darwin", processor="arm64")
    monkeypatch.setattr(sys, "version_info", version)
    assert backend.recommended_extra() == extra


def test_jax_platforms_of_the_user_is_respected(machine, monkeypatch):
    machine(nvidia=True, plugins=["jax_cuda12_plugin"])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    chosen = backend.select_backend("auto")
    assert (chosen.name, chosen.reason) == ("cpu", "JAX_PLATFORMS=cpu is set")


def test_the_device_of_the_cpu_opens_and_is_no_substitute_for_another():
    assert "cpu" in backend.open_device(backend.Backend("cpu", "cpu", "test"))
    with pytest.raises(Gpt2JaxError, match="backend cuda: expected its device, found that jax opened the CPU instead"):
        backend.open_device(backend.Backend("cuda", "cuda", "test"))
