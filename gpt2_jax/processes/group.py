"""The processes of one run, and what they tell one another beside the numbers that devices exchange.

Process 0 listens at the coordinator's address; every other process keeps one connection to it for the whole run. Before jax
starts the connections show who is missing, there twice or started otherwise: jax's own service ends the process with a stack
trace for each of these (seen with jax 0.10.2). During the run they carry short texts, and a connection that closes tells at
once that a process is gone.

A message is one line of JSON. Standard library only.
"""

from __future__ import annotations

import errno
import json
import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from gpt2_jax.errors import Gpt2JaxError, announce, as_typed
from gpt2_jax.processes.launch import Launch

START_SECONDS = 300.0  # within which all processes must have come
_SAID_AFTER_SECONDS = 5.0
_RETRY_SECONDS = 0.2
_HELLO_SECONDS = 10.0  # within which a connection must say who it is
_LOSS_SECONDS = 5.0  # within which a process that is gone is noticed, once a collective has failed
_TICK_SECONDS = 5.0  # between two reports of progress
_LEAVE_SECONDS = 2.0  # that process 0 waits for the others to end: jax's service ends with it, and they with a stack trace
_NAMES_FIRST_SECONDS = 10.0  # that process 0 has to name the process that is stuck, before the others end by themselves
_PROTOCOL = 1
_MAX_LINE = 10_000_000

_Value = TypeVar("_Value")


class AgreedError(Gpt2JaxError):
    """An error of one process that all processes raise together."""


