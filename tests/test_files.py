"""Reading text; what is no file of text at all is in contract/test_bad_files.py."""

from __future__ import annotations

import pytest

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.files import read_text_file

TEXT = "Gruß\r\nzwei\n"


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


def test_the_size_is_checked_before_anything_is_read(path):
    size = path.stat().st_size
    assert read_text_file(path, "a text", max_bytes=size) == TEXT
    with pytest.raises(Gpt2JaxError, match=rf"expected a text of at most {size - 1} bytes, found {size} bytes"):
        read_text_file(path, "a text", max_bytes=size - 1)
