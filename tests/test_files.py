"""Files: text is read, and a file is written whole or not at all; what is no file of text at all is in
contract/test_bad_files.py."""

from __future__ import annotations

import errno
import glob
import os
import resource
import socket
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_jax import files
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.files import atomic_write, json_lines, read_text_blocks, read_text_file, write_together, write_with_others

TEXT = "Gruß\r\nzwei\n"
needs_permissions = pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


def test_text_is_read_as_it_is(path):
    assert read_text_file(path, "a text") == TEXT


def test_what_is_no_utf8_is_refused_by_its_place_or_replaced(path):
    path.write_bytes(b"ab\xffc")
    with pytest.raises(Gpt2JaxError, match=r"text.txt: expected a text in UTF-8, found byte 0xff at 2\n---> HINT: mend it"):
        read_text_file(path, "a text", "mend it")
    assert read_text_file(path, "a text", errors="replace") == "ab\ufffdc"


@pytest.mark.parametrize("text", ["", "x", TEXT])
def test_a_byte_order_mark_is_no_part_of_the_text(path, text):
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_text_file(path, "a text") == text
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\xff")
    with pytest.raises(Gpt2JaxError, match=f"found byte 0xff at {3 + len(text.encode())}\n"):
        read_text_file(path, "a text")


def test_a_mark_within_the_text_is_part_of_it(path):
    path.write_text("a\ufeffb", encoding="utf-8")
    assert read_text_file(path, "a text") == "a\ufeffb"


@pytest.mark.parametrize(
    ("encoding", "named"),
    [
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16LE"),
        ("utf-16-be", "UTF-16BE"),
        ("utf-32", "UTF-32"),
        ("utf-32-le", "UTF-32LE"),
        ("utf-32-be", "UTF-32BE"),
    ],
)
def test_a_text_in_another_encoding_is_refused_with_the_command_that_converts_it(tmp_path, encoding, named):
    path = tmp_path / "a text.txt"
    path.write_bytes("Text\n".encode(encoding))
    with pytest.raises(Gpt2JaxError) as refused:
        read_text_file(path, "a text", "another hint")
    assert refused.value.problem == f"{path}: expected a text in UTF-8, found {named}"
    subprocess.run(refused.value.hint, shell=True, check=True)
    assert read_text_file(f"{path}.utf8", "a text") == "Text\n"


def test_what_is_latin_1_is_refused_with_the_command_that_converts_it(path):
    path.write_bytes("Gruß".encode("latin-1"))
    with pytest.raises(Gpt2JaxError, match=r"found byte 0xdf at 3\n---> HINT: iconv -f LATIN1 ") as refused:
        read_text_file(path, "a text")
    subprocess.run(str(refused.value.hint).partition("   (")[0], shell=True, check=True)
    assert read_text_file(f"{path}.utf8", "a text") == "Gruß"