class Group:
    """All processes of a run as one of them sees them; by default a process that is alone. As a context it ends the others
    when this process fails."""

    def __init__(self, launch: Launch | None = None) -> None:
        self.launch = launch or Launch()
        self.number, self.index = self.launch.number, self.launch.index
        self.hosts = [socket.gethostname()]  # of every process
        self.service_port = 0  # of jax's own service, on process 0's host
        self.progress = 0  # counted up by each thing that this process gets done
        self.before_loss: Callable[[], None] = lambda: None  # called before a process ends because another one is gone
        self.hint: Callable[[], str] = lambda: "the same command on each"
        self._connections: dict[int, _Connection] = {}
        self._values: dict[int, queue.SimpleQueue[Any]] = {}  # by the process that sent them
        self._ending = threading.Lock()  # taken by whoever ends this process
        self._gone: set[int] = set()  # those that ended as they should
        self._left: set[int] = set()  # those whose connection has closed
        self._seen: dict[int, tuple[int, float]] = {}  # progress, and since when it has not changed

    @property
    def is_first(self) -> bool:
        """Whether this process prints, logs and names the folder."""
        return self.index == 0

    def name_of(self, index: int) -> str:
        """A process, for people."""
        return f"process {index} of {self.number} ({self.hosts[index]})"

    # What all processes call together.

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by their index; they must be JSON's. Nobody goes on before all have called, or one has
        called `agree` with an error, which is raised here then."""
        return [value] if self.number == 1 else self._exchange(value, None)

    def _exchange(self, value: Any, error: Exception | None) -> list[Any]:
        mine = [value, None if error is None else _texts(error)]
        if self.is_first:
            of_all = [mine, *(self._values[index].get() for index in range(1, self.number))]
            self._tell_all({"kind": "value", "value": of_all})
        else:
            self._connections[0].send({"kind": "value", "value": mine})
            of_all = self._values[0].get()
        for index, (_, texts) in enumerate(of_all):
            if texts is not None:
                problem, hint = texts
                raise AgreedError(problem if index == 0 else f"{self.name_of(index)}: {problem}", hint) from error
        return [value for value, _ in of_all]

    def broadcast(self, make: Callable[[], _Value]) -> _Value:
        """What process 0 makes; nobody else makes it."""
        return self.gather(make() if self.is_first else None)[0]

    def agree(self, error: Exception | None = None) -> None:
        """Go on if no process has an error. AgreedError, on all, of the first process that has one."""
        if isinstance(error, AgreedError) or (self.number == 1 and error is not None):
            raise error
        if self.number > 1:
            self._exchange(None, error)

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """What is done inside succeeds on all processes, or raises AgreedError on all."""
        if self.number == 1:
            yield
            return
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        self.agree(error)

    def check_same(self, facts: Mapping[str, str]) -> None:
        """AgreedError, naming the first fact and process, unless all processes have the same."""
        if self.number == 1:
            return
        error = None
        for index, theirs in enumerate(self.gather(dict(facts))):
            if self.is_first and error is None:
                error = _difference(facts, theirs, self.hosts, index)
        self.agree(error)

    # The beginning and the end.

    def __enter__(self) -> Group:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.number == 1:
            return
        if error is None or isinstance(error, SystemExit):
            for connection in self._connections.values():
                connection.end()
            return
        if not isinstance(error, (Gpt2JaxError, KeyboardInterrupt)):
            # A collective fails where a process is gone; its connection tells which.
            time.sleep(_LOSS_SECONDS)
        self._end_with(error)

    def _end_with(self, error: BaseException) -> NoReturn:
        self._ending.acquire()
        status = 2 if isinstance(error, Gpt2JaxError) else 130 if isinstance(error, KeyboardInterrupt) else 1
        end = {"kind": "end", "texts": _texts(error), "index": self.index, "status": status}
        with suppress(OSError):
            self._tell_all({"kind": "bye"} if isinstance(error, AgreedError) else end)
        if not isinstance(error, (Gpt2JaxError, KeyboardInterrupt)):
            traceback.print_exception(error)
        elif self.is_first:
            is_error = isinstance(error, Gpt2JaxError)
            print(f"error: {as_typed(str(error))}" if is_error else "interrupted", file=sys.stderr)
        self._leave(status)

    def watch(self, seconds: float) -> None:
        """From here on end all processes when `progress` has stood still for so long on every one of them, as it soon does
        when one is stuck."""
        if self.number > 1:
            threading.Thread(target=self._watch, args=(seconds,), daemon=True).start()

    def _watch(self, seconds: float) -> None:
        limit = seconds if self.is_first else seconds + _NAMES_FIRST_SECONDS
        self._seen = dict.fromkeys(range(self.number), (-1, time.monotonic()))
        while True:
            time.sleep(min(_TICK_SECONDS, seconds / 4))
            self._note_progress(self.index, self.progress)
            # Process 0 tells of all processes, the others of themselves.
            told = sum(progress for progress, _ in self._seen.values()) if self.is_first else self.progress
            with suppress(OSError):
                self._tell_all({"kind": "progress", "value": told})
            if time.monotonic() - max(since for _, since in self._seen.values()) < limit:
                continue
            stuck = min(self._seen, key=lambda index: self._seen[index])
            who = f"that {self.name_of(stuck)} stands still" if self.is_first else "that nothing goes on"
            self._end_all(f"processes: expected something done within {seconds:g} s, found {who}")

    def _note_progress(self, index: int, progress: int) -> None:
        if self._seen.get(index, (-1, 0.0))[0] != progress:
            self._seen[index] = progress, time.monotonic()

    # Connections.

    def _tell_all(self, message: dict[str, Any]) -> None:
        for connection in self._connections.values():
            connection.send(message)

    def _connect(self, connections: dict[int, _Connection]) -> None:
        """Keep these connections, and listen to each."""
        self._connections = connections
        for index, connection in connections.items():
            self._values[index] = queue.SimpleQueue()
            threading.Thread(target=self._listen, args=(index, connection), daemon=True).start()

    def _listen(self, index: int, connection: _Connection) -> None:
        """Do what the messages of another process say, until it ends."""
        while True:
            try:
                message = connection.receive()
            except (OSError, ValueError):
                message = None
            if message is None:
                self._left.add(index)
                if index not in self._gone:
                    expected = f"processes: expected {self.number} to train together"
                    self._end_all(f"{expected}, found that {self.name_of(index)} has ended")
                connection.half_done()
                return
            kind = message.get("kind")
            if kind == "value":
                self._values[index].put(message["value"])
            elif kind == "progress":
                self._note_progress(index, message["value"])
            elif kind == "bye":
                self._gone.add(index)
            elif kind == "end":
                problem, hint = message["texts"]
                who = f"{self.name_of(message['index'])}: " if self.is_first else ""
                self._end_all(f"{who}{problem}", hint, status=message["status"])

    def _end_all(self, problem: str, hint: str | None = None, *, status: int = 1) -> None:
        """End this process, process 0 also the others; unless it is ending already. What the user can mend process 0 says
        alone, with status 2; that others are gone each says where it runs."""
        if not self._ending.acquire(blocking=False):
            return
        hint = hint or self.hint()
        if self.is_first:
            for connection in self._connections.values():
                with suppress(OSError):
                    connection.send({"kind": "end", "texts": [problem, hint], "index": 0, "status": status})
        if self.is_first or status == 1:
            print(f"error: {as_typed(str(Gpt2JaxError(problem, hint)))}", file=sys.stderr)
        with suppress(Exception):
            self.before_loss()
        self._leave(status)

    def _leave(self, status: int) -> NoReturn:
        """End the process without jax's own end, which waits for the other processes."""
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        until = time.monotonic() + (_LEAVE_SECONDS if self.is_first else 0.0)
        while len(self._left) < self.number - 1 and time.monotonic() < until:
            time.sleep(0.01)
        os._exit(status)


