"""What a run is made by: the commit of this project, the versions of what it uses, and the machine."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable
from pathlib import Path

import gpt2_jax
from gpt2_jax.jax_compat import version_text
from gpt2_jax.machine import available_cpus, processor_name, system_name

_DISTRIBUTIONS = ("gpt2_jax", "jax", "jaxlib", "numpy", "jax-cuda12-plugin", "jax-mps", "jax-metal")


def origin(device: str) -> dict[str, str | dict[str, str]]:
    """The values of the log's event 'start'."""
    versions = {name: version for name in _DISTRIBUTIONS if (version := version_text(name)) is not None}
    machine = {"processor": processor_name(), "cpus": str(available_cpus()), "system": system_name(), "device": device}
    return {"commit": commit(), "versions": {"python": platform.python_version(), **versions}, "machine": machine}


def commit(roots: Iterable[str] | None = None) -> str:
    """The commit that the package's checkout is at, read from git's files; empty for an installed wheel.

    Changes that are not committed are not seen.
    """
    folders = [Path(root).resolve().parent for root in (gpt2_jax.__path__ if roots is None else roots)]
    # A wheel's folder may lie in somebody else's checkout.
    checkout = next((folder for folder in folders if (folder / "pyproject.toml").exists()), None)
    if checkout is None:
        return ""
    try:
        git = checkout / ".git"
        if git.is_file():  # a work tree beside its repository
            git = checkout / git.read_text().removeprefix("gitdir:").strip()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref:"):
            return _checked(head)
        name = head.removeprefix("ref:").strip()
        common = git / (git / "commondir").read_text().strip() if (git / "commondir").exists() else git
        for folder in (git, common):
            if (folder / name).is_file():
                return _checked((folder / name).read_text().strip())
        packed = re.search(rf"^([0-9a-f]+) {re.escape(name)}$", (common / "packed-refs").read_text(), re.MULTILINE)
        return "" if packed is None else _checked(packed[1])
    except (OSError, ValueError):
        return ""


def _checked(text: str) -> str:
    return text if re.fullmatch(r"[0-9a-f]{40,64}", text) else ""
