"""The only file that asks for a version of jax; it does not import jax at its top.

Supported: jax 0.4.34 (the oldest that jax-metal works with) to 0.12, without 0.10.0 and 0.10.1, which can abort while
compiling attention gradients on the CPU (jax issue 39264).
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from typing import Any

YNNPACK_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
# YNNPACK fusions are on by default from here on, with wrong results (jax issues 39103, 39257). Some older jaxlibs do
# not know the flag, and abort on it.
_FIRST_JAXLIB_WITH_YNNPACK_FUSIONS = (0, 10, 2)


def version_text(distribution: str) -> str | None:
    """The version of an installed distribution; None when it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_version(distribution: str) -> tuple[int, ...] | None:
    """The leading numbers of a distribution's version, (0, 10, 2) for '0.10.2'; None when it is not installed."""
    version = version_text(distribution)
    if version is None:
        return None
    leading = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in leading.group().split(".")) if leading else ()


def unmet_requirements(distribution: str, *, bound: str = "") -> list[str]:
    """The requirements on jax and jaxlib that are not met: an installed distribution's own, and `bound` ('<=0.5.0')."""
    from packaging.requirements import Requirement  # here, as this file also runs before anything is installed

    declared = [Requirement(text) for text in importlib.metadata.requires(distribution) or []]
    asked = [item for item in declared if item.name in ("jax", "jaxlib")]
    asked = [item for item in asked if item.marker is None or item.marker.evaluate({"extra": ""})]
    asked += [Requirement(name + bound) for name in ("jax", "jaxlib") if bound]
    return [str(item) for item in asked if not item.specifier.contains(version_text(item.name) or "0", prereleases=True)]


def switch_off_ynnpack_fusions() -> None:
    """Add the flag to XLA_FLAGS for a jaxlib that needs it. XLA reads XLA_FLAGS once, when its first backend starts.

    A user who names the flag in XLA_FLAGS keeps their own value.
    """
    jaxlib = installed_version("jaxlib")
    flags = os.environ.get("XLA_FLAGS", "")
    if jaxlib is not None and jaxlib >= _FIRST_JAXLIB_WITH_YNNPACK_FUSIONS and YNNPACK_FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {YNNPACK_FLAG}=".strip()


def cpu_compiler_keeps_barriers() -> bool:
    """Whether XLA's compiler for the CPU leaves jax.checkpoint's barriers in: seen with 0.11.2, not with 0.10.2 and 0.4.34."""
    return (installed_version("jaxlib") or ()) >= (0, 11)


def default_matmul_precision() -> str | None:
    """jax's own setting of the precision of products, by its names; None: not set."""
    import jax

    setting: str | None = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return setting


def is_ready(array: Any) -> bool:
    """Whether an array has been computed; False too where jax or a plugin cannot tell."""
    try:
        return bool(array.is_ready())
    except (AttributeError, NotImplementedError, RuntimeError):
        return False


def on_host(array: Any) -> Any:
    """A float32 jax array as a NumPy array, which must not outlive the next step.

    On the CPU it shares the memory. np.asarray would too, but jax remembers its result, and memory with another owner is
    not reused by a step that the array is donated to.
    """
    import numpy as np

    return np.from_dlpack(array) if next(iter(array.devices())).platform == "cpu" else np.asarray(array)


def started_platform() -> str | None:
    """The platform that jax computes on by default, in its own spelling; None while jax has not started a backend."""
    if "jax" not in sys.modules:
        return None
    import jax
    from jax._src import xla_bridge  # no public function tells without starting a backend

    return jax.default_backend() if xla_bridge.backends_are_initialized() else None


def configure_imported_jax(settings: dict[str, str]) -> None:
    """Set environment variables of jax, like JAX_PLATFORMS, in a jax that is imported: it has read them already."""
    if "jax" in sys.modules:
        import jax

        for name, value in settings.items():
            jax.config.update(name.lower(), value)


def ffi_module() -> Any:
    """jax's module of the foreign function interface."""
    import jax

    if jax.__version_info__ >= (0, 5, 0):
        import jax.ffi

        return jax.ffi
    import jax.extend.ffi

    return jax.extend.ffi


def ffi_call_can_alias() -> bool:
    """Whether `ffi_call` heeds aliases."""
    import jax

    return jax.__version_info__ >= (0, 4, 38)


def ffi_call(target: str, result: Any, *args: Any, aliases: dict[int, int] | None = None, **attributes: Any) -> Any:
    """Call a registered FFI target; under vmap it is called once for each element of the batch.

    `aliases` maps arguments to the results that may be written into their memory, where jax can say so.
    """
    import jax

    options: dict[str, Any] = {"input_output_aliases": aliases} if aliases and ffi_call_can_alias() else {}
    if jax.__version_info__ >= (0, 4, 35):
        return ffi_module().ffi_call(target, result, vmap_method="sequential", **options)(*args, **attributes)
    return ffi_module().ffi_call(target, result, *args, **attributes)


def serves_several_devices() -> bool:
    """Whether `shard_map` is there. In jax 0.4.34 its forerunner ended the process on several devices of the CPU."""
    import jax

    return jax.__version_info__ >= (0, 6, 1)


def start_processes(coordinator: str, number: int, index: int, local_device_ids: list[int] | None) -> None:
    """Make jax one of several processes: call this before it starts a backend. On the CPU they exchange numbers by gloo."""
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if hasattr(jax.config, "jax_enable_preemption_service"):  # it would take SIGTERM; before 0.8.2 it cannot be left out
        jax.config.update("jax_enable_preemption_service", False)
    # Which process this is has been found already.
    found = {"local_device_ids": local_device_ids, "cluster_detection_method": "deactivate"}
    jax.distributed.initialize(coordinator, number, index, **found)  # type: ignore[arg-type]


def shard_map(function: Any, mesh: Any, in_specs: Any, out_specs: Any) -> Any:
    """`function` run by every device of the mesh on its own part. Which results are equal on all devices is not checked:
    custom calls and custom gradients have no rule for it."""
    import jax

    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