def _texts(error: BaseException) -> list[str | None]:
    if isinstance(error, Gpt2JaxError):
        return [error.problem, error.hint]
    if isinstance(error, KeyboardInterrupt):
        return ["interrupted", None]
    return [" ".join(f"{type(error).__name__}: {error}".split())[:500], None]


def _difference(mine: Mapping[str, str], theirs: Mapping[str, str], hosts: list[str], index: int) -> Gpt2JaxError | None:
    for name in (*mine, *(name for name in theirs if name not in mine)):
        if (here := mine.get(name, "none")) != (there := theirs.get(name, "none")):
            return Gpt2JaxError(
                f"{name}: expected the same on all processes, found {here} on process 0 ({hosts[0]}), "
                f"{there} on process {index} ({hosts[index]})",
                "the same command, installation and data on each host",
            )
    return None


def join(launch: Launch, facts: Mapping[str, str]) -> Group:
    """Wait until all processes of a launch are there; `facts` must be the same on all. Gpt2JaxError, on all that are there,
    when one is missing, comes twice or has other facts."""
    group = Group(launch)
    if launch.number > 1:
        (_welcome if launch.index == 0 else _arrive)(group, dict(facts))
    return group


class _Connection:
    def __init__(self, own: socket.socket):
        self._socket, self._lock = own, threading.Lock()
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # A host that has lost its power or its network closes nothing: noticed after 20 + 6 * 10 seconds.
        for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
            if hasattr(socket, name):
                own.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._file = own.makefile("rb")
        self._open_halves = 2

    def send(self, message: dict[str, Any]) -> None:
        with self._lock:
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float | None = None) -> dict[str, Any] | None:
        """The next message; None once the other end has closed. OSError when none comes in time, ValueError for another
        program's."""
        self._socket.settimeout(seconds)
        line = self._file.readline(_MAX_LINE)
        if not line:
            return None
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError("no message")
        return message

    def end(self) -> None:
        """Say that nothing more will be sent."""
        with suppress(OSError):
            self.send({"kind": "bye"})
            self._socket.shutdown(socket.SHUT_WR)
        self.half_done()

    def half_done(self) -> None:
        """Called once this end has said that it sends nothing more, and once the other end has: then all is closed."""
        with self._lock:
            self._open_halves -= 1
            if self._open_halves == 0:
                self.__exit__()

    def __enter__(self) -> _Connection:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._socket.close()


def _welcome(group: Group, facts: dict[str, str]) -> None:
    """Process 0: wait for the others, and let them in together."""
    launch = group.launch
    try:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        listener = socket.create_server(("", launch.port), family=family, dualstack_ipv6=dual, backlog=launch.number)
    except OSError as error:
        in_use = error.errno == errno.EADDRINUSE
        found = "that another program, or another process 0, uses it" if in_use else error.strerror or str(error)
        raise Gpt2JaxError(
            f"--coordinator: expected to listen at port {launch.port}, found {found}",
            f"--coordinator {launch.host}:{launch.port + 1 if launch.port < 65535 else launch.port - 1}   (on each)",
        ) from None
    came: dict[int, tuple[_Connection, str]] = {}
    try:
        with listener:
            for index, connection, hello in _hellos(listener, launch, came):
                host = str(hello.get("host"))
                if index in came:
                    twice = f"on {came[index][1]} and on {host}"
                    came[launch.number] = connection, host  # to be told, too
                    free = next((number for number in range(1, launch.number) if number not in came), 1)
                    hint = f"--process-id {free}   (on one of them)"
                    raise Gpt2JaxError(f"--process-id: expected each once, found {index} twice, {twice}", hint)
                came[index] = connection, host
                hosts = [group.hosts[0], *("?" for _ in range(1, launch.number))]
                hosts[index] = host
                if difference := _difference(facts, hello["facts"], hosts, index):
                    raise difference
            with socket.socket() as unused:
                unused.bind(("", 0))
                group.service_port = unused.getsockname()[1]
        group.hosts += [came[index][1] for index in range(1, launch.number)]
        for connection, _ in came.values():
            connection.send({"kind": "welcome", "hosts": group.hosts, "port": group.service_port})
    except (Gpt2JaxError, OSError) as error:
        for connection, _ in came.values():
            with connection, suppress(OSError):
                connection.send({"kind": "end", "texts": _texts(error)})
        raise
    group._connect({index: came[index][0] for index in range(1, launch.number)})


