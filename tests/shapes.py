"""Runtime shape checks: the shape suffix of an array's name is its jaxtyping annotation, checked at every call in tests.

`x_BTC` must have three dimensions, and every letter must stand for the same size in all arguments of one call; digits in
a suffix are sizes (`x_1T`). jaxtyping's import hook calls `checked` for every function of the modules that it is given.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import beartype
import jax
import numpy as np
from jaxtyping import Shaped

_SUFFIX = re.compile(r"_([A-Z1-9]+)$")
_ARRAY = jax.Array | np.ndarray


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with those parameters checked whose names end in a shape."""
    hints: dict[str, Any] = {}
    for name, annotation in getattr(function, "__annotations__", {}).items():
        suffix = _SUFFIX.search(name)
        # Weight views and optional arrays have other annotations than an array's. Annotations are strings where a name in
        # one of them is known to type checkers only.
        if suffix and annotation in (jax.Array, np.ndarray, "jax.Array", "np.ndarray"):
            hints[name] = Shaped[_ARRAY, " ".join(suffix[1])]
    if not hints:
        return function
    function.__annotations__ = hints
    return beartype.beartype(function)
