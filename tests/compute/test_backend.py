"""Which backend is chosen on which machine, and how the others are refused. Machines are imitated."""

from __future__ import annotations

import errno
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


def ended_program(program: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_jax_that_is_imported_but_has_not_started_takes_the_choice(tmp_path):
    """It has read JAX_PLATFORMS and the folder for programs when it was imported."""
    program = """
import os, jax
from gpt2_jax.compute.backend import select_backend
del os.environ["JAX_COMPILATION_CACHE_DIR"]
select_backend("cpu")
print(jax.default_backend(), jax.config.jax_compilation_cache_dir == os.environ["JAX_COMPILATION_CACHE_DIR"])
"""
    ended = ended_program(program, JAX_PLATFORMS="no_such_platform", XDG_CACHE_HOME=str(tmp_path))
    assert ended.stdout == "cpu True\n", ended.stderr


def test_a_jax_that_has_started_on_another_platform_is_an_error_and_on_the_same_is_none(machine, monkeypatch):
    machine(nvidia=True, cuda_plugin=True)
    monkeypatch.setattr(backend.jax_compat, "started_platform", lambda: "cpu")
    with pytest.raises(Gpt2JaxError) as raised:
        backend.select_backend("cuda")
    assert str(raised.value) == (
        "backend cuda: expected to be chosen before jax starts, found that jax has started on cpu\n"
        "---> HINT: JAX_PLATFORMS=cuda,cpu python PROGRAM.py, or in it select_backend('cuda') before jax computes anything"
    )
    assert os.environ["JAX_PLATFORMS"] == ""
    chosen = backend.select_backend("auto")
    assert (chosen.name, chosen.reason) == ("cpu", "jax has started on the CPU")
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setattr(backend.jax_compat, "started_platform", lambda: "gpu")
    assert backend.select_backend("cuda").name == backend.select_backend("auto").name == "cuda"
    with pytest.raises(Gpt2JaxError, match=r"backend cpu: .* found that jax has started on gpu\n.*JAX_PLATFORMS=cpu python"):
        backend.select_backend("cpu")


def test_whether_jax_has_started_is_known_without_starting_it():
    program = """
import sys
from gpt2_jax.jax_compat import started_platform
assert started_platform() is None and "jax" not in sys.modules
import jax
assert started_platform() is None and started_platform() is None
jax.devices()
print(started_platform())
"""
    ended = ended_program(program)
    assert ended.stdout == "cpu\n", ended.stderr


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


def program_of(folder: Path, name: str, size: int, *, written: int, read: int) -> Path:
    """A program of `size` bytes, written and last read so many seconds after the epoch."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    os.utime(path, (read, written))
    return path


def test_the_programs_that_were_not_used_for_longest_are_deleted_beyond_the_bound(machine, no_program_folder, monkeypatch):
    monkeypatch.setattr(backend, "_MAX_PROGRAM_BYTES", 300)
    kept = no_program_folder / "gpt2_jax"
    oldest = program_of(kept, "programs-other-00000000/a-cache", 100, written=1, read=1)
    beside = program_of(kept, "programs-other-00000000/a-atime", 8, written=1, read=1)
    tuned = program_of(kept, "programs-other-00000000/tuned/b", 100, written=2, read=2)
    read_again = program_of(kept, "programs-x86_64-00000001/c-cache", 100, written=1, read=9)
    newest = program_of(kept, "programs-x86_64-00000001/d-cache", 100, written=8, read=2)
    elsewhere = program_of(kept, "else", 1000, written=1, read=1)
    machine()
    backend.select_backend("cpu")
    assert [path.exists() for path in (oldest, beside, tuned, read_again, newest, elsewhere)] == [False, False] + 4 * [True]
    program_of(kept, "programs-x86_64-00000001/e-cache", 1, written=10, read=10)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "1000")  # the user's own bound is jax's to keep
    backend.select_backend("cpu")
    assert tuned.exists()
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_MAX_SIZE")
    backend.select_backend("cpu")
    assert [path.exists() for path in (tuned, read_again, newest)] == [False, True, True]


def test_programs_that_cannot_be_deleted_are_said_and_no_error(machine, no_program_folder, monkeypatch, capsys):
    monkeypatch.setattr(backend, "_MAX_PROGRAM_BYTES", 10)
    kept = no_program_folder / "gpt2_jax"
    program_of(kept, "programs-other-00000000/a-cache", 100, written=1, read=1)

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "unlink", refuse)
    machine()
    assert backend.select_backend("cpu").environment != ()
    assert capsys.readouterr().err == f"{kept}: expected to delete old compiled programs, found: Permission denied\n"
