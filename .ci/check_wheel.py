"""What must hold of a wheel of the package, told from the file alone: check_wheel.py WHEEL."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

LIBRARY = "gpt2_jax/lib/libgpt2_jax_custom_calls"


def problems(path: Path) -> list[str]:
    """'X: expected …, found …' for each thing that does not hold."""
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        libraries = [name for name in names if name in (f"{LIBRARY}.so", f"{LIBRARY}.dylib")]
        needs_cxx_library = any(b"GLIBCXX_3" in wheel.read(name) for name in libraries)
    tags = path.stem.split("-")[2:]
    strangers = [name for name in names if not name.startswith(("gpt2_jax/", f"gpt2_jax-{path.stem.split('-')[1]}.dist-info/"))]
    presets = sorted(name for name in names if name.startswith("gpt2_jax/configs/"))
    there = sorted(f"gpt2_jax/configs/{file.name}" for file in Path(__file__).parents[1].glob("configs/*.toml"))
    assets = sorted(f"gpt2_jax/assets/{file.name}" for file in Path(__file__).parents[1].glob("gpt2_jax/assets/*"))
    checks = [
        ("presets", presets == there, there, presets),
        ("assets", set(assets) <= set(names), assets, [name for name in names if name.startswith("gpt2_jax/assets/")]),
        ("types", "gpt2_jax/py.typed" in names, "gpt2_jax/py.typed", "none"),
        ("custom calls", len(libraries) == 1, f"{LIBRARY}.so or .dylib", libraries),
        ("tags", tags[:2] == ["py3", "none"] and tags[2] != "any", "py3-none-PLATFORM", "-".join(tags)),
        ("other files", not strangers, "none", strangers),
        ("C++ library", not needs_cxx_library, "none of the machine's", "versions of libstdc++'s symbols"),
    ]
    return [f"{what}: expected {expected}, found {found}" for what, holds, expected, found in checks if not holds]


if __name__ == "__main__":
    found = problems(Path(sys.argv[1]))
    print("\n".join(found) or f"{sys.argv[1]}: as expected")
    sys.exit(bool(found))
