"""Which backend is chosen on which machine, and how the others are refused. Machines are imitated."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2_jax.compute import backend, metal_plugins
from gpt2_jax.errors import Gpt2JaxError
from tests.conftest import REPOSITORY

MAC = {"system": "darwin", "processor": "arm64", "macos": "15.3"}


def test_plain_linux_computes_on_the_cpu(machine):
    machine()
    chosen = backend.select_backend("auto")
    assert (chosen.name, chosen.reason) == ("cpu", "no accelerator was found")
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    assert backend.recommended_extra() == ""


def test_nvidia_with_the_plugin_is_taken(machine):
    machine(nvidia=True, cuda_plugin=True)
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
    machine(cuda_plugin=True)
    assert backend.select_backend("auto").name == "cpu"
    with pytest.raises(Gpt2JaxError, match=r"expected an NVIDIA GPU.*found none on this Linux x86_64"):
        backend.select_backend("cuda")


@pytest.mark.parametrize(
    ("mac", "message"),
    [
        ({}, r"expected a Mac with Apple silicon, found Linux x86_64\n.*--backend auto"),
        ({"system": "darwin"}, r"found Darwin x86_64: no jax plugin for Intel Macs is left\n.*--backend cpu"),
        ({"system": "darwin", "rosetta": True}, r"Python for arm64, found one for x86_64.*Rosetta\n.*Python for Apple silicon"),
    ],
)
def test_metal_is_refused_off_apple_silicon(machine, mac, message):
    machine(**mac)
    with pytest.raises(Gpt2JaxError, match=message):
        backend.select_backend("metal")
    assert backend.select_backend("auto").name == "cpu"


@pytest.mark.parametrize(
    ("versions", "platform_name", "donates", "loops"),
    [
        ({"jax_mps": "0.11.1", "jax": "0.11.2"}, "mps", False, False),
        ({"metaljax": "0.11.9", "jax": "0.11.0"}, "metal", True, False),
        ({"jax_graft": "0.0.5", "jax": "0.12.0.1"}, "mtl", True, True),
        ({"jax_metal": "0.1.1", "jax": "0.4.34"}, "METAL", False, False),
        ({"jax_metal": "0.1.1", "jax": "0.5.0"}, "METAL", False, False),
    ],
)
@pytest.mark.parametrize("requested", ["metal", "auto"])
def test_every_plugin_goes_by_its_platform_and_its_record(machine, requested, versions, platform_name, donates, loops):
    machine(**{**MAC, "macos": "26.1"}, **versions)
    chosen = backend.select_backend(requested)
    assert (chosen.name, chosen.platform, chosen.donates, chosen.loops) == ("metal", platform_name, donates, loops)
    assert "custom_calls" in chosen.lacks
    assert os.environ["JAX_PLATFORMS"] == f"{platform_name},cpu"
    name, version = next(iter(versions.items()))
    assert f"{name.replace('_', '-')} {version}" in chosen.reason
    assert chosen.plugin == name.replace("_", "-")


def test_the_best_plugin_that_fits_the_installed_jax_is_taken(machine):
    everything = {"jax_mps": "0.11.1", "jax_graft": "0.0.5", "jax_metal": "0.1.1"}
    machine(**{**MAC, "macos": "26.0"}, **everything, jax="0.11.2")
    assert backend.select_backend("metal").platform == "mps"
    machine(**{**MAC, "macos": "26.0"}, **everything, jax="0.12.0.1")
    chosen = backend.select_backend("metal")
    assert chosen.platform == "mtl"
    assert "not jax-mps 0.11.1: expected jax-mps 0.11 with jax 0.11" in chosen.reason
    machine(**MAC, **everything, jax="0.5.0")
    assert backend.select_backend("metal").platform == "METAL"


def test_a_plugin_can_be_named(machine):
    machine(**{**MAC, "macos": "26.0"}, jax_mps="0.11.1", jax_graft="0.0.5", jax="0.11.2")
    for requested in ("metal", "auto"):
        assert backend.select_backend(requested, metal_plugin="jax-graft").platform == "mtl"
    with pytest.raises(Gpt2JaxError, match=r"--metal-plugin metaljax: .*found jax-mps, jax-graft\n.*pip install 'metaljax"):
        backend.select_backend("metal", metal_plugin="metaljax")
    with pytest.raises(Gpt2JaxError, match=r"--metal-plugin: expected --backend metal, found cpu"):
        backend.select_backend("cpu", metal_plugin="jax-mps")


@pytest.mark.parametrize(
    ("versions", "macos", "message"),
    [
        ({}, "15.3", r"expected a jax plugin for the Apple GPU, found none installed\n.*pip install -e '\.\["),
        (
            {"jax_metal": "0.1.1", "jax": "0.10.2"},  # default_memory_space, unknown attribute code: 22
            "15.3",
            r"expected jax-metal 0.1.1 with jax == jaxlib, 0.4.34 to 0.5.0.*, found jax 0.10.2 and jaxlib 0.10.2"
            r"\n.*pip install -e '\.\[metal\]'",
        ),
        ({"jax_metal": "0.1.1", "jax": "0.5.1"}, "15.3", r"found jax 0.5.1"),
        ({"jax_metal": "0.1.1", "jax": "0.4.33"}, "15.3", r"found jax 0.4.33"),
        ({"jax_metal": "0.1.1", "jax": "0.5.0", "jaxlib": "0.4.38"}, "15.3", r"found jax 0.5.0 and jaxlib 0.4.38"),
        ({"jax_mps": "0.11.1", "jax": "0.12.0"}, "15.3", r"jax-mps 0.11 with jax 0.11.*\n.*pip install -e '\.\[mps\]'"),
        ({"metaljax": "0.11.9", "jax": "0.12.0"}, "15.3", r"metaljax 0.11 with jax 0.11.*\n.*pip install 'metaljax"),
        ({"jax_graft": "0.0.5", "jax": "0.10.2"}, "15.3", r"expected macOS 26.0 or newer, found 15.3\n.*--backend cpu"),
        ({"jax_metal": "0.1.1", "jax": "0.5.0"}, "14.3.1", r"expected macOS 14.4 or newer, found 14.3.1"),
        ({"jax_mps": "0.11.1", "jax": "0.11.2"}, "13.6", r"expected macOS 14.0 or newer, found 13.6"),
        (
            {"jax_mps": "0.11.1", "jax_metallib": "0.10.1.0", "jax": "0.11.2"},
            "15.3",
            r"one plugin that jax knows as 'mps', found jax-metallib 0.10.1.0 too\n.*pip uninstall jax-metallib",
        ),
        (
            {"metaljax": "0.11.9", "jax_metal": "0.1.1", "jax": "0.11.2"},
            "15.3",
            r"one plugin that jax knows as 'metal', found jax-metal 0.1.1 too\n.*pip uninstall jax-metal",
        ),
    ],
)
def test_each_well_known_failure_is_one_message_before_jax_starts(machine, versions, macos, message):
    machine(**{**MAC, "macos": macos}, **versions)
    with pytest.raises(Gpt2JaxError, match=message) as raised:
        backend.select_backend("metal")
    assert len(str(raised.value).splitlines()) == 2
    chosen = backend.select_backend("auto")
    assert chosen.name == "cpu"
    assert "the Apple GPU cannot be used" in chosen.reason
    assert raised.value.hint in chosen.reason


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "UNIMPLEMENTED: default_memory_space is not supported.",
            r"expected jax-metal 0.1.1 with jax == jaxlib.*\n.*\[metal\]",
        ),
        (
            "error: unknown attribute code: 22\nin StableHLO_v1.10.8",
            r"expected jax-metal 0.1.1 with.*unknown attribute code: 22\n",
        ),
        ("current mps dialect version is 1.0.0, can't parse version 1.1.0", r"expected a newer macOS, found from jax-metal: "),
        ("-[MPSGraph foo]: unrecognized selector sent", r"expected a newer macOS.*\n.*update macOS"),
    ],
)
def test_the_plugins_own_messages_are_explained_when_they_come_all_the_same(monkeypatch, text, message):
    import jax

    def fails():
        raise RuntimeError(text)

    monkeypatch.setattr(jax, "devices", fails)
    record = backend.metal_backend(metal_plugins.METAL_PLUGINS[-1], "test")
    with pytest.raises(Gpt2JaxError, match=message):
        backend.open_device(record)
    with pytest.raises(Gpt2JaxError, match="backend cuda: expected a device, found: "):
        backend.open_device(backend.Backend("cuda", "cuda", "test"))


def test_what_a_plugin_needs_set_is_set_and_kept_in_the_record(machine):
    machine(**MAC, jax_metal="0.1.1", jax="0.5.0")
    assert backend.select_backend("metal").environment == (("ENABLE_PJRT_COMPATIBILITY", "1"),)
    assert os.environ["ENABLE_PJRT_COMPATIBILITY"] == "1"
    machine(**MAC, jax_mps="0.11.1", jax="0.11.2")
    assert backend.select_backend("auto").environment == ()
    assert backend.select_backend("auto", full_float32=True).environment == (("MLX_ENABLE_TF32", "0"),)
    assert os.environ["MLX_ENABLE_TF32"] == "0"


@pytest.mark.parametrize(
    ("version", "macos", "extra"),
    [
        ((3, 11, 9), "15.3", "metal"),
        ((3, 12, 0), "15.3", "mps"),
        ((3, 14, 0), "14.0", "mps"),
        ((3, 11, 9), "14.3", ""),
        ((3, 14, 0), "13.6", ""),
    ],
)
def test_the_extra_for_apple_silicon_depends_on_python_and_macos(machine, monkeypatch, version, macos, extra):
    machine(**{**MAC, "macos": macos})
    monkeypatch.setattr(sys, "version_info", version)
    assert backend.recommended_extra() == extra
    with pytest.raises(Gpt2JaxError, match=re.escape(f"[{extra}]") if extra else "--backend cpu"):
        backend.select_backend("metal")


def test_the_recommended_extra_is_found_with_nothing_installed():
    """As the Makefile asks for it: with a Python that has no packages."""
    command = [sys.executable, "-S", "-m", "gpt2_jax.compute.backend"]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == backend.recommended_extra()


def test_jax_platforms_of_the_user_is_respected(machine, monkeypatch):
    machine(nvidia=True, cuda_plugin=True)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    chosen = backend.select_backend("auto")
    assert (chosen.name, chosen.reason) == ("cpu", "JAX_PLATFORMS=cpu is set")


def test_the_device_of_the_cpu_opens_and_is_no_substitute_for_another():
    assert "cpu" in backend.open_device(backend.Backend("cpu", "cpu", "test"))
    with pytest.raises(Gpt2JaxError, match="backend cuda: expected its device, found that jax opened the CPU instead"):
        backend.open_device(backend.Backend("cuda", "cuda", "test"))


def test_no_script_imports_jax_before_it_has_chosen_the_backend():
    """An installed plugin is the default device of whatever imports jax first."""
    program = (
        "import pathlib, runpy, sys\n"
        "for script in pathlib.Path('scripts').glob('*.py'):\n"
        "    runpy.run_path(str(script), run_name='imported')\n"
        "    assert 'jax' not in sys.modules, script\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.fixture
def no_program_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_compiled_programs_are_kept_for_the_next_run(machine, no_program_folder):
    """In a process of its own, as jax reads the folder when it is imported."""
    program = (
        "from gpt2_jax.compute.backend import select_backend; select_backend('cpu')\nimport jax; jax.jit(lambda x: x + 1)(1.0)"
    )
    environment = os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    subprocess.run([sys.executable, "-c", program], env=environment, cwd=REPOSITORY, check=True, timeout=120)
    [folder] = (no_program_folder / "gpt2_jax").iterdir()
    assert list(folder.iterdir()) != []

    machine()
    [(name, value)] = backend.select_backend("cpu").environment
    assert (name, value) == ("JAX_COMPILATION_CACHE_DIR", os.environ["JAX_COMPILATION_CACHE_DIR"])
    assert Path(value).parent == folder.parent


def test_another_processor_has_its_own_programs(machine, no_program_folder, monkeypatch):
    machine()
    folders = set()
    for fingerprint in (1, 2):
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        monkeypatch.setattr(backend, "_processor_fingerprint", lambda fingerprint=fingerprint: fingerprint)
        folders |= set(backend.select_backend("cpu").environment)
    assert len(folders) == 2


@pytest.mark.parametrize("named", ["", "/somewhere/else"])
def test_the_users_own_folder_for_programs_stays(machine, monkeypatch, named):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", named)
    machine()
    assert backend.select_backend("cpu").environment == ()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == named


def test_without_a_home_to_write_to_nothing_is_kept(machine, no_program_folder, monkeypatch):
    (no_program_folder / "gpt2_jax").write_text("a file where the folder would be")
    machine()
    assert backend.select_backend("cpu").environment == ()
