"""Which process this is: every way to say it, each with its environment faked, and what is not enough."""

from __future__ import annotations

import socket

import pytest

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.processes.launch import Launch, find_launch, local_devices

SLURM = {
    "SLURM_JOB_ID": "70001",
    "SLURM_STEP_NODELIST": "gpu[007,011-013]",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "2(x4)",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",
}


@pytest.fixture(autouse=True)
def host(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "b.cluster")
    monkeypatch.setattr(socket, "getfqdn", lambda: "b.cluster.example.org")


def test_without_anything_a_process_is_alone():
    assert find_launch({}) == Launch()
    assert find_launch({}, processes=1) == Launch()


def test_by_flags():
    found = find_launch({}, coordinator="a:999", processes=3, process_id=2)
    assert (found.number, found.index, found.host, found.port) == (3, 2, "a", 999)
    assert find_launch({}, coordinator="[fe80::1]:999", processes=2, process_id=0).host == "fe80::1"


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ("a,b,c", (3, 1, "a", 12345)),
        ("b,a", (2, 0, "b", 12345)),
        ("a:77,b.cluster", (2, 1, "a", 77)),
        ("a,b.cluster.example.org", (2, 1, "a", 12345)),
        ("b", (1, 0, "", 0)),
    ],
)
def test_by_hosts(hosts, expected):
    found = find_launch({}, hosts=hosts)
    assert (found.number, found.index, found.host, found.port) == expected


@pytest.mark.parametrize("method", ["auto", "slurm"])
def test_under_slurm(method):
    found = find_launch(SLURM, method=method)
    assert (found.number, found.index, found.local_index, found.num_local) == (8, 3, 1, 2)
    assert found.coordinator == f"gpu007:{61440 + 70001 % 4096}"
    assert find_launch(SLURM, coordinator="x:5").coordinator == "x:5"


@pytest.mark.parametrize(
    ("nodes", "first"), [("n1", "n1"), ("n1,x2", "n1"), ("n[001-015],x", "n001"), ("n[1,7-9]-ib,x", "n1-ib"), ("a-b,c", "a-b")]
)
def test_the_first_of_slurms_hosts(nodes, first):
    assert find_launch({**SLURM, "SLURM_STEP_NODELIST": nodes}).host == first


def test_a_batch_script_of_slurm_is_alone():
    """The job's variables are there, and so are a process number of 0 and the job's number of tasks; srun's are not."""
    script = {name: value for name, value in SLURM.items() if not name.startswith("SLURM_STEP")} | {"SLURM_NTASKS": "8"}
    assert find_launch(script) == Launch()
    assert find_launch({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) == Launch()


@pytest.mark.parametrize("method", ["auto", "mpi"])
def test_under_open_mpi(method):
    found = find_launch(MPI, method=method)
    assert (found.number, found.index, found.coordinator) == (4, 2, "localhost:12345")
    assert find_launch(MPI | SLURM) == found  # mpirun in a job of SLURM's
    several_hosts = MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    with pytest.raises(Gpt2JaxError, match="expected with the 4 processes of mpirun on several hosts") as raised:
        find_launch(several_hosts)
    assert raised.value.hint.startswith("--coordinator HOST:12345")
    assert find_launch(several_hosts, coordinator="a:5").coordinator == "a:5"


def test_none_heeds_no_launcher():
    assert find_launch(SLURM, method="none") == find_launch(MPI, method="none") == Launch()


@pytest.mark.parametrize(
    ("flags", "problem", "hint"),
    [
        ({"processes": 2}, "--coordinator: expected with several", "--coordinator HOST:12345 --processes 2 --process-id 0"),
        ({"coordinator": "a:1"}, "--processes: expected with several", "--coordinator a:1 --processes 2"),
        ({"coordinator": "a:1", "processes": 4}, "--process-id: expected with several", "--coordinator a:1 --processes 4"),
        ({"coordinator": "a:1", "processes": 2, "process_id": 2}, "one of 0 to 1, as there are 2 processes, found 2", ""),
        ({"coordinator": "a", "processes": 2, "process_id": 0}, "expected HOST:PORT", "--coordinator a:12345"),
        ({"coordinator": "a:x", "processes": 2, "process_id": 0}, "expected HOST:PORT", "--coordinator a:12345"),
        ({"coordinator": "a:70000", "processes": 2, "process_id": 0}, "from 1 to 65535, found 'a:70000'", ""),
        ({"hosts": "a,c"}, "one of a, c to be this host, found b, b.cluster", "--coordinator a:12345 --processes 2"),
        ({"hosts": "a,b,a"}, "names of different hosts", "--hosts a,b,c"),
        ({"hosts": "a,,b"}, "names of different hosts", "--hosts a,b,c"),
        ({"hosts": "a,b", "coordinator": "a:1"}, "--coordinator: expected none with --hosts", "leave --coordinator out"),
        ({"hosts": "a,b", "process_id": 1}, "--process-id: expected none with --hosts", "leave --process-id out"),
        ({"method": "none", "hosts": "a,b"}, "--hosts: expected none with --distributed none", ""),
        ({"method": "slurm"}, "--distributed slurm: expected SLURM_JOB_ID in the environment, found none", "srun "),
        ({"method": "mpi"}, "--distributed mpi: expected OMPI_COMM_WORLD_SIZE in the environment, found none", "mpirun "),
    ],
)
def test_what_is_not_enough_or_contradicts_itself(flags, problem, hint):
    with pytest.raises(Gpt2JaxError) as raised:
        find_launch({}, **flags)
    assert problem in raised.value.problem
    assert (raised.value.hint or "").startswith(hint)


@pytest.mark.parametrize(
    ("environment", "visible", "expected"),
    [
        ({}, 8, [4, 5, 6, 7]),  # two tasks share the host's eight
        ({}, 2, [1]),
        ({}, 1, None),  # fewer than tasks: the launcher has divided them
        ({}, 0, None),
        ({"SLURM_GPUS_PER_TASK": "2"}, 2, None),
    ],
)
def test_tasks_of_one_host_share_its_devices(environment, visible, expected):
    assert local_devices(Launch(8, 3, local_index=1, num_local=2), environment, visible) == expected
    assert local_devices(Launch(8, 3), environment, visible) is None
