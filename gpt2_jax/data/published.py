"""llm.c's ready-made token shards, downloaded from the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from gpt2_jax.data.corpus import output_folder
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.interop.hub import download
from gpt2_jax.llmc.token_shard import open_token_shard

_TOKENS = 100_000_000  # of each shard


class _Published(NamedTuple):
    repository: str
    prefix: str
    num_shards: int  # for training


# Shard 0 is the validation data, those from 1 on are for training.
PUBLISHED_SHARDS = {
    "edu_fineweb-shards": _Published("karpathy/fineweb-edu-100B-gpt2-token-shards", "edu_fineweb", 1000),
    "fineweb-shards": _Published("chrisdryden/FineWebTokenizedGPT2", "fineweb", 103),
}


def download_shards(name: str, output_dir: str | os.PathLike, tokens: int) -> dict[Path, int]:
    """The validation shard and as many training shards as have so many tokens, into a folder; their paths and tokens.

    What is there already is not downloaded again. Gpt2JaxError without a network, and for a file that is no shard.
    """
    published = PUBLISHED_SHARDS[name]
    wanted = -(-tokens // _TOKENS)
    if wanted > published.num_shards:
        raise Gpt2JaxError(
            f"--tokens: expected at most {published.num_shards * _TOKENS:,} of {name}, found {tokens:,}",
            f"--tokens {published.num_shards * _TOKENS // 10**9}B",
        )
    files = [f"{published.prefix}_val_000000.bin", *(f"{published.prefix}_train_{i:06d}.bin" for i in range(1, wanted + 1))]
    folder = output_folder(output_dir)
    print(f"downloading {len(files)} shards of 200 MB from {published.repository} ...", flush=True)
    paths = download(f"--source {name}", published.repository, files, folder)
    return {path: open_token_shard(path).size for path in paths}
