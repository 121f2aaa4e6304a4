"""What processes tell one another without jax: threads stand for them where nobody is to end, else real processes do."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.processes import group as module
from gpt2_jax.processes.group import AgreedError, Group, join
from gpt2_jax.processes.launch import Launch
from tests.conftest import REPOSITORY


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("", 0))
        return own.getsockname()[1]


@pytest.fixture
def brief(monkeypatch):
    """Waiting is short."""
    monkeypatch.setattr(module, "START_SECONDS", 1.0)
    monkeypatch.setattr(module, "_HELLO_SECONDS", 1.0)
    monkeypatch.setattr(module, "_RETRY_SECONDS", 0.05)


def join_all(launches, facts=None):
    """What join gives or raises for each of these launches, at the same time."""

    def one(number):
        try:
            return join(launches[number], (facts or {}).get(number, {"x": "1"}))
        except Gpt2JaxError as error:
            return error

    with ThreadPoolExecutor(len(launches)) as pool:
        return list(pool.map(one, range(len(launches))))


def launches_of(number: int) -> list[Launch]:
    port = free_port()
    return [Launch(number, index, "localhost", port) for index in range(number)]


def together(groups, call):
    """The results of a call that all make, or their errors."""

    def one(group):
        try:
            return call(group)
        except Gpt2JaxError as error:
            return error

    with ThreadPoolExecutor(len(groups)) as pool:
        return list(pool.map(one, groups))


@pytest.fixture(scope="module")
def three():
    groups = join_all(launches_of(3))
    yield groups
    for group in groups:
        group.__exit__(None, None, None)


def test_everybody_has_what_everybody_gave(three):
    assert together(three, lambda group: group.gather(group.index * 10)) == [[0, 10, 20]] * 3
    made = []
    assert together(three, lambda group: group.broadcast(lambda: made.append(group.index) or "name")) == ["name"] * 3
    assert made == [0]
    assert len({(tuple(group.hosts), group.service_port) for group in three}) == 1


@pytest.mark.parametrize("failing", [0, 2])
def test_all_have_the_error_of_one(three, failing):
    def call(group):
        with group.agreed():
            if group.index == failing:
                raise OSError(28, "No space left on device")

    errors = together(three, call)
    assert all(isinstance(error, AgreedError) for error in errors)
    assert len({str(error) for error in errors}) == 1
    assert ("process 2 of 3" in str(errors[0])) == (failing == 2)
    assert "No space left on device" in str(errors[1])
    assert together(three, lambda group: group.gather(1)) == [[1, 1, 1]] * 3  # and they are in step


def test_an_error_reaches_those_that_wait_for_something_else(three):
    def call(group):
        with group.agreed():
            if group.index == 1:
                raise Gpt2JaxError("expected a, found b", "a")
            return group.gather("never")

    errors = together(three, call)
    assert [error.hint for error in errors] == ["a"] * 3
    assert together(three, lambda group: group.gather(1)) == [[1, 1, 1]] * 3


def test_facts_that_differ_are_named(three):
    errors = together(three, lambda group: group.check_same({"--train": "a" if group.index < 2 else "b"}))
    assert re.match(
        r"--train: expected the same on all processes, found a on process 0 \(.+\), b on process 2 \(", str(errors[1])
    )
    assert together(three, lambda group: group.check_same({"--train": "a"})) == [None] * 3


def test_a_process_that_is_alone_asks_nobody():
    group = Group()
    assert group.gather(3) == [3]
    assert group.broadcast(lambda: 4) == 4
    with pytest.raises(KeyError), group.agreed():
        raise KeyError
    group.check_same({"a": "b"})


def test_settings_and_versions_must_be_the_same(brief):
    errors = join_all(launches_of(3), {2: {"jax": "0.6.1", "--batch-size": "4"}} | {0: (same := {"jax": "0.7.0"}), 1: same})
    assert all(isinstance(error, Gpt2JaxError) for error in errors)
    assert re.match(
        r"jax: expected the same on all processes, found 0.7.0 on process 0 \(.+\), 0.6.1 on process 2", str(errors[0])
    )
    assert str(errors[2]) == str(errors[0])


def test_a_number_of_processes_that_is_another_ones(brief):
    port = free_port()
    errors = join_all([Launch(2, 0, "localhost", port), Launch(3, 1, "localhost", port)])
    assert "--processes: expected the same on all, found 2 on process 0, 3 on process 1" in str(errors[0])
    assert str(errors[1]) == str(errors[0])


def test_a_rank_that_is_given_twice(brief):
    port = free_port()
    errors = join_all([Launch(3, 0, "localhost", port), *[Launch(3, 1, "localhost", port)] * 2])
    assert "--process-id: expected each once, found 1 twice" in str(errors[0])
    assert {str(error) for error in errors} == {str(errors[0])}
    assert errors[0].hint == "--process-id 2   (on one of them)"


def test_a_rank_that_is_missing(brief, capsys):
    errors = join_all(launches_of(3)[:2])
    assert "expected 3 within 1 s, found none with --process-id 2" in str(errors[0])
    assert errors[0].hint.startswith("--coordinator localhost:")
    assert "--process-id 2" in errors[0].hint
    assert str(errors[1]) == str(errors[0])


def test_nobody_at_the_coordinators_address(brief):
    (error,) = join_all(launches_of(2)[1:])
    assert "--coordinator: expected process 0 to answer at localhost:" in str(error)
    assert "refused" in str(error)


def test_a_coordinator_that_says_nothing(brief):
    with socket.create_server(("", 0)) as silent:
        (error,) = join_all([Launch(2, 1, "localhost", silent.getsockname()[1])])
    assert "found a program that says nothing for 2 s" in str(error)


def test_a_port_that_is_in_use(brief):
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        (error,) = join_all([Launch(2, 0, "localhost", port)])
    assert f"expected to listen at port {port}, found that another program, or another process 0, uses it" in str(error)
    assert f"localhost:{port + 1}" in error.hint


def test_another_programs_words_are_passed_over(brief, monkeypatch):
    monkeypatch.setattr(module, "START_SECONDS", 20.0)
    launches = launches_of(2)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(join, launches[0], {})
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"{}\n", b""):
            until = time.monotonic() + 10
            while time.monotonic() < until:
                try:
                    with socket.create_connection(("localhost", launches[0].port)) as stranger:
                        stranger.sendall(words)
                    break
                except ConnectionRefusedError:
                    time.sleep(0.05)
        second = pool.submit(join, launches[1], {})
        groups = [first.result(), second.result()]
    assert together(groups, lambda group: group.gather(1)) == [[1, 1]] * 2
    for group in groups:
        group.__exit__(None, None, None)


# A process that joins, says so, and does what its argument says.
MEMBER = """
import os, sys, time
from gpt2_jax.processes import group as module
from gpt2_jax.processes.launch import Launch
from gpt2_jax.errors import Gpt2JaxError
module._LOSS_SECONDS, module._TICK_SECONDS, module._NAMES_FIRST_SECONDS = 1.0, 0.1, 1.0
index, port, does = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
with module.join(Launch(3, index, "localhost", port), {}) as group:
    group.hint = lambda: "--resume"
    group.before_loss = lambda: print("cleaned", flush=True)
    print("ready", flush=True)
    group.gather(0)  # nobody does anything before all are ready
    if does == "fails":
        raise Gpt2JaxError("expected a, found b", "a")
    if does == "breaks":
        raise RuntimeError("no such thing")
    if does == "collective":  # fails as a collective does where a process is gone
        time.sleep(0.3)
        raise ValueError("Gloo all-reduce failed")
    if does == "ends":
        sys.exit(0)
    if does == "steps":
        group.watch(1.0)
        while group.progress < 1000:
            group.progress += 1
            group.gather(group.progress)
            time.sleep(0.05)
    time.sleep(60)
