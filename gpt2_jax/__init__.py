"""GPT-2 training in JAX over one flat buffer, file-compatible with llm.c.

    model = gpt2_jax.load("runs/latest")
    print(model.generate("In the beginning"))
    folder = gpt2_jax.train({"data": {"train": "data/my_train.bin"}, "run": {"steps": 100}})

Importing the package imports nothing of JAX; the first use of a function does. It only sets, before JAX can start, the one
XLA flag without which some versions of jaxlib compute wrong numbers on the CPU.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gpt2_jax.jax_compat import switch_off_ynnpack_fusions

if TYPE_CHECKING:
    from gpt2_jax.api import Model as Model
    from gpt2_jax.api import load as load
    from gpt2_jax.api import train as train
    from gpt2_jax.errors import Gpt2JaxError as Gpt2JaxError

__version__ = "0.1.0"
__all__ = ["Gpt2JaxError", "Model", "load", "train"]
_MODULES = {"Gpt2JaxError": "gpt2_jax.errors", "Model": "gpt2_jax.api", "load": "gpt2_jax.api", "train": "gpt2_jax.api"}

switch_off_ynnpack_fusions()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
