"""The Hugging Face hub, through huggingface_hub alone: its cache, its offline mode, its address (HF_ENDPOINT) and its login.

hf:OWNER/NAME[@REVISION][:GLOB] names files of a dataset, as in hf:HuggingFaceFW/fineweb:sample/10BT/*.parquet.
"""

from __future__ import annotations

import fnmatch
import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gpt2_jax.errors import Gpt2JaxError

DATA_EXTRA = "pip install 'gpt2_jax[data]'   (or in a checkout: pip install -e '.[data]')"
HUB_EXTRA = "pip install 'gpt2_jax[hub]'   (or in a checkout: pip install -e '.[hub]')"
_MODELS = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
_BLOCK_BYTES, _BUFFER_BYTES = 2**22, 2**20  # asked of the hub at a time, and of that
_BUILT_IN_TEXT = "python scripts/prepare_data.py   (the built-in text, no network needed)"
_RANDOM_WEIGHTS = "d12   (random weights, no network needed), or the path of a model that is here"
_DATASET = re.compile(r"hf:(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?(?::(?P<pattern>.+))?")
_MODEL = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
_SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".txt", ".txt.gz")  # the first that there are
_OTHER_SPLITS = re.compile(r"(?<![a-z])(test|valid|validation|val|dev|eval)(?![a-z])")
_WEIGHTS = (
    *("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json", "model-*.safetensors"),
    *("vocab.json", "tokenizer.json", "merges.txt", "tokenizer_config.json"),
)
_PYTORCH_WEIGHTS = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class HubFile:
    """A file of a dataset, not yet read."""

    name: str
    size: int
    identity: str  # the commit and the content's id
    open: Callable[[], BinaryIO]  # reads over the network, what is asked for and a block around it


def model_id(init: str) -> str | None:
    """The hub's id of a model that is named by one: gpt2, gpt2-xl, hf:OWNER/NAME, OWNER/NAME; None for anything else."""
    if init in _MODELS:
        return _MODELS[init]
    name = init.removeprefix("hf:")
    return name if _MODEL.fullmatch(name) and not name.endswith((".bin", ".pt", ".pth", ".safetensors", ".json")) else None


def is_named_by_id(init: str) -> bool:
    """Whether a name can only mean a model of the hub: the short name of one of OpenAI's, or hf:OWNER/NAME."""
    return init in _MODELS or init.startswith("hf:")


def model_folder(init: str) -> Path:
    """The folder in the hub's cache with a model's config and weights, downloaded if they are not there.

    Gpt2JaxError without huggingface_hub, for a model that the hub does not have, and without network or in offline mode
    for one that is not in the cache.
    """
    name = model_id(init)
    assert name is not None
    with _reported(f"{init}: expected the model {name} of the Hugging Face hub", HUB_EXTRA, _RANDOM_WEIGHTS):
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name, allow_patterns=[*_WEIGHTS]))
        if not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*_WEIGHTS, *_PYTORCH_WEIGHTS]))
    return folder


def dataset_files(source: str) -> list[HubFile]:
    """The files of 'hf:NAME', in the order of their names: those of the glob, or the Parquet files (else JSON Lines, else
    text) of the training split. Gpt2JaxError where there are none, and where the hub cannot be asked."""
    words = _DATASET.fullmatch(source)
    if words is None:
        raise Gpt2JaxError(
            f"{source}: expected hf:OWNER/NAME, hf:OWNER/NAME@REVISION or hf:OWNER/NAME:GLOB",
            "--source hf:roneneldan/TinyStories",
        )
    name, revision, pattern = words["name"], words["revision"], words["pattern"]
    with _reported(f"{source}: expected the dataset {name} of the Hugging Face hub", DATA_EXTRA):
        from huggingface_hub import HfApi, HfFileSystem
        from huggingface_hub.hf_api import RepoFile

        api = HfApi()
        commit = api.dataset_info(name, revision=revision).sha
        tree = api.list_repo_tree(name, recursive=True, revision=commit, repo_type="dataset")
        files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        chosen = _chosen([*files], pattern)
        if not chosen:
            some = ", ".join(list(files)[:5]) or "no file"
            wanted = pattern or "*.parquet, *.jsonl or *.txt"
            raise Gpt2JaxError(f"{source}: expected files {wanted} in the dataset, found {some}", f"--source 'hf:{name}:GLOB'")
        system = HfFileSystem()

        def opener(path: str) -> Callable[[], BinaryIO]:
            def opened() -> BinaryIO:
                with _reported(f"{source}: expected to read {path}", DATA_EXTRA):
                    file = system.open(f"datasets/{name}@{commit}/{path}", "rb", block_size=_BLOCK_BYTES)
                return io.BufferedReader(_Stream(source, file), _BUFFER_BYTES)

            return opened

        return [
            HubFile(f"hf:{name}:{path}", files[path].size, f"{commit} {files[path].blob_id}", opener(path)) for path in chosen
        ]


class _Stream(io.RawIOBase):
    """A file of the hub, whose errors are Gpt2JaxErrors."""

    def __init__(self, source: str, file: Any):
        self._expected, self._file = f"{source}: expected to read on", file

    def readinto(self, buffer: Any) -> int:
        with _reported(self._expected, DATA_EXTRA):
            block = self._file.read(len(buffer))
        buffer[: len(block)] = block
        return len(block)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def download(source: str, repository: str, names: list[str], folder: Path) -> list[Path]:
    """Files of a dataset into a folder, those that are there already left as they are; Gpt2JaxError as `dataset_files`."""
    with _reported(f"{source}: expected the dataset {repository} of the Hugging Face hub", DATA_EXTRA):
        from huggingface_hub import hf_hub_download

        return [Path(hf_hub_download(repository, name, repo_type="dataset", local_dir=folder)) for name in names]


def _chosen(paths: list[str], pattern: str | None) -> list[str]:
    paths = sorted(path for path in paths if not os.path.basename(path).startswith("."))
    if pattern is not None:
        return [path for path in paths if fnmatch.fnmatchcase(path, pattern)]
    for suffix in _SUFFIXES:
        if of_kind := [path for path in paths if path.lower().endswith(suffix)]:
            return [path for path in of_kind if not _OTHER_SPLITS.search(path.lower())] or of_kind
    return []


@contextmanager
def _reported(expected: str, extra: str, without_network: str = _BUILT_IN_TEXT) -> Iterator[None]:
    """Make every error of the hub's library a Gpt2JaxError: no such name, no network, offline, no disk."""
    try:
        yield
    except (Gpt2JaxError, TypeError, AttributeError, NameError, AssertionError):  # faults of a program
        raise
    except ImportError:
        raise Gpt2JaxError(f"{expected}, found no huggingface_hub", extra) from None
    except Exception as error:  # its own, its network library's and fsspec's: dozens of kinds
        found, hint = _found(error, without_network)
        raise Gpt2JaxError(f"{expected}, found {found}", hint) from None


def _found(error: Exception, without_network: str) -> tuple[str, str | None]:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds:
        return "that it asks for a login with access", "hf auth login"
    if kinds & {"RepositoryNotFoundError", "RevisionNotFoundError", "EntryNotFoundError"} and (
        "LocalEntryNotFoundError" not in kinds  # that there is no way to the hub, and nothing in the cache
    ):
        return "no such name there, or one that asks for a login", "hf auth login   (if it is private)"
    message = str(error).strip().partition("\n")[0] or type(error).__name__
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return f"offline mode (HF_HUB_OFFLINE) and nothing in the cache: {message}", "unset HF_HUB_OFFLINE"
    return f"no way to it: {message}", without_network
