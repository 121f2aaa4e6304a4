"""Text for sharing: what names a person, a machine, a path or a network is replaced, everything else stays."""

from __future__ import annotations

import os
import platform
import pwd
import re
import socket

import pytest

from gpt2_jax import sharing
from gpt2_jax.sharing import anonymous


@pytest.fixture(autouse=True)
def janes_machine(monkeypatch, tmp_path):
    """A user jdoe, Jane Doe, on janes-box.example.org."""
    home = tmp_path / "Jane Doe's files"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in (*sharing._USER_VARIABLES, *sharing._HOST_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOGNAME", "jdoe")
    monkeypatch.setattr(pwd, "getpwuid", lambda _: pwd.struct_passwd(("jd", "x", 7, 7, "Jane Doe,,,", str(home), "/bin/sh")))
    monkeypatch.setattr(socket, "gethostname", lambda: "janes-box.example.org")
    monkeypatch.setattr(platform, "node", lambda: "janes-box")
    return home


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/srv/secret/run", "<path>"),
        ("--xla_dump_to=/srv/x --xla_foo=true", "--xla_dump_to=<path> --xla_foo=true"),
        ("PATH=/a/b:/c", "PATH=<path>:<path>"),
        ("~/x and ~jdoe/x and ./x and ../x/y.bin", "<path> and <path> and <path> and <path>"),
        ("found runs/secret/model.bin, lib/a.so", "found <path>, <path>"),
        ("[Errno 2] No such file or directory: '/mnt/My Disk/a.bin'", "[Errno 2] No such file or directory: '<path>'"),
        ("(/opt/lib/libfoo.so: undefined symbol: x)", "(<path>: undefined symbol: x)"),
        (r"C:\Users\jane\x.dll cannot be loaded", "<path> cannot be loaded"),
        (r"\\server\share\x is not there", "<path> is not there"),
        ("coordinator 10.1.2.3:8476, ::1, fe80::1%eth0", "coordinator <address>:8476, <address>, <address>%eth0"),
        ("2001:db8::8a2e:370:7334 (02:42:ac:11:00:02)", "<address> (<address>)"),
        ("file:///srv/x and https://wiki.corp.example/page", "<url> and <url>"),
        ("jane.doe@example.org", "<address>"),
        ("user jdoe (JD), Jane Doe, at janes-box", "user <user> (<user>), <user>, at <host>"),
        ("JANES-BOX.EXAMPLE.ORG is down", "<host> is down"),
    ],
)
def test_names_are_replaced(text, expected):
    assert anonymous(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "12.5 GFLOP/s, 3 tok/s and s/step and/or max|err|/max|ref|",
        "Intel(R) Xeon(R) Processor @ 2.00GHz",
        "Linux 6.18.44-generic",
        "scipy-openblas32 0.3.29.0, jax 0.10.2, numpy 2.4.6+cpu at 12:30:45",
        "expected float32[4,64], found std::bad_alloc",
        "jdoe2 is another user, as is ajdoe",
    ],
)
def test_everything_else_stays(text):
    assert anonymous(text) == text


def test_folders_with_spaces_are_found_whole(janes_machine, monkeypatch):
    assert anonymous(f"{janes_machine}/lib/x.so cannot be loaded") == "<path> cannot be loaded"
    monkeypatch.chdir(janes_machine)
    assert anonymous(f"{os.getcwd()}: no such folder") == "<path>: no such folder"


def test_a_home_of_root_or_of_nobody_replaces_no_slash(monkeypatch):
    monkeypatch.setenv("HOME", "/")
    assert anonymous("1 / 2") == "1 / 2"
    assert not re.search("<user>", anonymous("a text"))
