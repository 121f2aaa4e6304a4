"""Joining the other processes of a run, and starting jax among them; before jax starts a backend."""

from __future__ import annotations

import glob
import os
import platform
import sys
from collections.abc import Mapping

from gpt2_jax import jax_compat
from gpt2_jax.compute.backend import Backend
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.processes.group import Group, join
from gpt2_jax.processes.launch import Launch, local_devices

_VERSIONS = ("gpt2_jax", "jax", "jaxlib", "numpy", "jax-cuda12-plugin", "jax-cuda13-plugin")


def start(launch: Launch, backend: Backend, settings: Mapping[str, str]) -> Group:
    """The group of all processes of a launch, once all have come and jax has started among them; `settings` must be the same
    on all. Gpt2JaxError where this cannot be."""
    if launch.number == 1:
        return Group()
    if not jax_compat.serves_several_devices():
        raise Gpt2JaxError(
            f"processes: expected jax 0.6.1 or newer for several, found jax {jax_compat.version_text('jax')}",
            "pip install -U jax, or one process",
        )
    if "processes" in backend.lacks:
        raise Gpt2JaxError(
            f"processes: expected a device that several processes can train on together, found backend {backend.name}",
            "--backend cpu, or one process",
        )
    if launch.index > 0:
        _be_quiet()
    versions = {name: version for name in _VERSIONS if (version := jax_compat.version_text(name)) is not None}
    facts = {**versions, "python": platform.python_version(), "backend": backend.name, **settings}
    group = join(launch, facts)
    ids = local_devices(launch, os.environ, _num_visible_gpus())
    jax_compat.start_processes(f"{launch.host}:{group.service_port}", launch.number, launch.index, ids)
    return group


def _be_quiet() -> None:
    """Let nothing reach standard output, from Python or from libraries: process 0 shows what all do."""
    sys.stdout.flush()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def _num_visible_gpus() -> int:
    """NVIDIA GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip()])
    return len(glob.glob("/dev/nvidia[0-9]*"))
