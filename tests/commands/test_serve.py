"""The command: what it refuses before a model is loaded."""

from __future__ import annotations

import socket
import sys

import pytest

from gpt2_jax.commands import serve
from gpt2_jax.errors import Gpt2JaxError


def test_a_port_that_is_taken_is_two_lines():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Gpt2JaxError, match=f"--port: expected to listen at 127.0.0.1:{port}, found: ") as error:
            serve._listen("127.0.0.1", port)
    assert error.value.hint == f"--port {port + 1 if port < 65535 else 8000}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "70000"], "--port: expected a number from 0 to 65535, found 70000"),
        (["--seconds", "0"], "--seconds: expected a number above 0, found 0.0"),
        (["--seconds", "nan"], "--seconds: expected a number above 0, found nan"),
        (["--waiting", "0"], "--waiting: expected at least 1, found 0"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(words, said):
    with pytest.raises(Gpt2JaxError, match=said):
        serve.main(["runs/none", *words])


def test_without_its_extra_the_command_that_brings_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(Gpt2JaxError, match="serve: expected the package uvicorn, found none") as error:
        serve.main(["runs/none"])
    assert error.value.hint == "pip install 'gpt2_jax[serve]'"
