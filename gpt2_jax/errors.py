"""The one error that a user of gpt2_jax ever has to catch, and how the programs report it.

Commands in hints are written in one form, `python scripts/train.py …`; whoever prints them says them in the form in which
this program was started.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from gpt2_jax.output import OutputLostError, guarded_streams

# The commands whose script has another name than they have.
_SCRIPTS = {"prepare": "prepare_data", "reshard": "reshard_checkpoint", "starter-pack": "write_starter_pack"}
_COMMANDS = {script: command for command, script in _SCRIPTS.items()}
_command = ""  # of this process


class Gpt2JaxError(Exception):
    """Something the user can mend: one line with what was expected and what was found, one with the mending command."""

    def __init__(self, problem: str, hint: str | None = None):
        self.problem, self.hint = problem, hint
        super().__init__(problem if hint is None else f"{problem}\n---> HINT: {hint}")


def started_as(command: str) -> None:
    """Note which command this process runs."""
    global _command
    _command = command


def program_name() -> str:
    """This process's command as it was typed: 'gpt2-jax train', 'python -m gpt2_jax train' or 'python scripts/train.py'."""
    return _typed(_command)


def as_typed(text: str) -> str:
    """A text whose commands `python scripts/NAME.py` are said in the form in which this program was started.

    A process that runs no command, but uses the package as a library, gets the text as it is.
    """
    if not _command:
        return text
    return re.sub(
        r"\bpython scripts/(\w+)\.py",
        lambda found: _typed(command_of_script(found[1])),
        text,
    )


def command_of_script(script: str) -> str:
    """The command of a script by its name without .py: 'reshard' for 'reshard_checkpoint'."""
    return _COMMANDS.get(script, script.replace("_", "-"))


def _typed(command: str) -> str:
    """A command in the form in which this program was started."""
    started = Path(sys.argv[0])
    if started.name == "__main__.py":
        return f"python -m gpt2_jax {command}".rstrip()
    if started.suffix == ".py":
        script = _SCRIPTS.get(command, command.replace("-", "_"))
        return f"python {shlex.quote(str(started.with_name(f'{script}.py')))}"
    return f"{started.name} {command}".rstrip()


def announce(text: str) -> None:
    """Tell the user something that is no error, where standard output has the result."""
    print(text, file=sys.stderr, flush=True)


def run_program(main: Callable[[], None]) -> None:
    """Run a command's main and end the process: status 0, 2 for a Gpt2JaxError, 130 for Ctrl-C, 141 when the pipe that
    reads the output has closed; no traceback for these.

    A main that ends with SystemExit keeps its own status. Whatever main prints can be shown, see output.py.
    """
    with guarded_streams():
        try:
            try:
                main()
            except SystemExit:
                sys.stdout.flush()
                raise
            sys.stdout.flush()  # so that a closed pipe is met here, not when the interpreter ends
        except Gpt2JaxError as error:
            _end(2, f"error: {as_typed(str(error))}")
        except OutputLostError as lost:
            if isinstance(lost.cause, BrokenPipeError):
                sys.exit(141)
            _end(2, f"error: {lost}")
        except KeyboardInterrupt:
            _end(130, "interrupted")


def _end(status: int, text: str) -> NoReturn:
    print(text, file=sys.stderr, flush=True)
    sys.exit(status)