"""


class Members:
    """Three processes, each of which does something."""

    def __init__(self, *does: str):
        port, self.processes = free_port(), []
        for index, what in enumerate(does):
            command = [sys.executable, "-c", MEMBER, str(index), str(port), what]
            self.processes.append(
                subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )

    def __enter__(self):
        for process in self.processes:
            assert process.stdout.readline() == "ready\n", process.stderr.read()
        return self

    def __exit__(self, *error):
        for process in self.processes:
            process.kill()
            process.communicate()

    def ended(self, *indices: int) -> list[tuple[int, str, str]]:
        """Status, output and errors of each; all end soon."""
        return [
            (process.returncode, *texts)
            for process in (self.processes[index] for index in indices)
            for texts in [process.communicate(timeout=20)]
        ]


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_ends_the_others_with_one_error(killed):
    with Members("waits", "waits", "waits") as members:
        members.processes[killed].kill()
        others = [index for index in range(3) if index != killed]
        for status, output, errors in members.ended(*others):
            assert (status, output) == (1, "cleaned\n")
            assert re.fullmatch(
                rf"error: processes: expected 3 to train together, found that process {killed} of 3 \(.+\) has ended\n"
                r"---> HINT: --resume\n",
                errors,
            )


def test_a_collective_that_fails_since_a_process_is_gone_is_that_processes_end():
    with Members("waits", "waits", "collective") as members:
        members.processes[1].kill()
        for status, _, errors in members.ended(0, 2):
            assert status == 1
            assert "found that process 1 of 3" in errors
            assert "Traceback" not in errors


def test_an_error_of_one_process_ends_all_and_process_0_says_it():
    with Members("waits", "fails", "waits") as members:
        first, failed, third = members.ended(0, 1, 2)
    assert [first[0], failed[0], third[0]] == [2, 2, 2]
    assert re.fullmatch(r"error: process 1 of 3 \(.+\): expected a, found b\n---> HINT: a\n", first[2])
    assert failed[2] == third[2] == ""


def test_an_error_of_process_0_ends_all():
    with Members("fails", "waits", "waits") as members:
        first, *others = members.ended(0, 1, 2)
    assert first[::2] == (2, "error: expected a, found b\n---> HINT: a\n")
    assert [other[::2] for other in others] == [(2, "")] * 2


def test_a_fault_of_the_program_shows_its_traceback_and_ends_all():
    with Members("waits", "breaks", "waits") as members:
        first, broken, _ = members.ended(0, 1, 2)
    assert broken[0] == 1
    assert "RuntimeError: no such thing" in broken[2]
    assert "process 1 of 3" in first[2]
    assert "RuntimeError: no such thing" in first[2]


def test_ctrl_c_to_one_process_ends_all():
    with Members("waits", "waits", "waits") as members:
        time.sleep(0.3)
        members.processes[1].send_signal(signal.SIGINT)
        first, interrupted, third = members.ended(0, 1, 2)
    assert [first[0], interrupted[0], third[0]] == [130, 130, 130]
    assert re.match(r"error: process 1 of 3 \(.+\): interrupted\n", first[2])
    assert "Traceback" not in interrupted[2]


def test_a_process_that_ends_as_it_should_ends_nobody():
    with Members("waits", "ends", "waits") as members:
        assert members.ended(1)[0][0] == 0
        time.sleep(0.5)
        assert [members.processes[index].poll() for index in (0, 2)] == [None, None]


@pytest.mark.skipif(os.name != "posix", reason="no SIGSTOP")
@pytest.mark.parametrize("stuck", [0, 2])
def test_a_process_that_stands_still_is_named(stuck):
    with Members("steps", "steps", "steps") as members:
        time.sleep(0.5)
        members.processes[stuck].send_signal(signal.SIGSTOP)
        others = [index for index in range(3) if index != stuck]
        found = "that nothing goes on" if stuck == 0 else f"that process {stuck} of 3"
        for status, _, errors in members.ended(*others):
            assert status == 1
            assert f"expected something done within 1 s, found {found}" in errors
        members.processes[stuck].send_signal(signal.SIGCONT)
