"""Which of how many processes this one is, and where process 0 answers: by flags, by a list of hosts, under SLURM or Open MPI.

Standard library only; nothing here is sent to anybody.
"""

from __future__ import annotations

import re
import shlex
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from gpt2_jax.errors import Gpt2JaxError

DEFAULT_PORT = 12345  # llm.c's
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID")
_MPI = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
# SLURM's ports: of the job's number, so that jobs that share a host do not meet. Above those that systems give away.
_FIRST_SLURM_PORT, _NUM_SLURM_PORTS = 61440, 4096


@dataclass(frozen=True)
class Launch:
    """One of the processes of a run. `local_index` and `num_local` count those of the same host; 0 and 1 where it is not
    known that there are others."""

    number: int = 1
    index: int = 0
    host: str = ""  # of process 0
    port: int = 0
    method: str = "none"  # for people
    local_index: int = 0
    num_local: int = 1

    @property
    def coordinator(self) -> str:
        return f"{self.host}:{self.port}"


def find_launch(
    environment: Mapping[str, str],
    *,
    coordinator: str = "",
    processes: int = 0,
    process_id: int = -1,
    hosts: str = "",
    method: str = "auto",
) -> Launch:
    """The launch that flags and environment mean; `processes` 0 and `process_id` -1 are flags that were not given.

    Named flags come before what is found: Open MPI, whose mpirun may itself run under SLURM, then SLURM. Gpt2JaxError for
    flags that are not enough or contradict one another, and for a method whose launcher did not start this process.
    """
    if method == "none" and (coordinator or hosts or processes > 1):
        flag = "--coordinator" if coordinator else "--hosts" if hosts else "--processes"
        raise Gpt2JaxError(f"{flag}: expected none with --distributed none, found one", "leave --distributed out")
    if hosts:
        return _by_hosts(hosts, coordinator, processes, process_id)
    host, port = _address(coordinator) if coordinator else ("", 0)
    named = processes > 0 or process_id >= 0
    if method == "mpi" or (method == "auto" and not named and int(environment.get(_MPI[0], 1)) > 1):
        return _by_mpi(environment, host, port)
    if method == "slurm" or (method == "auto" and not named and _is_slurm_step(environment)):
        return _by_slurm(environment, host, port)
    if coordinator or named:
        return _by_flags(coordinator, host, port, processes, process_id)
    return Launch()


def _by_flags(coordinator: str, host: str, port: int, processes: int, process_id: int) -> Launch:
    if processes == 1 and process_id <= 0:
        return Launch()
    hint = f"--coordinator {coordinator or f'HOST:{DEFAULT_PORT}'} --processes {max(processes, 2)} --process-id 0"
    each = f"{hint}   (on HOST; then 1, 2 ..., another for each process)"
    for flag, is_there in (
        ("--coordinator", bool(coordinator)),
        ("--processes", processes > 0),
        ("--process-id", process_id >= 0),
    ):
        if not is_there:
            raise Gpt2JaxError(f"{flag}: expected with several processes, found none", each)
    if process_id >= processes:
        raise Gpt2JaxError(
            f"--process-id: expected one of 0 to {processes - 1}, as there are {processes} processes, found {process_id}", each
        )
    return Launch(processes, process_id, host, port, "--coordinator")


def _by_hosts(hosts: str, coordinator: str, processes: int, process_id: int) -> Launch:
    for flag, is_there in (
        ("--coordinator", bool(coordinator)),
        ("--processes", processes > 0),
        ("--process-id", process_id >= 0),
    ):
        if is_there:
            raise Gpt2JaxError(
                f"{flag}: expected none with --hosts, whose first host is the coordinator's, found one", f"leave {flag} out"
            )
    first, *others = hosts.split(",")
    host, port = _address(first) if ":" in first else (first, DEFAULT_PORT)
    names = [host, *others]
    if "" in names or len(set(names)) != len(names):
        raise Gpt2JaxError(
            f"--hosts: expected the names of different hosts with commas between them, found {hosts!r}", "--hosts a,b,c"
        )
    mine = _names_of_this_host()
    found = [number for number, name in enumerate(names) if name in mine or name.partition(".")[0] in mine]
    if len(found) != 1:
        raise Gpt2JaxError(
            f"--hosts: expected one of {', '.join(names)} to be this host, found {', '.join(sorted(mine))}",
            f"--coordinator {shlex.quote(f'{host}:{port}')} --processes {len(names)} "
            "--process-id 0   (the number of this host's place)",
        )
    if len(names) == 1:
        return Launch()
    return Launch(len(names), found[0], host, port, "--hosts")


