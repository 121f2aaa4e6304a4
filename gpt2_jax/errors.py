"""The one error that a user of gpt2_jax ever has to catch, and how the programs report it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class Gpt2JaxError(Exception):
    """Something the user can mend: one line with what was expected and what was found, one with the mending command."""

    def __init__(self, problem: str, hint: str | None = None):
        self.problem, self.hint = problem, hint
        super().__init__(problem if hint is None else f"{problem}\n---> HINT: {hint}")


def run_program(main: Callable[[], None]) -> None:
    """Run a script's main and end the process: status 0, 2 for a Gpt2JaxError, 130 for Ctrl-C, 141 when the pipe that
    reads the output has closed; no traceback for these.

    A main that ends with SystemExit keeps its own status.
    """
    try:
        main()
        sys.stdout.flush()  # so that a closed pipe is met here, not when the interpreter ends
    except Gpt2JaxError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # What is still buffered can go nowhere either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