@pytest.mark.parametrize("before", [0, 1, 2**20 - 1, 2**20, 2**20 + 5])
def test_a_zero_byte_is_refused_by_its_place(tmp_path, before):
    path = tmp_path / "a text.txt"
    path.write_bytes("é".encode() * (before // 2) + b"x" * (before % 2) + b"\0end\0")
    with pytest.raises(Gpt2JaxError, match=f"expected a text, found a zero byte at {before}\n---> HINT: tr ") as refused:
        read_text_file(path, "a text")
    subprocess.run(str(refused.value.hint).partition("   (")[0], shell=True, check=True)
    assert read_text_file(f"{path}.text", "a text").endswith("end")


def test_what_is_no_text_at_all_is_not_converted(path):
    path.write_bytes(b"\x1f\x8b\x08\x01\xff")
    with pytest.raises(Gpt2JaxError, match=f"found byte 0x8b at 1\n---> HINT: file {path} "):
        read_text_file(path, "a text")


@given(content=st.binary(max_size=40) | st.text(max_size=20).map(str.encode), size=st.integers(1, 9))
def test_blocks_are_the_text_wherever_they_end(tmp_path_factory, content, size):
    """The same text, or the same error, as all bytes at once give."""
    path = tmp_path_factory.mktemp("blocks") / "text.txt"
    path.write_bytes(b"text: " + content.replace(b"\0", b"0"))
    advanced: list[int] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(files, "_BLOCK_BYTES", size)
        try:
            expected = path.read_bytes().decode()
        except UnicodeDecodeError as error:
            with pytest.raises(Gpt2JaxError, match=f" at {error.start}\n"):
                list(read_text_blocks(path, "a text", advance=advanced.append))
        else:
            assert "".join(read_text_blocks(path, "a text", advance=advanced.append)) == expected
            assert sum(advanced) == path.stat().st_size


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r"])
def test_only_a_line_feed_ends_a_line_of_json_lines(end):
    assert list(json_lines(f"a{end}b\n\n \r\nc")) == [(1, f"a{end}b"), (4, "c")]


def test_the_size_is_checked_before_anything_is_read(path):
    size = path.stat().st_size
    assert read_text_file(path, "a text", max_bytes=size) == TEXT
    with pytest.raises(Gpt2JaxError, match=rf"expected a text of at most {size - 1} bytes, found {size} bytes"):
        read_text_file(path, "a text", max_bytes=size - 1)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(path: str | os.PathLike, content: bytes = b"new") -> None:
    with atomic_write(path) as file:
        file.write(content)


def write_half(path: Path, error: BaseException) -> None:
    with atomic_write(path) as file:
        file.write(b"x" * 100_000)
        raise error


def test_written_file_has_all_of_its_content_and_is_alone_in_its_folder(tmp_path):
    pieces = [bytes([i]) * 5000 for i in range(20)]
    with atomic_write(tmp_path / "file.bin") as file:
        for piece in pieces:
            file.write(piece)
    assert (tmp_path / "file.bin").read_bytes() == b"".join(pieces)
    assert names(tmp_path) == ["file.bin"]


def test_longer_old_content_is_replaced_and_not_overwritten_in_place(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"much longer old content")
    write(path)
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["file.bin"]


def test_readers_see_the_old_content_until_the_block_ends(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_no_pattern_of_names_finds_a_half_written_file(tmp_path):
    with atomic_write(tmp_path / "DONE_00000001") as file:
        file.write(b"half")
        file.flush()
        assert glob.glob(str(tmp_path / "*")) == []


@pytest.mark.parametrize(
    ("host", "part"),
    [
        ("node-17", "node-17"),
        ("node.cluster/17", "node-cluster-17-fc978eb3"),
        ("", "-00000000"),
        ("n" * 60 + "1", "n" * 23 + "-8833ce97"),
        ("n" * 60 + "2", "n" * 23 + "-113a9f2d"),
    ],
)
def test_a_temporary_name_has_the_host_and_the_process(tmp_path, monkeypatch, host, part):
    """Two hosts may share the folder and have a process of the same id."""
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    with atomic_write(tmp_path / "file.bin"):
        assert names(tmp_path) == [f".file.bin.{part}.{os.getpid()}.tmp"]
    assert names(tmp_path) == ["file.bin"]


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt()])
def test_writer_that_raises_midway_leaves_the_old_content_and_no_temporary(tmp_path, error):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(error)) as raised:
        write_half(path, error)
    assert raised.value is error
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file.bin"]


def test_writer_that_raises_midway_leaves_no_new_file(tmp_path):
    with pytest.raises(ValueError, match="a bug"):
        write_half(tmp_path / "file.bin", ValueError("a bug"))
    assert names(tmp_path) == []


