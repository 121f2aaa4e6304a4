"""Which device computes, why it was chosen, and what it lacks; decided before jax starts.

The only reader of JAX_PLATFORMS and of the installed accelerator plugins. Code elsewhere asks the record.

`python -m gpt2_jax.compute.backend` prints the pip extra that fits this machine; it needs nothing installed.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

from gpt2_jax import jax_compat
from gpt2_jax.compute import metal_plugins
from gpt2_jax.compute.metal_plugins import MetalPlugin
from gpt2_jax.cpu_quota import available_cpus, cpu_quota
from gpt2_jax.errors import Gpt2JaxError

_CPU_DEVICES = "--xla_force_host_platform_device_count"
_PROGRAM_FOLDER = "JAX_COMPILATION_CACHE_DIR"
_PROGRAM_FOLDER_SIZE = "JAX_COMPILATION_CACHE_MAX_SIZE"
_MAX_PROGRAM_BYTES = 2_000_000_000  # of all processors' folders together
_PLATFORM_NAMES = {"cuda": ("cuda", "gpu")}  # jax's names of a platform that has started, where they differ
_CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


@dataclass(frozen=True)
class Backend:
    """One device to compute on. `lacks` names the capabilities that it does not have:

    | name | what is not there |
    | --- | --- |
    | donation | a compiled step cannot reuse the memory of the state that it is given |
    | custom_calls | this project's library does not run there |
    | loops | compiled loops |
    | barriers | the compiler takes them out, and merges what is computed anew with what is kept |
    | fused_reductions | the compiler fuses elementwise operations alone: what a reduction reads is written out first |
    | slice_updates | an update of a slice may copy the whole buffer |
    | cuda_libraries | cuBLAS and cuDNN |
    | determinism | bits that are known to be the same in every run |
    | reduce_scatter | sums scattered over devices: wrong in some jaxlibs (jax issue 40830), so ranks exchange and add |
    | processes | several processes that train together: the plugin has no way from one to another |
    | decode_cache | generating with a cache of keys and values: its program is not checked there |
    """

    name: str
    platform: str  # jax's name for it, as in JAX_PLATFORMS
    reason: str  # why it was chosen, for people
    lacks: frozenset[str] = frozenset()
    plugin: str = ""  # of 'metal': the distribution
    environment: tuple[tuple[str, str], ...] = ()  # variables that must be set before jax starts
    fuses: frozenset[str] = frozenset()  # of metal_plugins.FUSED_PARTS: parts of a step that are one operation there
    fallback: str = ""  # why a device that is here is not used, where the user can mend it; --strict does not accept it

    @property
    def caches_keys(self) -> bool:
        """Whether text is generated with a cache of keys and values."""
        return "decode_cache" not in self.lacks

    @property
    def donates(self) -> bool:
        """Whether a compiled step may reuse the memory of the state it is given."""
        return "donation" not in self.lacks

    @property
    def loops(self) -> bool:
        """Whether a compiled function may hold a loop, rather than its body as often as it is run."""
        return "loops" not in self.lacks


def select_backend(requested: str, *, metal_plugin: str = "auto", full_float32: bool = False) -> Backend:
    """Choose the backend and set JAX_PLATFORMS, and what else it needs, for it; call this before jax computes anything.

    'auto' takes what is there and says why; 'cpu', 'cuda' and 'metal' are an order: Gpt2JaxError, saying what is missing,
    when it cannot be had, or when jax has started on another platform; 'mps' is another name of 'metal'. `metal_plugin`
    names one plugin for the Apple GPU; `full_float32` asks for products without a shorter format inside, for comparing
    with others.
    """
    requested = "metal" if requested == "mps" else requested
    if metal_plugin != "auto":
        if requested not in ("auto", "metal"):
            raise Gpt2JaxError(f"--metal-plugin: expected --backend metal, found {requested}", "--backend metal")
        requested = "metal"
    if requested == "metal":
        chosen = _metal(metal_plugin, full_float32)
    elif requested == "auto":
        chosen = _automatic(full_float32)
    else:
        chosen = {"cpu": _cpu, "cuda": _cuda}[requested]()
    platforms = chosen.platform if chosen.platform == "cpu" else f"{chosen.platform},cpu"
    started = jax_compat.started_platform()
    if started is not None and started.lower() not in _PLATFORM_NAMES.get(chosen.platform, (chosen.platform.lower(),)):
        raise Gpt2JaxError(
            f"backend {chosen.name}: expected to be chosen before jax starts, found that jax has started on {started}",
            f"JAX_PLATFORMS={platforms} python PROGRAM.py, or in it select_backend({requested!r}) before jax computes anything",
        )
    os.environ["JAX_PLATFORMS"] = platforms
    os.environ.update(dict(chosen.environment))
    settings = {"JAX_PLATFORMS": platforms} if started is None else {}
    settings |= {name: value for name, value in chosen.environment if name == _PROGRAM_FOLDER}
    jax_compat.configure_imported_jax(settings)
    return chosen


def set_cpu_devices(number: int) -> None:
    """Let jax show the CPU as so many devices, unless XLA_FLAGS says how many; call this before jax starts."""
    flags = os.environ.get("XLA_FLAGS", "")
    if _CPU_DEVICES not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_CPU_DEVICES}={number}".strip()


def num_devices(backend: Backend, requested: int) -> int:
    """How many devices train: those that are `requested`, or for 0 all accelerators, or the one CPU; call this once jax has
    started. Gpt2JaxError if there are fewer."""
    import jax

    found = jax.local_device_count()
    if requested > found:
        raise Gpt2JaxError(
            f"--devices: expected at most the {found} that jax sees here, found {requested}", f"--devices {found}"
        )
    return requested or (1 if backend.platform == "cpu" else found)


def open_device(backend: Backend, requested: int = 1) -> str:
    """Start jax on the backend, compute something, and return the device's name and how many of it are used;
    Gpt2JaxError when it cannot."""
    import jax
    import numpy as np

    try:
        device = jax.devices()[0]
        # The first array and the first program: where a plugin fails that does not fit this jax or this macOS.
        np.asarray(jax.jit(lambda x: x + x)(np.float32(1)))
    except RuntimeError as error:
        if explained := metal_plugins.explain_failure(str(error), backend.plugin):
            raise explained from None
        first_line = str(error).splitlines()[0]
        raise Gpt2JaxError(f"backend {backend.name}: expected a device, found: {first_line}", _ON_CPU) from None
    if device.platform == "cpu" and backend.name != "cpu":
        raise Gpt2JaxError(f"backend {backend.name}: expected its device, found that jax opened the CPU instead", _ON_CPU)
    return f"{device.device_kind} ({jax.local_device_count()} device(s), using {num_devices(backend, requested)})"


_ON_CPU = "python scripts/train.py --backend cpu   (works everywhere)"


def _cpu(reason: str = "asked for with --backend cpu", *, fallback: str = "") -> Backend:
    threads = _threads_of_quota()
    if threads:
        reason += f"; {threads[0][1]} threads, as the container's CPU quota allows no more (NPROC=NUMBER changes it)"
    return cpu_backend(reason, environment=(*_kept_programs(), *threads), fallback=fallback)


def _threads_of_quota() -> tuple[tuple[str, str], ...]:
    """NPROC, the threads of XLA and of the custom calls, where a quota allows fewer than there are CPUs; () if it is set."""
    quota = cpu_quota()
    return () if quota is None or quota >= available_cpus() or "NPROC" in os.environ else (("NPROC", str(quota)),)


def cpu_backend(reason: str, *, environment: tuple[tuple[str, str], ...] = (), fallback: str = "") -> Backend:
    """The record of the CPU."""
    lacks = {"cuda_libraries", "slice_updates", "reduce_scatter"} | (
        set() if jax_compat.cpu_compiler_keeps_barriers() else {"barriers"}
    )
    return Backend("cpu", "cpu", reason, frozenset(lacks), environment=environment, fallback=fallback)


def _cuda(reason: str = "asked for with --backend cuda") -> Backend:
    if not has_nvidia_driver():
        raise Gpt2JaxError(
            "backend cuda: expected an NVIDIA GPU with its driver, "
            f"found none on this {platform.system()} {platform.machine()}",
            "--backend auto   (takes what is there)",
        )
    if not _cuda_plugin_installed():
        raise Gpt2JaxError(
            "backend cuda: expected jax's CUDA plugin, found an NVIDIA driver but no plugin", "pip install -e '.[cuda]'"
        )
    return cuda_backend(reason, environment=_kept_programs())


def cuda_backend(reason: str, *, environment: tuple[tuple[str, str], ...] = ()) -> Backend:
    """The record of NVIDIA GPUs, wherever this runs."""
    return Backend("cuda", "cuda", reason, frozenset({"custom_calls"}), environment=environment)


def _kept_programs() -> tuple[tuple[str, str], ...]:
    """Where jax keeps compiled programs for the next run, unless the user has named a folder, or wants none ("").

    A folder for each kind of processor, since home folders are shared by machines, and not every jax has that in its keys.
    """
    if _PROGRAM_FOLDER in os.environ:
        return ()
    caches = Path("~/Library/Caches" if sys.platform == "darwin" else os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        folder = caches.expanduser() / "gpt2_jax" / f"programs-{platform.machine()}-{_processor_fingerprint():08x}"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a read-only home, or none
        return ()
    if _PROGRAM_FOLDER_SIZE not in os.environ:
        _delete_old_programs(folder.parent)
    return ((_PROGRAM_FOLDER, str(folder)),)


def _delete_old_programs(folder: Path) -> None:
    """Delete the programs in `folder` that were not used for the longest time, until _MAX_PROGRAM_BYTES are left.

    jax's own bound, jax_compilation_cache_max_size, needs the package filelock, locks the folder for every program that it
    reads, and fails in a folder that was filled without a bound.
    """
    try:
        files = [path for path in folder.glob("programs-*/**/*") if path.is_file() and not path.name.endswith("-atime")]
        statuses = {path: path.stat() for path in files}
        left = sum(status.st_size for status in statuses.values())
        # Many file systems note a file's reading once a day, or never: then its writing counts.
        for path in sorted(files, key=lambda path: max(statuses[path].st_atime, statuses[path].st_mtime)):
            if left <= _MAX_PROGRAM_BYTES:
                return
            path.unlink(missing_ok=True)
            if path.name.endswith("-cache"):
                path.with_name(path.name.removesuffix("-cache") + "-atime").unlink(missing_ok=True)
            left -= statuses[path].st_size
    except FileNotFoundError:  # another process deletes old programs at the same time
        return
    except OSError as error:
        print(f"{folder}: expected to delete old compiled programs, found: {error.strerror or error}", file=sys.stderr)


def _processor_fingerprint() -> int:
    """A checksum of the processor's features, which compiled programs depend on; Linux lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    features = [line for line in lines if line.startswith(("flags", "Features"))] or lines
    return zlib.crc32(features[0].encode())


