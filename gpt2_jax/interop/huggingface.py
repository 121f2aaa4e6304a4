"""GPT-2 folders of Hugging Face transformers: config.json and weights to the flat buffer."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from gpt2_jax.errors import Gpt2JaxError, announce
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.files import read_text_file
from gpt2_jax.interop.huggingface_config import read_huggingface_config
from gpt2_jax.interop.state_dict import parameters_from
from gpt2_jax.interop.stored_tensors import StoredTensor, open_tensors

_MAX_VOCABULARY_BYTES = 100_000_000
# GPT-2's tokens but the last, the end of text, in the order of their ids and as vocab.json writes them, one a line.
_NUM_GPT2_TOKENS = 50256
_GPT2_TOKENS_SHA256 = "3a1f1c010d179f036be1992bc14b861e326341438633869c694dc4dccfe153d3"


def read_huggingface_folder(
    folder: str | os.PathLike, *, say: Callable[[str], None] = announce
) -> tuple[GPT2Config, np.ndarray]:
    """Sizes and flat buffer (num_parameters,) float32; float16 and bfloat16 weights are widened.

    The weights are model.safetensors or pytorch_model.bin, in one file or in shards with an index. Raises Gpt2JaxError
    for a folder without them, and for a model that is not a GPT-2 that this project can compute: a setting of
    config.json, a tensor too many or too few, a wrong shape. Settings that no GPT-2 has are ignored, as by
    transformers, and listed to `say`; as is a tokenizer in the folder that is not GPT-2's.
    """
    with open_huggingface_folder(folder, say=say) as (config, tensors):
        return config, parameters_from(config, tensors, linear_as="conv1d")


@contextmanager
def open_huggingface_folder(
    folder: str | os.PathLike, *, say: Callable[[str], None] = announce
) -> Iterator[tuple[GPT2Config, dict[str, StoredTensor]]]:
    """The sizes, and the tensors by name, not read; `say` and errors as `read_huggingface_folder`."""
    folder = Path(folder)
    config_path = folder / "config.json"
    config, unknown = read_huggingface_config(config_path)
    if os.path.lexists(adapter := folder / "adapter_config.json"):
        raise Gpt2JaxError(
            f"{adapter}: expected weights without an adapter, found one, which transformers adds to the model",
            "model.merge_and_unload().save_pretrained(FOLDER)   (in Python, with peft)",
        )
    with open_tensors(folder) as tensors:
        yield config, tensors
    if unknown:
        listed = ", ".join(f"{name} = {value!r:.40}" for name, value in unknown.items())
        say(f"{config_path}: ignored settings, which transformers' GPT-2 does not have either: {listed}")
    if (tokenizer := _other_tokenizer(folder)) is not None:
        say(f"{tokenizer}: these are not GPT-2's tokens, in which this project prepares data, reads prompts and writes text")


def _other_tokenizer(folder: Path) -> Path | None:
    """The file of a tokenizer in the folder whose first tokens are not GPT-2's; None where they are, or where there is none.

    Others may follow them: padding and added tokens.
    """
    path = next((folder / name for name in ("vocab.json", "tokenizer.json") if os.path.lexists(folder / name)), None)
    if path is None:
        return None
    try:
        content = json.loads(read_text_file(path, "a vocabulary", max_bytes=_MAX_VOCABULARY_BYTES))
        ids = content["model"]["vocab"] if path.name == "tokenizer.json" else content
        tokens = {token_id: token for token, token_id in ids.items()}
        found = "\n".join(tokens[token_id] for token_id in range(_NUM_GPT2_TOKENS))
    except (Gpt2JaxError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return path
    return None if hashlib.sha256(found.encode(errors="replace")).hexdigest() == _GPT2_TOKENS_SHA256 else path