@pytest.mark.parametrize(("function", "code"), [("fsync", errno.ENOSPC), ("fsync", errno.EIO), ("replace", errno.EACCES)])
def test_failing_disk_is_one_error_that_names_the_file_and_the_cause(tmp_path, monkeypatch, function, code):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def fail(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(Gpt2JaxError) as raised:
        write(path)
    for part in (str(path), "expected", f"found: {os.strerror(code)}", "nothing was changed"):
        assert part in str(raised.value)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file.bin"]


def test_file_that_outgrows_the_allowed_size_leaves_the_old_content(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(Gpt2JaxError, match=os.strerror(errno.EFBIG)):
            write(path, b"x" * 20_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file.bin"]


def test_missing_folder_is_an_error_of_ours(tmp_path):
    with pytest.raises(Gpt2JaxError, match="expected to write it, found: No such file"):
        write(tmp_path / "missing" / "file.bin")


def test_folder_in_the_place_of_the_file_is_an_error_of_ours_and_stays(tmp_path):
    (tmp_path / "file.bin").mkdir()
    with pytest.raises(Gpt2JaxError, match=r"file\.bin: expected to write it, found"):
        write(tmp_path / "file.bin")
    assert names(tmp_path) == ["file.bin"]


def test_file_in_the_place_of_the_folder_is_an_error_of_ours(tmp_path):
    (tmp_path / "plain").write_bytes(b"old")
    with pytest.raises(Gpt2JaxError, match="found: Not a directory"):
        write(tmp_path / "plain" / "file.bin")


def test_name_that_is_too_long_is_an_error_of_ours(tmp_path):
    with pytest.raises(Gpt2JaxError, match="found: File name too long"):
        write(tmp_path / ("x" * 300))


@needs_permissions
def test_folder_without_write_permission_is_an_error_of_ours(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(Gpt2JaxError, match="found: Permission denied"):
        write(tmp_path / "file.bin")
    assert names(tmp_path) == []


def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def recording_fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        events.append("sync folder" if stat.S_ISDIR(status.st_mode) else f"sync {status.st_size} bytes")
        fsync(descriptor)

    def recording_replace(source: str, target: str) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    write(tmp_path / "file.bin", b"12345")
    assert events == ["sync 5 bytes", "rename", "sync folder"]


def test_folder_that_cannot_be_synced_is_an_error_of_ours(tmp_path, monkeypatch):
    fsync = os.fsync

    def fail_for_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_for_folders)
    with pytest.raises(Gpt2JaxError, match=f"found: {os.strerror(errno.EIO)}") as raised:
        write(tmp_path / "file.bin")
    assert "nothing was changed" not in str(raised.value)


def write_all(*paths: Path) -> None:
    with write_together() as open_for_writing:
        for path in paths:
            with open_for_writing(path) as file:
                file.write(b"new")


def test_files_written_together_get_their_names_together(tmp_path):
    first, second = tmp_path / "first.bin", tmp_path / "second.bin"
    first.write_bytes(b"old")
    with write_together() as open_for_writing:
        for path in (first, second):
            with open_for_writing(path) as file:
                file.write(b"new")
            assert first.read_bytes() == b"old"
            assert not second.exists()
    assert (first.read_bytes(), second.read_bytes()) == (b"new", b"new")
    assert names(tmp_path) == ["first.bin", "second.bin"]


def test_a_file_that_cannot_be_written_leaves_those_written_together_with_it_as_they_were(tmp_path):
    first = tmp_path / "first.bin"
    first.write_bytes(b"old")
    with pytest.raises(Gpt2JaxError, match=r"second\.bin: expected to write it, found: No such file"):
        write_all(first, tmp_path / "missing" / "second.bin")
    assert first.read_bytes() == b"old"
    assert names(tmp_path) == ["first.bin"]


def test_a_rename_that_fails_halfway_says_that_others_are_new(tmp_path):
    (tmp_path / "second.bin").mkdir()
    with pytest.raises(Gpt2JaxError, match=r"second\.bin: expected to write it, .*; those written before it are new"):
        write_all(tmp_path / "first.bin", tmp_path / "second.bin")
    assert names(tmp_path) == ["first.bin", "second.bin"]


def names_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_written_with_others_get_the_marker_last(tmp_path):
    seen = []

    def agree(error):
        assert error is None
        seen.append([name for name in names_of(tmp_path) if not name.startswith(".")])

    with write_with_others(agree, tmp_path / "DONE") as write, write(tmp_path / "a") as file:
        file.write(b"new")
    assert seen == [[], ["a"], ["DONE", "a"]]
    assert names_of(tmp_path) == ["DONE", "a"]


@pytest.mark.parametrize("phase", [0, 1, 2])
@pytest.mark.parametrize("is_own", [True, False])
def test_a_failure_of_anybody_leaves_nothing_of_what_was_written_with_others(tmp_path, monkeypatch, phase, is_own):
    """While writing, while giving names, and at the marker; of this process or of another one."""
    (tmp_path / "earlier").write_bytes(b"old")
    calls = []

    def agree(error):
        calls.append(error)
        if error is not None or (not is_own and len(calls) == phase + 1):
            raise Gpt2JaxError("process 1: no space")

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    replace = os.replace
    if is_own and phase:
        names = {1: "b", 2: "DONE"}
        monkeypatch.setattr(files.os, "replace", lambda old, new: fail() if new.name == names[phase] else replace(old, new))

    def write_both():
        with write_with_others(agree, tmp_path / "DONE") as write:
            for name in ("a", "b"):
                with write(tmp_path / name) as file:
                    file.write(b"new")
                    if is_own and phase == 0 and name == "b":
                        fail()

    with pytest.raises(Gpt2JaxError, match="process 1: no space"):
        write_both()
    assert len(calls) == phase + 1  # nobody is left waiting
    assert names_of(tmp_path) == ["earlier"]
