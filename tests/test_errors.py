"""How the programs end: exit statuses that scripts can trust, and no traceback for what the user can mend."""

from __future__ import annotations

import pytest

from gpt2_jax.errors import Gpt2JaxError, run_program


def end(capfd, error):
    """Status and standard error of a program whose main raises `error`."""

    def main():
        raise error

    with pytest.raises(SystemExit) as exit:
        run_program(main)
    return exit.value.code, capfd.readouterr().err


def test_our_error_is_status_2_and_its_hint(capfd):
    assert end(capfd, Gpt2JaxError("expected a, found b", "do c")) == (2, "error: expected a, found b\n---> HINT: do c\n")
    assert end(capfd, Gpt2JaxError("expected a, found b")) == (2, "error: expected a, found b\n")


def test_interruption_is_status_130(capfd):
    assert end(capfd, KeyboardInterrupt()) == (130, "interrupted\n")


def test_a_mains_own_status_is_kept(capfd):
    assert end(capfd, SystemExit(1)) == (1, "")


def test_success_ends_quietly_and_other_errors_keep_their_traceback():
    run_program(lambda: None)
    with pytest.raises(ZeroDivisionError):
        run_program(lambda: 1 / 0)