def _hellos(
    listener: socket.socket, launch: Launch, came: Mapping[int, object]
) -> Iterator[tuple[int, _Connection, dict[str, Any]]]:
    """Index, connection and first message of every process that comes, until all are in `came`. What other programs send is
    passed over."""
    started, said = time.monotonic(), False
    while len(came) < launch.number - 1:
        seconds = time.monotonic() - started
        missing = ", ".join(str(index) for index in range(1, launch.number) if index not in came)
        if seconds > START_SECONDS:
            raise Gpt2JaxError(
                f"processes: expected {launch.number} within {START_SECONDS:g} s, found none with --process-id {missing}",
                f"--coordinator {launch.coordinator} --processes {launch.number} --process-id {missing.partition(',')[0]}   "
                "(where it is missing)",
            )
        if seconds > _SAID_AFTER_SECONDS and not said:
            announce(f"waiting at {launch.coordinator} for the processes {missing} of {launch.number} ...")
            said = True
        listener.settimeout(_RETRY_SECONDS)
        try:
            accepted, _ = listener.accept()
        except TimeoutError:
            continue
        accepted.settimeout(None)
        connection = _Connection(accepted)
        try:
            hello = connection.receive(_HELLO_SECONDS)
        except (OSError, ValueError):
            hello = None
        if hello is None or hello.get("gpt2_jax") != _PROTOCOL or not isinstance(hello.get("facts"), dict):
            with connection:
                continue
        if hello["number"] != launch.number:
            error = Gpt2JaxError(
                f"--processes: expected the same on all, found {launch.number} on process 0, {hello['number']} on process "
                f"{hello['index']} ({hello['host']})",
                f"--processes {launch.number}",
            )
            with connection, suppress(OSError):
                connection.send({"kind": "end", "texts": _texts(error)})
            raise error
        yield int(hello["index"]), connection, hello


def _arrive(group: Group, facts: dict[str, str]) -> None:
    """Every other process: say who this is, and wait until all are there."""
    launch = group.launch
    connection = _Connection(_reach(launch))
    try:
        group.hosts, group.service_port = _hear_welcome(group, connection, facts)
    except BaseException:
        with connection:
            raise
    group._connect({0: connection})


def _hear_welcome(group: Group, connection: _Connection, facts: dict[str, str]) -> tuple[list[str], int]:
    """The hosts of all processes, and the port of jax's service, once process 0 has let this process in."""
    launch = group.launch
    hello = {"gpt2_jax": _PROTOCOL, "index": launch.index, "number": launch.number, "host": group.hosts[0], "facts": facts}
    found = "a connection that closed"
    answer = None
    try:
        connection.send(hello)
        answer = connection.receive(START_SECONDS + _HELLO_SECONDS)
    except TimeoutError:
        found = f"a program that says nothing for {START_SECONDS + _HELLO_SECONDS:g} s"
    except (OSError, ValueError) as error:
        found = f"a program that does not answer as process 0 does ({' '.join(str(error).split())[:80]})"
    if answer is not None and answer.get("kind") == "end":
        raise AgreedError(*answer["texts"])
    if answer is None or answer.get("kind") != "welcome":
        raise Gpt2JaxError(
            f"--coordinator: expected process 0 to answer at {launch.coordinator}, found {found}",
            f"--coordinator HOST:{launch.port}   (HOST is where process 0 runs)",
        )
    return answer["hosts"], answer["port"]


def _reach(launch: Launch) -> socket.socket:
    """A connection to process 0, which may start later than this process."""
    started, said = time.monotonic(), False
    while True:
        try:
            own = socket.create_connection((launch.host, launch.port), timeout=_HELLO_SECONDS)
            if own.getsockname() == own.getpeername():  # Linux connects a socket to itself where nobody listens
                own.close()
                raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
            return own
        except OSError as error:
            seconds = time.monotonic() - started
            if seconds > START_SECONDS:
                cause = error.strerror or str(error)
                raise Gpt2JaxError(
                    f"--coordinator: expected process 0 to answer at {launch.coordinator} within {START_SECONDS:g} s, "
                    f"found: {cause}",
                    f"--coordinator {launch.coordinator} --processes {launch.number} --process-id 0   (there)",
                ) from None
            if seconds > _SAID_AFTER_SECONDS and not said:
                announce(f"process {launch.index} of {launch.number}: waiting for process 0 at {launch.coordinator} ...")
                said = True
            time.sleep(_RETRY_SECONDS)
