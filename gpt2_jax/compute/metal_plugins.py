"""The jax plugins for the Apple GPU: which can be used here, what each lacks, what their known failures mean.

Nothing here imports jax. Versions are compared before that, because a plugin and a jax that do not fit fail deep inside
jax with messages that name neither.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import dataclass

from gpt2_jax.compute.metal_tables import table_of
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.jax_compat import unmet_requirements, version_text

# What a plugin may have as one operation: attention and GELU, forward and backward, by jax.nn's functions, which it replaces
# when jax loads it; LayerNorm by a function of its own; a product with its bias by their form.
FUSED_PARTS = frozenset({"attention", "gelu", "layer_norm", "bias"})


@dataclass(frozen=True)
class MetalPlugin:
    """One plugin, under the name of its distribution. `lacks` is what Backend.lacks says of it."""

    name: str
    platform: str  # jax's name for its devices
    lacks: frozenset[str]
    oldest_macos: tuple[int, int]
    pair: str  # the versions that work together, for people
    install: str  # the command that brings that pair
    environment: tuple[tuple[str, str], ...] = ()  # set before jax starts
    full_float32: tuple[tuple[str, str], ...] = ()  # set as well when products must be full float32
    jax_bound: str = ""  # of jax and jaxlib, which must then be equal; beside what the wheel itself requires
    clashes_with: str = ""  # a distribution that registers the same name with jax
    bfloat16: str = ""  # what products of bfloat16 are there, for people
    fuses: frozenset[str] = frozenset()  # what Backend.fuses says of it
    variables: tuple[tuple[str, str], ...] = ()  # of the environment that it reads, and what each does, for people
    programs_variable: str = ""  # of them, the one that names a folder for the programs that it has compiled


# Best first. Read out of the wheels of jax-mps 0.11.1, metaljax 0.11.9, jax-graft 0.0.5 and jax-metal 0.1.1. The two
# that run on MLX compute float32 products in TF32's precision on an M5 unless told otherwise.
_FULL_FLOAT32_ON_MLX = (("MLX_ENABLE_TF32", "0"),)
_TF32_ON_MLX = ("MLX_ENABLE_TF32", "0: full float32 products on an M5 and newer")
METAL_PLUGINS = (
    MetalPlugin(
        name="jax-mps",
        platform="mps",
        # MLX takes barriers for copies, and merges what is computed twice.
        lacks=frozenset({"donation", "custom_calls", "loops", "barriers", "fused_reductions"}),
        oldest_macos=(14, 0),
        pair="jax-mps 0.11 with jax 0.11, on Python 3.12 or newer",
        install="pip install -e '.[mps]'",
        full_float32=_FULL_FLOAT32_ON_MLX,
        clashes_with="jax-metallib",
        bfloat16="products have the dtype of their operands, whatever is declared: sums in float32, rounded to bfloat16 once",
        fuses=FUSED_PARTS,
        variables=(
            ("JAX_MPS_ASYNC_DISPATCH", "1: a step does not wait for the one before; experimental"),
            ("JAX_MPS_CACHE_LIMIT_BYTES", "bound of the memory that MLX keeps for later, which has none; costs speed"),
            ("JAX_MPS_DUMP_OPTIMIZED_IR", "folder for the programs as they are computed"),
            ("JAX_MPS_NO_OPTIMIZE", "1: nothing is recognised by form"),
            ("MPS_NO_COMPILE", "1: every operation is a kernel of its own"),
            _TF32_ON_MLX,
        ),
        programs_variable="JAX_MPS_DUMP_OPTIMIZED_IR",
    ),
    MetalPlugin(
        name="metaljax",
        platform="metal",
        # Its lowering drops barriers, and its compiler merges equal operations.
        lacks=frozenset({"custom_calls", "loops", "barriers", "fused_reductions"}),
        oldest_macos=(14, 0),
        pair="metaljax 0.11 with jax 0.11, on Python 3.12 or newer",
        install="pip install 'metaljax>=0.11,<0.12' 'jax>=0.11,<0.12'",
        full_float32=_FULL_FLOAT32_ON_MLX,
        clashes_with="jax-metal",
        bfloat16="products have the dtype that is declared, and operands are converted to it first; sums in float32",
        variables=(
            ("METALJAX_MATMUL_PRECISION", "high, the default: full float32 products; default: shorter ones on an M5 and newer"),
            ("METALJAX_MEM_BUDGET_MB", "memory that a process may have, by default three quarters of the machine's"),
            ("METALJAX_RECOGNIZE", "0: nothing is recognised by form"),
            ("METALJAX_DEBUG", "1: prints what was recognised"),
            _TF32_ON_MLX,
        ),
    ),
    MetalPlugin(
        name="jax-graft",
        platform="mtl",
        lacks=frozenset({"custom_calls"}),
        oldest_macos=(26, 0),
        pair="jax-graft 0.0.5 with jax 0.10.2 or newer, on Python 3.12 or newer",
        install="pip install --upgrade jax-graft jax",
        bfloat16="products of bfloat16 with sums in float32, and a result of either",
        variables=(("METAL_PJRT_MEMORY_FRACTION", "of the memory that a process may have, by default half of the machine's"),),
    ),
    MetalPlugin(
        name="jax-metal",
        platform="METAL",
        lacks=frozenset({"donation", "custom_calls", "loops"}),
        oldest_macos=(14, 4),
        pair="jax-metal 0.1.1 with jax == jaxlib, 0.4.34 to 0.5.0, on Python 3.11 to 3.13",
        install="pip install -e '.[metal]'",
        # jaxlib reads it; without it some versions refuse the plugin's old PJRT interface.
        environment=(("ENABLE_PJRT_COMPATIBILITY", "1"),),
        # The wheel itself has no upper bound. Beyond 0.5.0 the first array fails with 'default_memory_space is not
        # supported', or a program with 'unknown attribute code: 22'.
        jax_bound=">=0.4.34,<=0.5.0",
        clashes_with="metaljax",
        bfloat16="taken by its compiler; nobody has reported a training with it",
        variables=(("ENABLE_PJRT_COMPATIBILITY", "1: jaxlib accepts its old interface; set by this program"),),
    ),
)
METAL_PLUGIN_NAMES = tuple(plugin.name for plugin in METAL_PLUGINS)


def plugin_named(name: str) -> MetalPlugin:
    return next(plugin for plugin in METAL_PLUGINS if plugin.name == name)


def facts(plugin: MetalPlugin) -> list[tuple[str, str]]:
    """Names and values for people: what the plugin has as one operation, and what bfloat16 means there."""
    names = {"attention": "attention", "gelu": "GELU", "layer_norm": "LayerNorm", "bias": "a product and its bias"}
    fused = [name for part, name in names.items() if part in plugin.fuses]
    return [
        ("one operation", ", ".join(fused) or "nothing of a step as a whole"),
        ("bfloat16", plugin.bfloat16),
    ]


def set_variables(plugin: MetalPlugin) -> list[tuple[str, str]]:
    """The variables of the environment that the plugin reads and that are set, each with its value and what it does."""
    return [(name, f"{os.environ[name]!r}; {does}") for name, does in plugin.variables if name in os.environ]


def newer_than_its_table(plugin: MetalPlugin) -> str | None:
    """What to say when the plugin that is installed is newer than its table of operations; None when it is not, or is not
    installed."""
    # Here, since this module is asked for a pip extra before anything is installed.
    from packaging.version import Version

    installed, known = version_text(plugin.name), table_of(plugin.name)["plugin"].rpartition(" ")[2]
    if installed is None or Version(installed) <= Version(known):
        return None
    return f"{plugin.name} {installed} is newer than the table of its operations, of {known}: what it changed is not checked"


def plugin_for_this_machine() -> MetalPlugin | None:
    """The plugin to recommend for this macOS and Python; None when there is none."""
    if sys.version_info >= (3, 12) and not _macos_is_older_than((14, 0)):
        return METAL_PLUGINS[0]
    if sys.version_info < (3, 14) and not _macos_is_older_than((14, 4)):
        return METAL_PLUGINS[-1]
    return None


def check_apple_machine() -> None:
    """Raise Gpt2JaxError unless this is a native Python on a Mac with Apple silicon."""
    found = f"{platform.system()} {platform.machine()}"
    if sys.platform != "darwin":
        raise Gpt2JaxError(
            f"backend metal: expected a Mac with Apple silicon, found {found}", "--backend auto   (takes what is there)"
        )
    if platform.machine() == "arm64":
        return
    if _runs_under_rosetta():
        raise Gpt2JaxError(
            "backend metal: expected a Python for arm64, found one for x86_64, which this Mac translates with Rosetta",
            "install Python for Apple silicon from python.org or with an arm64 Homebrew, and make .venv anew with it",
        )
    raise Gpt2JaxError(
        f"backend metal: expected a Mac with Apple silicon, found {found}: no jax plugin for Intel Macs is left",
        "--backend cpu   (with jax 0.4.38, the last whose jaxlib has wheels for Intel Macs)",
    )


def choose_plugin(requested: str = "auto") -> tuple[MetalPlugin, str]:
    """The best usable plugin of those installed, and why, for people; or the one that is asked for by name.

    Raises Gpt2JaxError, naming the pair that works and the command that installs it, when none is usable.
    """
    installed = [plugin for plugin in METAL_PLUGINS if version_text(plugin.name)]
    if requested != "auto":
        chosen = plugin_named(requested)
        if chosen not in installed:
            found = ", ".join(plugin.name for plugin in installed) or "no plugin"
            raise Gpt2JaxError(f"--metal-plugin {requested}: expected it to be installed, found {found}", chosen.install)
        if problem := _problem_with(chosen):
            raise problem
        return chosen, f"{_with_version(chosen)}, asked for with --metal-plugin"
    if not installed:
        recommended = plugin_for_this_machine()
        raise Gpt2JaxError(
            "backend metal: expected a jax plugin for the Apple GPU, found none installed",
            f"{recommended.install}   ({recommended.pair})" if recommended else "--backend cpu   (macOS 14 brings plugins)",
        )
    problems = {plugin.name: _problem_with(plugin) for plugin in installed}
    for plugin in installed:
        if problems[plugin.name] is None:
            refused = [problem.problem.removeprefix("backend metal: ") for problem in problems.values() if problem]
            return plugin, "; not ".join([f"{_with_version(plugin)} on its platform {plugin.platform!r}", *refused])
    raise next(problem for problem in problems.values() if problem)


def explain_failure(message: str, plugin_name: str) -> Gpt2JaxError | None:
    """What one of the well-known messages of jax and the plugins means; None for any other message."""
    plugin = next((plugin for plugin in METAL_PLUGINS if plugin.name == plugin_name), None)
    if plugin is None:
        return None
    for text, expected, hint in (
        ("default_memory_space", plugin.pair, plugin.install),
        ("unknown attribute code", plugin.pair, plugin.install),
        ("mps dialect version", "a newer macOS", "update macOS, or --backend cpu"),
        ("unrecognized selector", "a newer macOS", "update macOS, or --backend cpu"),
    ):
        if text in message:
            line = next(line for line in message.splitlines() if text in line).strip()
            return Gpt2JaxError(f"backend metal: expected {expected}, found from {plugin.name}: {line}", hint)
    return None


def _problem_with(plugin: MetalPlugin) -> Gpt2JaxError | None:
    """Why an installed plugin cannot be used here."""
    if _macos_is_older_than(plugin.oldest_macos):
        oldest = ".".join(map(str, plugin.oldest_macos))
        return Gpt2JaxError(
            f"backend metal: {_with_version(plugin)}: expected macOS {oldest} or newer, found {platform.mac_ver()[0]}",
            "update macOS, or --backend cpu",
        )
    if plugin.clashes_with and (other := version_text(plugin.clashes_with)):
        return Gpt2JaxError(
            f"backend metal: {_with_version(plugin)}: expected one plugin that jax knows as {plugin.platform.lower()!r}, "
            f"found {plugin.clashes_with} {other} too",
            f"pip uninstall {plugin.clashes_with}   (or {plugin.name})",
        )
    jax, jaxlib = version_text("jax"), version_text("jaxlib")
    if unmet_requirements(plugin.name, bound=plugin.jax_bound) or (plugin.jax_bound and jax != jaxlib):
        return Gpt2JaxError(
            f"backend metal: {_with_version(plugin)}: expected {plugin.pair}, found jax {jax} and jaxlib {jaxlib}",
            plugin.install,
        )
    return None


def _with_version(plugin: MetalPlugin) -> str:
    return f"{plugin.name} {version_text(plugin.name)}"


def _macos_is_older_than(oldest: tuple[int, int]) -> bool:
    """False too where the version of macOS is not known."""
    version = platform.mac_ver()[0]
    return bool(version) and tuple(int(part) for part in version.split(".")[:2]) < oldest


def _runs_under_rosetta() -> bool:
    """Whether macOS translates this x86_64 process on an Apple chip."""
    ended = subprocess.run(["/usr/sbin/sysctl", "-in", "sysctl.proc_translated"], capture_output=True, text=True, check=False)
    return ended.stdout.strip() == "1"
