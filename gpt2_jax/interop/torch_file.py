"""Files of torch.save, by the only call that does not run what is in them: torch.load(weights_only=True), torch 2.6 or newer.

They are pickles, which can hold programs. With weights_only PyTorch refuses everything but tensors and plain containers;
before 2.6 a file could get round that (CVE-2025-32434).
"""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.files import file_size
from gpt2_jax.jax_compat import installed_version

_FIRST_SAFE_TORCH = (2, 6)
_INSTALL = "pip install --upgrade 'torch>=2.6'"


def read_torch_file(path: str | os.PathLike, what: str, hint: str, *, without_torch: str | None = None) -> object:
    """What torch.save wrote to `path`, which ought to be `what`: tensors on the CPU, mapped rather than read if possible.

    Gpt2JaxError without a torch that is new enough, for a damaged file, and for one that holds other objects than tensors
    and plain containers. `hint` says how to come by a right file, `without_torch` what can be done instead of installing it.
    """
    path = Path(path)
    file_size(path, what, hint)
    require_torch(path, f"to read {what}", without_torch=without_torch)
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch documents none, and damaged files lead to a dozen kinds
        raise Gpt2JaxError(f"{path}: expected {what}, found {_found(error)}", hint) from None


def require_torch(path: Path, purpose: str, *, without_torch: str | None = None) -> None:
    """Gpt2JaxError unless there is a torch that reads such files without running what is in them."""
    version = installed_version("torch")
    if version is None or version < _FIRST_SAFE_TORCH:
        found = (
            "none" if version is None else f"{'.'.join(map(str, version))}, in which a file can run programs (CVE-2025-32434)"
        )
        install = _INSTALL if without_torch is None else f"{_INSTALL}   (or {without_torch})"
        raise Gpt2JaxError(f"{path}: expected torch 2.6 or newer, {purpose}, found {found}", install)


def _found(error: Exception) -> str:
    """What is wrong, in one line of torch's message."""
    if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"the object {named[1]}, whose loading could run a program"
    message = str(error).partition("\n")[0].partition(". ")[0]
    return f"a file that torch cannot load: {message or type(error).__name__}"
