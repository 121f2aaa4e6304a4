"""What check_wheel.py says of a wheel: each thing that must be inside is missed when it is not."""

from __future__ import annotations

import runpy
import zipfile

import pytest

from tests.conftest import REPOSITORY

PRESETS = [f"gpt2_jax/configs/{path.name}" for path in sorted((REPOSITORY / "configs").glob("*.toml"))]
ASSETS = [f"gpt2_jax/assets/{path.name}" for path in sorted((REPOSITORY / "gpt2_jax" / "assets").iterdir())]
LIBRARY = "gpt2_jax/lib/libgpt2_jax_custom_calls.so"
TYPES = "gpt2_jax/py.typed"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([*PRESETS, *ASSETS, LIBRARY, TYPES], []),
        ([*PRESETS[1:], *ASSETS, LIBRARY, TYPES], ["presets"]),
        ([*PRESETS, "gpt2_jax/configs/old.toml", *ASSETS, LIBRARY, TYPES], ["presets"]),
        ([*PRESETS, *ASSETS[1:], LIBRARY, TYPES], ["assets"]),
        ([*PRESETS, *ASSETS, TYPES], ["custom calls"]),
        ([*PRESETS, *ASSETS, LIBRARY], ["types"]),
    ],
)
def test_a_wheel_is_complete(tmp_path, names, expected):
    path = tmp_path / "gpt2_jax-0.1.0-py3-none-linux_x86_64.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name in names:
            wheel.writestr(name, "")
    problems = runpy.run_path(str(REPOSITORY / ".ci" / "check_wheel.py"))["problems"](path)
    assert [problem.partition(":")[0] for problem in problems] == expected
