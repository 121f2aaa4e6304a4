"""The header that all of llm.c's files share."""

from __future__ import annotations

import os
import struct

import pytest

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc.header import check_size, header_words, read_array, read_header
from tests.contract.guard import no_hang

needs_permissions = pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")


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
