"""Which device computes, why it was chosen, and what it lacks; decided before jax is imported.

The only reader of JAX_PLATFORMS and of the installed accelerator plugins. Code elsewhere asks the record.

`python -m gpt2_jax.backend` prints the pip extra that fits this machine; it needs nothing installed.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from gpt2_jax.errors import Gpt2JaxError

_CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
# Import name of a plugin for the Apple GPU -> the platform name that jax knows it by, best first.
_METAL_PLUGINS = {
    "jax_plugins.mps": "mps",
    "metaljax": "metal",
    "jax_graft": "mtl",
    "jax_plugins.metal_plugin": "METAL",
}


@dataclass(frozen=True)
class Backend:
    """One way to compute. `lacks` names what code must do without: 'donation', 'custom_calls'."""

    name: str
    platform: str  # jax's name for it, as in JAX_PLATFORMS
    reason: str  # why it was chosen, for people
    lacks: frozenset[str] = frozenset()

    @property
    def donates(self) -> bool:
        """Whether a compiled step may reuse the memory of the state it is given."""
        return "donation" not in self.lacks


def select_backend(requested: str) -> Backend:
    """Choose the backend and set JAX_PLATFORMS for it; call this before jax is imported.

    'auto' takes what is there and says why; 'cpu', 'cuda' and 'metal' are an order: Gpt2JaxError, saying what is
    missing, when it cannot be had.
    """
    chosen = {"auto": _automatic, "cpu": _cpu, "cuda": _cuda, "metal": _metal}[requested]()
    os.environ["JAX_PLATFORMS"] = chosen.platform if chosen.platform == "cpu" else f"{chosen.platform},cpu"
    return chosen


def open_device(backend: Backend) -> str:
    """Start jax on the backend and return the device's name; Gpt2JaxError when it cannot be opened."""
    import jax

    try:
        device = jax.devices()[0]
    except RuntimeError as error:
        first_line = str(error).splitlines()[0]
        raise Gpt2JaxError(f"backend {backend.name}: expected a device, found: {first_line}", _ON_CPU) from None
    if device.platform == "cpu" and backend.name != "cpu":
        raise Gpt2JaxError(f"backend {backend.name}: expected its device, found that jax opened the CPU instead", _ON_CPU)
    return f"{device.device_kind} ({jax.device_count()} device(s), using 1)"


_ON_CPU = "python scripts/train.py --backend cpu   (works everywhere)"


def _cpu(reason: str = "asked for with --backend cpu") -> Backend:
    return Backend("cpu", "cpu", reason)


def _cuda(reason: str = "asked for with --backend cuda") -> Backend:
    if not has_nvidia_driver():
        raise Gpt2JaxError(
            f"backend cuda: expected an NVIDIA GPU with its driver, found none on this {_machine()}",
            "--backend auto   (takes what is there)",
        )
    if not _installed(_CUDA_PLUGINS):
        raise Gpt2JaxError(
            "backend cuda: expected jax's CUDA plugin, found an NVIDIA driver but no plugin", "pip install -e '.[cuda]'"
        )
    return Backend("cuda", "cuda", reason, frozenset({"custom_calls"}))


def _metal(reason: str = "asked for with --backend metal") -> Backend:
    if not _is_apple_silicon():
        raise Gpt2JaxError(
            f"backend metal: expected a Mac with Apple silicon, found {_machine()}", "--backend auto   (takes what is there)"
        )
    plugin = _installed(_METAL_PLUGINS)
    if plugin is None:
        raise Gpt2JaxError(
            "backend metal: expected a jax plugin for the Apple GPU, found none installed",
            f"pip install -e '.[{recommended_extra()}]'",
        )
    return Backend("metal", _METAL_PLUGINS[plugin], f"{reason}, through {plugin}", frozenset({"donation", "custom_calls"}))


def _automatic() -> Backend:
    named = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    if named == "cpu":
        return _cpu("JAX_PLATFORMS=cpu is set")
    if _is_apple_silicon():
        if _installed(_METAL_PLUGINS):
            return _metal("a plugin for the Apple GPU is installed")
        return _cpu(f"no plugin for the Apple GPU is installed; pip install -e '.[{recommended_extra()}]' would bring one")
    if has_nvidia_driver():
        if _installed(_CUDA_PLUGINS):
            return _cuda("an NVIDIA driver and jax's CUDA plugin are here")
        return _cpu("an NVIDIA driver is here, but not jax's CUDA plugin; pip install -e '.[cuda]' would bring it")
    return _cpu("no accelerator was found")


def has_nvidia_driver() -> bool:
    """Whether an NVIDIA kernel driver with at least one GPU is visible to this process."""
    return (
        Path("/proc/driver/nvidia/version").exists()
        or any(Path("/dev").glob("nvidia[0-9]*"))
        or (sys.platform == "win32" and shutil.which("nvidia-smi") is not None)
    )


def recommended_extra() -> str:
    """The pip extra that fits this machine: 'mps' or 'metal' on Apple silicon (mps needs Python 3.12 or newer), 'cuda'
    with an NVIDIA driver, '' for plain CPU."""
    if _is_apple_silicon():
        return "mps" if sys.version_info >= (3, 12) else "metal"
    return "cuda" if has_nvidia_driver() else ""


def _is_apple_silicon() -> bool:
    return sys.platform == "darwin" and platform.machine() == "arm64"


def _machine() -> str:
    return f"{platform.system()} {platform.machine()}"


def _installed(modules: tuple[str, ...] | dict[str, str]) -> str | None:
    """The first of these modules that is installed; none is imported, though their parent packages are."""
    for module in modules:
        try:
            if importlib.util.find_spec(module) is not None:
                return module
        except ModuleNotFoundError:
            continue
    return None


if __name__ == "__main__":
    print(recommended_extra())
