"""One file from the network, with a limit on its size."""

from __future__ import annotations

import http.client
import urllib.request

from gpt2_jax.errors import Gpt2JaxError

WITHOUT_NETWORK = "python scripts/prepare_data.py   (the built-in text, no network needed)"
_SECONDS = 30  # without a byte


def download(url: str, what: str, max_bytes: int) -> bytes:
    """The content of a URL; Gpt2JaxError when there is no way to it, and for more than `max_bytes`."""
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS) as response:
            content = response.read(max_bytes + 1)
    except (OSError, http.client.HTTPException) as error:
        raise Gpt2JaxError(f"{what}: expected to download {url}, found no way to it: {error}", WITHOUT_NETWORK) from None
    if len(content) > max_bytes:
        raise Gpt2JaxError(f"{what}: expected at most {max_bytes:,} bytes from {url}, found more", WITHOUT_NETWORK)
    return content
