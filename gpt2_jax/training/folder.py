"""The run folder: refused when it is in use, made, and given the run's settings."""

from __future__ import annotations

import dataclasses
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from itertools import count
from pathlib import Path

from gpt2_jax.config import LAUNCH_SETTINGS, RunConfig, format_config, load_saved_config, saved_config_path
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.files import atomic_write
from gpt2_jax.llmc.checkpoint_set import complete_steps, files_of_sets
from gpt2_jax.processes.group import Group
from gpt2_jax.training.run_lock import holders_text, locked, this_process

# A network's file system may show another host's new files late.
_SHARED_SECONDS, _LOOK_SECONDS = 60.0, 0.1


def refuse_used_folder(folder: Path) -> None:
    """Gpt2JaxError unless a fresh run may use this path: nothing is there, or a folder without a run or its checkpoints, or
    what a run has left that ended before its first checkpoint."""
    if not os.path.lexists(folder):
        return
    new = f"--out-dir {shlex.quote(str(folder) + '-2')}"
    if not os.path.isdir(folder):
        raise Gpt2JaxError(f"--out-dir: expected a new folder, found that {folder} is a file", new)
    resumes = f"--resume --out-dir {shlex.quote(str(folder))}   (continues the run), or {new}"
    if complete_steps(folder):
        raise Gpt2JaxError(f"--out-dir: expected a new folder, found that {folder} holds a run", resumes)
    if parts := files_of_sets(folder):
        found = f"{folder} holds {parts[0]}, of a checkpoint that is not complete"
        raise Gpt2JaxError(f"--out-dir: expected a new folder, found that {found}", new)
    try:
        load_saved_config(folder)
    except Gpt2JaxError:
        raise Gpt2JaxError(f"--out-dir: expected a new folder, found that {folder} holds another config.toml", new) from None


def folder_of(config: RunConfig, name: str) -> Path:
    """The run's folder: the one that the settings name, or of a link the one that it names; or a new one under runs/."""
    folder = Path(config.run.out_dir or f"runs/{name}-{datetime.now():%Y%m%d-%H%M%S}")
    return folder.parent / os.readlink(folder) if os.path.islink(folder) else folder


@contextmanager
def open_folder(folder: Path, config: RunConfig, say: Callable[[str], None], group: Group | None = None) -> Iterator[None]:
    """Make the run folder, lock it, and write the resolved settings into it; `say` is given a line about an old lock. Of
    several processes process 0 does, and the others look whether it is there: Gpt2JaxError, on all, where they do not share
    it."""
    group = group or Group()
    processes = group.gather(this_process())
    if group.is_first:
        with _opened(folder, config, say, processes[1:]):
            group.gather(holders_text(folder))
            group.agree()
            yield
    else:
        _look_for(folder, group.gather("")[0], group)
        yield


def _look_for(folder: Path, holders: str, group: Group) -> None:
    """Whether this process sees the lock file that process 0 has just written."""
    until = time.monotonic() + _SHARED_SECONDS
    while holders_text(folder) != holders and time.monotonic() < until:
        time.sleep(_LOOK_SECONDS)
    error = None
    if holders_text(folder) != holders:
        error = Gpt2JaxError(
            f"--out-dir: expected a folder that all hosts share, found that {folder} is another one here",
            "--out-dir FOLDER   (on a file system that each host has)",
        )
    group.agree(error)


@contextmanager
def _opened(folder: Path, config: RunConfig, say: Callable[[str], None], others: Sequence[str]) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=config.run.out_dir != "")
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        cause = getattr(error, "strerror", None) or error
        raise Gpt2JaxError(f"{folder}: expected to make the run folder, found: {cause}") from None
    with locked(folder, say, others):
        if not config.run.resume:
            refuse_used_folder(folder)  # again: another run may have used it in the meantime
            if os.path.lexists(saved_config_path(folder)):
                say(f"{folder}: a run ended here before its first checkpoint; this one takes its place")
            _set_aside(folder, say)
        with atomic_write(saved_config_path(folder)) as file:
            base = RunConfig().compute
            settled = dataclasses.replace(
                config,
                run=dataclasses.replace(config.run, out_dir=str(folder), resume=False, verbose=False, profile=""),
                compute=dataclasses.replace(config.compute, **{name: getattr(base, name) for name in LAUNCH_SETTINGS}),
            )
            file.write(format_config(settled).encode("utf-8", "surrogatepass"))
        _link_latest(folder, say)
        yield


def _set_aside(folder: Path, say: Callable[[str], None]) -> None:
    """Give what lies under the names of files that a fresh run writes other names; says which."""
    for name in ("log.jsonl", "main.log", "loss.png"):
        path = folder / name
        if os.path.isfile(path) and os.path.getsize(path):
            kept = next(kept for number in count(1) if not os.path.lexists(kept := folder / f"{name}.{number}"))
            try:
                os.replace(path, kept)
            except OSError as error:
                raise Gpt2JaxError(f"{path}: expected to rename it to {kept.name}, found: {error.strerror or error}") from None
            say(f"{path}, which was there before, is now {kept.name}")


def _link_latest(folder: Path, say: Callable[[str], None]) -> None:
    """Make runs/latest name this run folder of runs/. A file or folder of that name that is no link stays."""
    link = folder.parent / "latest"
    if folder.absolute().parent.name != "runs" or (os.path.lexists(link) and not os.path.islink(link)):
        return
    new = folder.parent / f".latest-{os.getpid()}"
    try:
        os.symlink(folder.name, new, target_is_directory=True)
        os.replace(new, link)
    except OSError as error:
        say(f"{link}: expected to name this run, found: {error.strerror or error}; the run goes on without it")
