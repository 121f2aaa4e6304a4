"""What this machine is, what is installed, what of it is known to do harm, and what to do about it.

Made to run where something is broken: jax is started last, in a process of its own, since a plugin may end the process.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from gpt2_jax.compute import metal_plugins
from gpt2_jax.compute.backend import cpu_backend, has_nvidia_driver, select_backend
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import config_from_descriptor
from gpt2_jax.jax_compat import YNNPACK_FLAG, unmet_requirements, version_text
from gpt2_jax.machine import processor_name, system_name
from gpt2_jax.sharing import anonymous

_PACKAGES = ("jax", "jaxlib", "numpy", "optax", "flax", "torch")
_CUDA_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")
_PLUGINS = (*_CUDA_PLUGINS, *metal_plugins.METAL_PLUGIN_NAMES, "jax-metallib")
_SECONDS_TO_OPEN = 180

# Environment variables that change results or the device, each with the harm that it can do, if it can.
VARIABLES: dict[str, str] = {
    "JAX_PLATFORMS": "",
    "XLA_FLAGS": "",
    "NPROC": "",
    "OMP_NUM_THREADS": "",
    "VECLIB_MAXIMUM_THREADS": "",
    "GPT2_JAX_CPU_FEATURES": "",
    "GPT2_JAX_DISABLE": "",
    "JAX_DEFAULT_MATMUL_PRECISION": "",
    **{name: "" for plugin in metal_plugins.METAL_PLUGINS for name, _ in plugin.variables},
    "JAX_ENABLE_X64": "64-bit numbers, which no Apple GPU has and the formats here do not know",
    "JAX_DISABLE_JIT": "every operation alone: slow, and on jax-metal wrong in places (jax issue 19132)",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    subject: str
    found: str
    remedy: str = ""  # the command that mends it
    broken: bool = False  # whether it must be made better


def examine() -> Iterator[Finding]:
    """All findings, one by one as they are found. They are made for sharing: without names, paths and addresses."""
    for examination in (_machine, _packages, _environment, _plugins, _plan, _devices):
        for finding in examination():
            yield dataclasses.replace(finding, found=anonymous(finding.found))


def _machine() -> Iterator[Finding]:
    yield Finding("machine", f"{platform.machine()}, {processor_name()}, {os.cpu_count()} CPUs")
    yield Finding("system", system_name())
    yield Finding("Python", f"{platform.python_implementation()} {platform.python_version()} for {platform.machine()}")


def _packages() -> Iterator[Finding]:
    versions = (f"{name} {version_text(name) or 'not installed'}" for name in _PACKAGES)
    yield Finding("packages", ", ".join(versions))
    if version_text("gpt2_jax") is None:
        yield Finding("gpt2_jax", "not installed", "pip install -e .", broken=True)
    elif unmet := unmet_requirements("gpt2_jax"):
        found = f"jax {version_text('jax')} and jaxlib {version_text('jaxlib')}"
        # Of those, 0.10.0 and 0.10.1 can abort while compiling attention gradients (jax issue 39264).
        yield Finding("jax", f"expected {', '.join(unmet)}, found {found}", "pip install -e .", broken=True)


def _environment() -> Iterator[Finding]:
    for name, harm in VARIABLES.items():
        value = os.environ.get(name)
        if value is None:
            continue
        if harm and value.lower() not in ("", "0", "false", "no", "off"):
            yield Finding(name, f"{value!r}: {harm}", f"unset {name}", broken=True)
        else:
            yield Finding(name, repr(value))
    for flag in os.environ.get("XLA_FLAGS", "").split():
        name, _, value = flag.partition("=")
        if name == YNNPACK_FLAG and value:
            harm = f"{flag}: fusions that compute wrong numbers (jax issues 39103, 39257)"
            yield Finding("XLA_FLAGS", harm, "take it out of XLA_FLAGS", broken=True)


def _plugins() -> Iterator[Finding]:
    installed = [f"{name} {version}" for name in _PLUGINS if (version := version_text(name))]
    yield Finding("plugins", ", ".join(installed) or "none installed")
    if version_text("jax-metallib"):
        harm = "jax-metallib makes large float32 products in float16 unless JAX_METALLIB_GEMM_TRUE_F32=1 is set"
        yield Finding("", harm, "pip uninstall jax-metallib   (it is not used here)")
    if sys.platform == "darwin":
        try:
            metal_plugins.check_apple_machine()
            plugin, reason = metal_plugins.choose_plugin()
            yield Finding("Apple GPU", reason)
            for name, value in metal_plugins.facts(plugin):
                yield Finding(f"  {name}", value)
            for name, does in plugin.variables:
                yield Finding("  reads", f"{name}={does}" if name not in os.environ else f"{name}={os.environ[name]}; {does}")
            if newer := metal_plugins.newer_than_its_table(plugin):
                yield Finding("  table", newer, "python scripts/selfcheck.py --backend metal   (tests it on this machine)")
        except Gpt2JaxError as error:
            # Without a plugin all is well, but slower than it could be; one that does not fit is a fault.
            broken = any(version_text(name) for name in metal_plugins.METAL_PLUGIN_NAMES)
            yield Finding("Apple GPU", error.problem.removeprefix("backend metal: "), error.hint or "", broken)
    if has_nvidia_driver() and not any(version_text(name) for name in _CUDA_PLUGINS):
        yield Finding("NVIDIA GPU", "a driver, but not jax's CUDA plugin", "pip install -e '.[cuda]'")


def _plan() -> Iterator[Finding]:
    try:
        from gpt2_jax.compute.plan import make_plan
        from gpt2_jax.config import ComputeSettings
    except ImportError as error:
        yield Finding("plan", f"expected to import jax, found: {error}", "pip install -e .", broken=True)
        return
    try:
        plan = make_plan(ComputeSettings(), cpu_backend("to ask what it can"), config_from_descriptor("d12"))
    except Gpt2JaxError as error:
        yield Finding("plan", error.problem, error.hint or "", broken=True)
        return
    for name, found in plan.rows():
        yield Finding(f"{name}, CPU" if name else "", found)
    for fallback in plan.fallbacks():
        yield Finding("fallback", fallback)


def _devices() -> Iterator[Finding]:
    backend = select_backend("auto")
    yield Finding("auto", f"--backend auto takes {backend.name}: {backend.reason}")
    for name in dict.fromkeys((backend.name, "cpu")):
        opened, found = open_in_a_process(name)
        yield Finding(f"device, {name}", found, "" if opened else "report it, with all of this output", broken=not opened)


def open_in_a_process(backend_name: str) -> tuple[bool, str]:
    """Whether the device of a backend can be opened, and its name, or the last words of the process that tried."""
    program = f"from gpt2_jax.compute.backend import *; print(open_device(select_backend({backend_name!r})))"
    command = [sys.executable, "-c", program]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS_TO_OPEN, check=False)
    except subprocess.TimeoutExpired:
        return False, f"did not open in {_SECONDS_TO_OPEN} s"
    opened = ended.returncode == 0
    lines = (ended.stdout if opened else ended.stderr).strip().splitlines()
    return opened, lines[-1][:200] if lines else f"ended with status {ended.returncode}"
