"""What must hold of the custom calls' library for macOS, told from the file alone: check_macho.py LIBRARY."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import lief

REPOSITORY = Path(__file__).resolve().parents[1]
# zig links the C++ library into ours and cannot hide its allocation functions and two names of its own; Apple's linker
# can, and does.
OF_ZIG = re.compile(r"__Z[nd][awl]|__mh_dylib_header$|___dso_handle$")
SYSTEM_LIBRARIES = {"/usr/lib/libSystem.B.dylib", "/usr/lib/libc++.1.dylib"}


def problems(path: Path) -> list[str]:
    """'X: expected …, found …' for each thing that does not hold."""
    library = lief.MachO.parse(str(path)).at(0)
    trie = library.dyld_exports_trie if library.has_dyld_exports_trie else library.dyld_info
    exports = {export.symbol.name for export in trie.exports}
    # A weak symbol of our own is bound to whoever defines it first, so to no library by name.
    undefined = {symbol.name for symbol in library.imported_symbols}
    homeless = [b.symbol.name for b in library.bindings if not b.has_library and b.symbol.name in undefined]
    ours = {f"_{name}" for name in re.findall(r"\b(gpt2_jax_\w+);", (REPOSITORY / "custom_calls/src/exports.map").read_text())}
    name, *dependencies = [command.name for command in library.libraries]
    checks = [
        ("processor", library.header.cpu_type == lief.MachO.Header.CPU_TYPE.ARM64, "ARM64", library.header.cpu_type),
        ("kind", library.header.file_type == lief.MachO.Header.FILE_TYPE.DYLIB, "DYLIB", library.header.file_type),
        ("oldest macOS", library.build_version.minos == [13, 0, 0], "13.0", library.build_version.minos),
        ("exports", ours <= exports, sorted(ours), sorted(exports)),
        ("other exports", not (other := [e for e in exports - ours if not OF_ZIG.match(e)]), "none", other),
        ("name", Path(name).name == path.name, path.name, name),
        ("libraries", set(dependencies) <= SYSTEM_LIBRARIES, sorted(SYSTEM_LIBRARIES), dependencies),
        ("imports of no library", not homeless, "none", homeless),
        ("signature", library.has_code_signature, "one, if only ad hoc", "none"),
    ]
    return [f"{what}: expected {expected}, found {found}" for what, holds, expected, found in checks if not holds]


if __name__ == "__main__":
    lief.logging.disable()
    found = problems(Path(sys.argv[1]))
    print("\n".join(found) or f"{sys.argv[1]}: as expected")
    sys.exit(bool(found))
