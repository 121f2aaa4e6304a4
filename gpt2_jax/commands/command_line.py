"""Command lines to settings: the flags of a command from its dataclass, and those of a run from its settings.

A run's settings are resolved in this order, later ones winning: the defaults, the TOML file or preset of --config (with
--resume: the run folder's own config.toml), llm.c's command line of --llmc, the command line itself. Training shards that
the command line names bring their own validation shards, and not the file's.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

import tyro

import gpt2_jax
from gpt2_jax.config import DataSettings, ModelSettings, RunConfig, load_config, load_saved_config
from gpt2_jax.errors import Gpt2JaxError, as_typed, program_name
from gpt2_jax.files import FilePath, with_home
from gpt2_jax.names import nearest

_Arguments = TypeVar("_Arguments")


def parse(arguments: type[_Arguments], description: str | None, words: list[str]) -> _Arguments:
    """The arguments of a command from the words after its name. A wrong flag ends the program with status 2."""
    return with_home(tyro.cli(arguments, args=words, prog=program_name(), description=help_text(description)))


def help_text(description: str | None) -> str:
    """A command's description for --help, its commands in the form in which the program was started.

    Examples are indented, since tyro joins lines that are not, and ruff undoes it in a docstring of nothing else.
    """
    return as_typed(re.sub(r"^ *(?=python scripts/)", "  ", description or "", flags=re.MULTILINE))


@dataclass(frozen=True)
class _RunArguments:
    settings: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)
    config: FilePath | None = None
    """TOML file with settings, or the name of a preset: demo, gpt2_124m, gpt2_350m ..."""
    llmc: str | None = None
    """llm.c's own command line, in quotes: "-i train.bin -b 64 ..."; it is translated, and other flags go over it."""
    print_config: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the resolved settings as TOML and stop."""
    as_if: str = ""
    """With --dry-run: what fits on a machine that is not here. With --backend metal a Mac, by its plugin and memory: "jax-mps,
    16 GB"; with --backend cuda GPUs, by --zero and their number: "8 GPUs, 80 GB"."""


class RunCommand(NamedTuple):
    """What a run's command line says."""

    settings: RunConfig
    name: str  # of the TOML file or descriptor
    only_print: bool
    names_a_run: bool  # False: it says nothing of model and data, so that the defaults decide what is trained
    as_if: str = ""  # the machine of --as-if


def parse_command_line(words: list[str], description: str | None) -> RunCommand:
    """The resolved settings, and what else the command line says.

    Flags are the settings' names (--batch-size for data.batch_size). A wrong flag ends the program with status 2 and
    a suggestion; a wrong key in a TOML file is a Gpt2JaxError with one.
    """
    llmc, words = _without_llmc(words)
    if llmc is not None:
        words = _translated(llmc) + words
    seen = _first_look(words)
    path = None if seen.config is None else find_config(seen.config)
    if path is not None:
        defaults = load_config(path)
    else:
        # Of a folder that llm.c wrote the command line alone says what its run was.
        defaults = (load_saved_config(seen.out_dir) if seen.resume and seen.out_dir else None) or RunConfig()
    command = tyro.cli(
        _RunArguments,
        args=words,
        prog=program_name(),
        default=_RunArguments(settings=defaults),
        description=help_text(description),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    settings = with_home(command.settings)
    if seen.train is not None and seen.validation is None:
        settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, validation=""))
    settings.validate()
    name = Path(path or settings.model.init).stem.replace(":", "-")
    names_a_run = seen.config is not None or llmc is not None or seen.resume or _names_model_or_data(words)
    return RunCommand(settings, name, command.print_config, names_a_run, command.as_if)


def find_config(name: str) -> Path:
    """The file of --config: a path, or the name of a preset. Gpt2JaxError, listing the presets, for neither."""
    path = Path(name)
    if os.path.isfile(path) or path.suffix == ".toml" or len(path.parts) != 1:
        return path
    # A wheel has the presets inside the package, a source checkout beside it; those of the checkout are the newer ones.
    roots = [Path(root) for root in gpt2_jax.__path__]
    checkouts = [root.parent for root in roots if (root.parent / "pyproject.toml").exists()]
    folders = [parent / "configs" for parent in (*roots, *checkouts)]
    presets = {preset.stem: preset for folder in folders for preset in folder.glob("*.toml")}
    if name not in presets:
        close = nearest(name, presets)
        raise Gpt2JaxError(
            f"--config: expected a TOML file or one of {', '.join(sorted(presets))}, found {name!r}",
            f"--config {close[0] if close else 'demo'}",
        )
    return presets[name]


def _first_look(words: list[str]) -> argparse.Namespace:
    """What decides the defaults; everything else is left to the real parser."""
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first_look.add_argument("--config", type=os.path.expanduser)
    first_look.add_argument("--resume", action="store_true")
    first_look.add_argument("--out-dir", "--out_dir", type=os.path.expanduser)
    first_look.add_argument("--train")
    first_look.add_argument("--validation")
    try:
        return first_look.parse_known_args(words)[0]
    except argparse.ArgumentError:
        return first_look.parse_args([])


def _names_model_or_data(words: list[str]) -> bool:
    """Whether a flag of these words is one of the model or of the data."""
    fields = [*dataclasses.fields(ModelSettings), *dataclasses.fields(DataSettings)]
    flags = {word.partition("=")[0].lstrip("-").removeprefix("no-").replace("-", "_") for word in words if word.startswith("-")}
    return not flags.isdisjoint(field.name for field in fields)


def _without_llmc(words: list[str]) -> tuple[str | None, list[str]]:
    """The value of --llmc, of several the last, and the words without it."""
    llmc = None
    others = []
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag != "--llmc":
            others.append(word)
            continue
        llmc = value if equals else next(rest, None)
        if llmc is None:
            raise Gpt2JaxError("--llmc: expected llm.c's command line in quotes, found no value", '--llmc "-i train.bin -b 64"')
    return llmc, others


def _translated(command_line: str) -> list[str]:
    """The flags that a command line of llm.c means; the translation is printed, each line a comment of TOML."""
    from gpt2_jax.llmc.command_line import translate  # here, since it imports numpy, which the benches must not do so early

    translation = translate(command_line)
    here = as_typed(f"python scripts/train.py {shlex.join(translation.arguments)}")
    print(f"# train_gpt2cu {command_line}\n# is here: {here}")
    for remark in translation.remarks:
        print(f"# {remark}")
    return translation.arguments