def _names_of_this_host() -> set[str]:
    name = socket.gethostname()
    return {name, name.partition(".")[0], socket.getfqdn()}


def _by_mpi(environment: Mapping[str, str], host: str, port: int) -> Launch:
    number, index, num_local, local_index = _integers(environment, _MPI, "mpi", "mpirun -n 2 python scripts/train.py ...")
    if number == 1:
        return Launch()
    if not host:
        if num_local != number:
            raise Gpt2JaxError(
                f"--coordinator: expected with the {number} processes of mpirun on several hosts, found none",
                f"--coordinator HOST:{DEFAULT_PORT}   (HOST is where rank 0 runs)",
            )
        host, port = "localhost", DEFAULT_PORT
    return Launch(number, index, host, port, "Open MPI", local_index, num_local)


def _is_slurm_step(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process. A batch script has only its job's variables, and is alone."""
    return all(name in environment for name in _SLURM)


def _by_slurm(environment: Mapping[str, str], host: str, port: int) -> Launch:
    numeric = tuple(name for name in _SLURM if name != "SLURM_STEP_NODELIST")
    hint = "srun --ntasks-per-node=1 python scripts/train.py ...   (in the job's script)"
    job, number, index, local_index = _integers(environment, numeric, "slurm", hint)
    if number == 1:
        return Launch()
    if not host:
        host, port = _first_host(environment.get("SLURM_STEP_NODELIST", "")), _FIRST_SLURM_PORT + job % _NUM_SLURM_PORTS
    return Launch(number, index, host, port, "SLURM", local_index, _slurm_tasks_here(environment, number))


def _first_host(nodes: str) -> str:
    """The first of SLURM's list of hosts: 'n001', 'n001,x2', 'n[001-015],x2' or 'n[001,007-015]-ib'."""
    found = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes)
    if found is None:
        raise Gpt2JaxError(
            f"SLURM_STEP_NODELIST: expected a list of hosts, found {nodes!r}", f"--coordinator HOST:{DEFAULT_PORT}"
        )
    return found[1] + (found[2] or "") + (found[3] or "")


def _slurm_tasks_here(environment: Mapping[str, str], number: int) -> int:
    """Tasks of the step on this host, of '4', '2(x3),1': those of the host of this number."""
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            counts += [int(found[1])] * int(found[2] or 1)
    node = environment.get("SLURM_NODEID", "0")
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else 1


def _integers(environment: Mapping[str, str], names: tuple[str, ...], method: str, hint: str) -> list[int]:
    values = []
    for name in names:
        value = environment.get(name)
        if value is None or not value.isdigit():
            found = "none" if value is None else repr(value)
            raise Gpt2JaxError(f"--distributed {method}: expected {name} in the environment, found {found}", hint)
        values.append(int(value))
    return values


def _address(text: str) -> tuple[str, int]:
    """The host and the port of 'host:port' or '[ipv6]:port'."""
    host, colon, port = text.rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 2**16):
        name = (host if colon and not port.isdigit() else text) or "HOST"
        raise Gpt2JaxError(
            f"--coordinator: expected HOST:PORT, a port from 1 to 65535, found {text!r}", f"--coordinator {name}:{DEFAULT_PORT}"
        )
    return host.strip("[]"), int(port)


def local_devices(launch: Launch, environment: Mapping[str, str], num_visible: int) -> list[int] | None:
    """The numbers of those of `num_visible` devices that are this process's, where processes of one host share them; None
    for all. Where the launcher has divided them already, each process sees only its own."""
    divided = any(name in environment for name in ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_GPU_BIND"))
    share = num_visible // launch.num_local
    if launch.num_local == 1 or divided or share == 0:
        return None
    return list(range(launch.local_index * share, (launch.local_index + 1) * share))