def _metal(plugin_name: str, full_float32: bool) -> Backend:
    metal_plugins.check_apple_machine()
    plugin, reason = metal_plugins.choose_plugin(plugin_name)
    return metal_backend(plugin, reason, full_float32=full_float32)


def metal_backend(plugin: MetalPlugin, reason: str, *, full_float32: bool = False) -> Backend:
    """The record of a plugin for the Apple GPU, wherever this runs."""
    environment = plugin.environment + (plugin.full_float32 if full_float32 else ())
    lacks = plugin.lacks | {"cuda_libraries", "slice_updates", "determinism", "decode_cache", "processes"}
    return Backend("metal", plugin.platform, reason, lacks, plugin.name, environment, plugin.fuses)


def _automatic(full_float32: bool) -> Backend:
    named = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    if named == "cpu":
        return _cpu("JAX_PLATFORMS=cpu is set")
    if jax_compat.started_platform() == "cpu":
        return _cpu("jax has started on the CPU")
    if sys.platform == "darwin":
        try:
            return _metal("auto", full_float32)
        except Gpt2JaxError as error:
            reason = f"the Apple GPU cannot be used, {error.problem.removeprefix('backend metal: ')}; {error.hint}"
            return _cpu(reason, fallback=reason if platform.machine() == "arm64" else "")
    if has_nvidia_driver():
        if _cuda_plugin_installed():
            return _cuda("an NVIDIA driver and jax's CUDA plugin are here")
        reason = "an NVIDIA driver is here, but not jax's CUDA plugin; pip install -e '.[cuda]' would bring it"
        return _cpu(reason, fallback=reason)
    return _cpu("no accelerator was found")


def has_nvidia_driver() -> bool:
    """Whether an NVIDIA kernel driver with at least one GPU is visible to this process."""
    return (
        Path("/proc/driver/nvidia/version").exists()
        or any(Path("/dev").glob("nvidia[0-9]*"))
        or (sys.platform == "win32" and shutil.which("nvidia-smi") is not None)
    )


def recommended_extra() -> str:
    """The pip extra that fits this machine: 'mps' or 'metal' on Apple silicon, by its Python and macOS, 'cuda' with an
    NVIDIA driver, '' for plain CPU."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        plugin = metal_plugins.plugin_for_this_machine()
        return {"jax-mps": "mps", "jax-metal": "metal"}[plugin.name] if plugin else ""
    return "cuda" if has_nvidia_driver() else ""


def _cuda_plugin_installed() -> bool:
    return any(importlib.util.find_spec(module) is not None for module in _CUDA_PLUGINS)


if __name__ == "__main__":
    print(recommended_extra())
