"""Printing ends no program: what an encoding lacks is escaped, and a stream that is gone takes no work with it.

The programs run in processes of their own, whose streams can really be taken away.
"""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from gpt2_jax.errors import run_program
from gpt2_jax.output import without_controls
from tests.conftest import REPOSITORY

EVERYTHING = "é 中 😀 \udcff \ud800 ✓"
HEAD = """
import sys
from pathlib import Path
from rich.console import Console
from rich.text import Text
from gpt2_jax.errors import Gpt2JaxError, announce, run_program
from gpt2_jax.output import output_is_no_result
TEXT = "é 中 😀 \\udcff \\ud800 ✓"
def wait():
    print("waiting", flush=True)
    sys.stdin.readline()
"""
# Writes a file in the end, as a training run does.
WORKS = """
def main():
    output_is_no_result()
    wait()
    for number in range(3):
        print("a line", number, flush=True)
        print("a remark", file=sys.stderr, flush=True)
    Path("done").write_text("all of it")
run_program(main)
"""


def start(program: str, folder: Path, *, options: tuple[str, ...] = (), prefix: str = "", **streams) -> subprocess.Popen:
    (folder / "program.py").write_text(HEAD + textwrap.dedent(program), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUTF8": "0"} | streams.pop("environment", {})
    command = [sys.executable, *options, "program.py"]
    if prefix:
        command = ["/bin/sh", "-c", f'{prefix} exec "$@" {streams.pop("redirect", "")}', "sh", *command]
    return subprocess.Popen(command, cwd=folder, env=environment, **streams)


def run(program: str, folder: Path, **arguments) -> tuple[int, bytes, bytes]:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL} | arguments
    with start(program, folder, **streams) as process:
        output, errors = process.communicate(timeout=60)
    return process.returncode, output or b"", errors or b""


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8", "utf-8:strict", "utf-8:surrogateescape", "cp1252", "cp037"])
@pytest.mark.parametrize("options", [(), ("-u",)])
def test_what_an_encoding_lacks_is_escaped(tmp_path, encoding, options):
    program = """
    def main():
        print(TEXT)
        Console(soft_wrap=True).print(Text(TEXT))
        announce(TEXT)
        raise Gpt2JaxError(TEXT, TEXT)
    run_program(main)
    """
    status, output, errors = run(program, tmp_path, options=options, environment={"PYTHONIOENCODING": encoding})
    codec = encoding.partition(":")[0]
    shown = EVERYTHING.encode(codec, "backslashreplace").decode(codec)
    assert status == 2
    assert output.decode(codec).splitlines() == [shown, shown]
    assert errors.decode(codec).splitlines() == [shown, f"error: {shown}", f"---> HINT: {shown}"]


def test_a_handler_that_the_user_has_chosen_is_kept(tmp_path):
    program = "run_program(lambda: print(TEXT))"
    _, output, _ = run(program, tmp_path, environment={"PYTHONIOENCODING": "ascii:replace"})
    assert output == b"? ? ? ? ? ?\n"


@pytest.mark.parametrize("options", [(), ("-u",)])
def test_a_result_whose_reader_is_gone_ends_quietly(tmp_path, options):
    """As `| head` leaves it."""
    program = """
    def main():
        print("x" * 100_000)
        Path("done").write_text("not to be reached")
    run_program(main)
    """
    reader, writer = os.pipe()
    os.close(reader)
    assert run(program, tmp_path, options=options, stdout=writer) == (141, b"", b"")
    os.close(writer)
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize("program", ["print('short')", "print('short') or sys.exit(1)"])
def test_a_closed_pipe_is_met_before_the_program_ends(tmp_path, program):
    reader, writer = os.pipe()
    os.close(reader)
    assert run(f"run_program(lambda: {program})", tmp_path, stdout=writer) == (141, b"", b"")
    os.close(writer)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_result_that_does_not_fit_on_the_disk_is_an_error(tmp_path):
    with open("/dev/full", "w") as full:
        status, _, errors = run("run_program(lambda: print('a result'))", tmp_path, stdout=full)
    assert (status, errors) == (2, b"error: standard output: expected to write it, found: No space left on device\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize(("stream", "name", "other"), [("stdout", "output", 2), ("stderr", "error", 1)])
def test_work_goes_on_without_a_full_disk_and_says_so_once(tmp_path, stream, name, other):
    with open("/dev/full", "w") as full:
        ended = run(WORKS, tmp_path, **{stream: full})
    assert ended[0] == 0
    said = f"standard {name} can no longer be written (No space left on device); the work goes on without it\n"
    assert ended[other].decode().count(said) == 1
    assert (tmp_path / "done").read_text() == "all of it"


def test_work_goes_on_when_the_reader_ends(tmp_path):
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.PIPE}
    with start(WORKS, tmp_path, **streams) as process:
        assert process.stdout.readline() == b"waiting\n"
        process.stdout.close()
        process.stdin.write(b"\n")
        process.stdin.close()
        errors = process.stderr.read()
    assert process.returncode == 0
    assert errors.count(b"standard output can no longer be written (Broken pipe)") == 1
    assert errors.count(b"a remark") == 3
    assert (tmp_path / "done").read_text() == "all of it"


def test_work_goes_on_when_its_terminal_is_gone(tmp_path):
    """Both streams and the input are one terminal; its SIGHUP is ignored, as nohup and the training loop have it."""
    master, slave = pty.openpty()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with start(WORKS, tmp_path, stdin=subprocess.PIPE, stdout=slave, stderr=slave) as process:
            os.close(slave)
            assert b"waiting" in os.read(master, 100)
            os.close(master)
            process.stdin.write(b"\n")
            process.stdin.close()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert process.returncode == 0
    assert (tmp_path / "done").read_text() == "all of it"


@pytest.mark.parametrize("redirect", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_streams_that_were_closed_from_the_start_take_no_file_with_them(tmp_path, redirect):
    """A file that is opened must not get the number of a standard stream, which libraries in C++ write to."""
    program = """
    import os
    def main():
        print(TEXT)
        announce(TEXT)
        with open("done", "w") as file:
            os.write(1, b"of a library\\n")
            os.write(2, b"of a library\\n")
            file.write("all of it")
    run_program(main)
    """
    # Its result is lost where standard output is closed.
    assert run(program, tmp_path, prefix=":;", redirect=redirect)[0] == (2 if ">&-" in redirect.split() else 0)
    assert (tmp_path / "done").read_text() == "all of it"


def test_a_pipe_that_does_not_wait_gets_all_of_it(tmp_path):
    """Some programs that start others leave their pipes and terminals in this state."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    pieces = []
    with start("run_program(lambda: print('x' * 1_000_000))", tmp_path, stdout=writer, stderr=subprocess.PIPE) as process:
        os.close(writer)
        thread = threading.Thread(target=lambda: pieces.extend(iter(lambda: os.read(reader, 1000), b"")))
        thread.start()
        errors = process.stderr.read()
        thread.join()
    os.close(reader)
    assert (process.returncode, errors) == (0, b"")
    assert b"".join(pieces) == b"x" * 1_000_000 + b"\n"


def test_streams_are_those_from_before_once_the_program_has_ended(capsys):
    before = sys.stdout, sys.stderr
    run_program(lambda: print("a line"))
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr().out == "a line\n"


def test_control_characters_are_no_orders_to_the_terminal():
    assert without_controls("a\tb\nc\x1b[2J\r\x00\x07\x7f\x9b é") == "a\tb\nc\\x1b[2J\\x0d\\x00\\x07\\x7f\\x9b é"
