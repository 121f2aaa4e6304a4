"""The header that all of llm.c's files share, and the atomic way of writing a file."""

from __future__ import annotations

import errno
import glob
import os
import resource
import stat
import struct
from pathlib import Path

import pytest

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc.header import atomic_write, check_size, header_words, read_array, read_header
from tests.contract.guard import no_hang

needs_permissions = pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")


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


def read(path: str | os.PathLike):
    return read_header(path, what="a model file", magic=20240326, versions=(3, 5), hint="make one")


def test_header_has_256_words_and_comes_with_the_size_of_the_file(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(struct.pack("<256i", 20240326, 5, -7, *range(253)) + b"body")
    header, size = read(path)
    assert header.tolist() == [20240326, 5, -7, *range(253)]
    assert size == 1028


def test_words_that_are_not_named_are_zero():
    assert header_words({1: -2, 255: 9}).tobytes() == struct.pack("<256i", 0, -2, *[0] * 253, 9)


@pytest.mark.parametrize(
    ("magic", "kind"),
    [
        (20240327, "a debug state file"),
        (20240328, "a tokenizer file"),
        (20240520, "a token shard"),
        (20240522, "a multiple-choice evaluation file"),
        (20240527, "a training state file"),
        (20240801, "a Llama-3 token shard"),
        (20240803, "a Llama-3 file"),
        (0, "no file of llm.c's"),
        (-1, "no file of llm.c's"),
    ],
)
def test_wrong_magic_names_the_kind_of_file_that_was_found(tmp_path, magic, kind):
    path = tmp_path / "file.bin"
    path.write_bytes(struct.pack("<256i", magic, 3, *[0] * 254))
    with pytest.raises(Gpt2JaxError) as raised:
        read(path)
    expected = f"{path}: expected a model file (magic 20240326), found magic {magic} ({kind})\n---> HINT: make one"
    assert str(raised.value) == expected


def test_wrong_version_names_the_ones_that_can_be_read(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(struct.pack("<256i", 20240326, 2, *[0] * 254))
    with pytest.raises(Gpt2JaxError, match="expected a model file of version 3 or 5, found version 2"):
        read(path)


@pytest.mark.parametrize("size", [0, 3, 1023])
def test_file_that_is_shorter_than_a_header_is_refused(tmp_path, size):
    path = tmp_path / "file.bin"
    path.write_bytes(b"\0" * size)
    with pytest.raises(Gpt2JaxError, match=f"expected a model file with a header of 1024 bytes, found {size} bytes"):
        read(path)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(Gpt2JaxError, match="expected a model file, found no such file"):
        read(tmp_path / "missing.bin")


def test_link_to_a_missing_file_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "missing")
    with pytest.raises(Gpt2JaxError, match="expected a model file, found no such file"):
        read(tmp_path / "link")


def test_link_to_a_file_is_read(tmp_path):
    (tmp_path / "file.bin").write_bytes(struct.pack("<256i", 20240326, 3, *[0] * 254) + b"12")
    (tmp_path / "link").symlink_to(tmp_path / "file.bin")
    assert read(tmp_path / "link")[1] == 1026


def test_folder_is_refused(tmp_path):
    with pytest.raises(Gpt2JaxError, match="expected a model file, found a folder"):
        read(tmp_path)


def test_pipe_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with no_hang(), pytest.raises(Gpt2JaxError, match="found something that is not a regular file"):
        read(tmp_path / "pipe")


def test_links_in_a_circle_are_refused(tmp_path):
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    with pytest.raises(Gpt2JaxError, match="found a path that cannot be opened: Too many levels of symbolic links"):
        read(tmp_path / "one")


@needs_permissions
def test_file_without_read_permission_is_refused(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"\0" * 2000)
    path.chmod(0)
    with pytest.raises(Gpt2JaxError, match="found a file that cannot be read: Permission denied"):
        read(path)


@pytest.mark.parametrize(("size", "state"), [(1999, "truncated"), (2001, "grown")])
def test_wrong_size_says_in_which_direction(size, state):
    with pytest.raises(Gpt2JaxError) as raised:
        check_size("a.bin", what="a model file", size=size, expected=2000, hint="make one")
    assert f"a.bin: expected a model file of 2000 bytes by its header, found {size} bytes ({state})" in str(raised.value)


def test_right_size_passes():
    check_size("a.bin", what="a model file", size=2000, expected=2000, hint="make one")


def test_file_that_shrinks_after_its_size_was_checked_is_refused(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(struct.pack("<4f", 1, 2, 3, 4))
    assert read_array(path, "<f4", 3, 4).tolist() == [2, 3, 4]
    with pytest.raises(Gpt2JaxError, match=r"file\.bin: expected 4 elements at byte 4, found 3"):
        read_array(path, "<f4", 4, 4)
