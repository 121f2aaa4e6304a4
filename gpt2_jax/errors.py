"""The one error that a user of gpt2_jax ever has to catch, and how the programs report it.

Commands in hints are written in one form, `python scripts/train.py …`; whoever prints them says them in the form in which
this program was started.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

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
    """This process's command as it was typed: 'gpt2-jax train', 'python -m gpt2_jax train' or 'scripts/train.py'."""
    started = Path(sys.argv[0])
    if started.name == "__main__.py":
        return f"python -m gpt2_jax {_command}".strip()
    return f"{started.name} {_command}".strip() if started.suffix != ".py" else sys.argv[0]


def as_typed(text: str) -> str:
    """A text whose commands `python scripts/NAME.py` are said in the form in which this program was started."""
    started = Path(sys.argv[0])

    def typed(match: re.Match[str]) -> str:
        command = _COMMANDS.get(match[1], match[1].replace("_", "-"))
        if not _command:  # used as a library
            return match[0]
        if started.name == "__main__.py":
            return f"python -m gpt2_jax {command}"
        if started.suffix == ".py":
            return f"python {shlex.quote(str(started.with_name(match[1] + '.py')))}"
        return f"{started.name} {command}"

    return re.sub(r"\bpython scripts/(\w+)\.py", typed, text)


def run_program(main: Callable[[], None]) -> None:
    """Run a command's main and end the process: status 0, 2 for a Gpt2JaxError, 130 for Ctrl-C, 141 when the pipe that
    reads the output has closed; no traceback for these.

    A main that ends with SystemExit keeps its own status.
    """
    try:
        main()
        sys.stdout.flush()  # so that a closed pipe is met here, not when the interpreter ends
    except Gpt2JaxError as error:
        print(f"error: {as_typed(str(error))}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # What is still buffered can go nowhere either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
