"""Where a model's weights come from: one place that knows every source."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Callable

import numpy as np

from gpt2_jax.config import ModelSettings, newest_run, saved_config_path
from gpt2_jax.errors import Gpt2JaxError, announce
from gpt2_jax.families.family import FAMILIES, family_of_descriptor, is_descriptor
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.interop.hub import is_named_by_id, model_folder, model_id
from gpt2_jax.interop.huggingface import read_huggingface_folder
from gpt2_jax.interop.huggingface_config import read_huggingface_config
from gpt2_jax.interop.nanogpt import is_nanogpt_checkpoint, read_nanogpt_checkpoint, read_nanogpt_sizes
from gpt2_jax.interop.stored_tensors import WEIGHTS_FILES
from gpt2_jax.llmc.checkpoint_set import files_of_sets, set_paths, step_of
from gpt2_jax.llmc.model_file import hint_for, read_model_config, read_model_file
from gpt2_jax.models.initialize import SEED, initialize_parameters
from gpt2_jax.names import near, nearest, nearest_path


def model_source(init: str, step: int | None = None) -> str:
    """`init` itself, of a run folder its model file (that of the newest complete checkpoint, or that of `step`), and of a
    model of the Hugging Face hub the folder in the hub's cache, downloaded if it is not there.

    Gpt2JaxError for what is neither a descriptor nor there, for a folder that is neither a run's nor Hugging Face's, for a
    step with anything but a run folder, and for a model that the hub does not have or that cannot be asked for.
    """
    if is_descriptor(init) and step is None:
        return init
    if is_run_folder(init):
        # A link such as runs/latest may soon name another run.
        link = init.rstrip("/")
        folder = os.path.join(os.path.dirname(link), os.readlink(link)) if os.path.islink(link) else init
        return str(set_paths(folder, step_of(folder, step))[0])
    if step is not None:
        raise Gpt2JaxError(f"--step: expected a run folder, found {init}", "a folder such as runs/NAME, or leave --step out")
    if _is_of_the_hub(init):
        return str(model_folder(init))
    if not os.path.exists(init):
        found = f"a link to {os.readlink(init)}, which is not there" if os.path.islink(init) else f"no such name{near(init)}"
        raise Gpt2JaxError(
            f"{init}: expected a model file, a run folder, a Hugging Face folder or a descriptor such as d12, found {found}",
            _instead_of(init),
        )
    if os.path.isdir(init) and not os.path.lexists(os.path.join(init, "config.json")):
        raise Gpt2JaxError(
            f"{init}: expected a run folder (model_*.bin, DONE_*) or a Hugging Face folder (config.json), found neither",
            _instead_of(init),
        )
    return init


def _is_of_the_hub(init: str) -> bool:
    """Whether a name means a model of the hub: gpt2, gpt2-xl, hf:OWNER/NAME, or OWNER/NAME where no folder OWNER is here.
    What is here comes first."""
    if os.path.lexists(init) or model_id(init) is None:
        return False
    owner = init.partition("/")[0]
    is_here = os.path.lexists(owner) or owner in ("runs", "data", ".", "..", "~") or nearest_path(init) is not None
    return is_named_by_id(init) or not is_here


def is_run_folder(path: str) -> bool:
    """Whether a folder is a run's: it holds checkpoints, complete or not, or a run's settings."""
    return bool(files_of_sets(path)) or os.path.lexists(saved_config_path(path))


def _instead_of(init: str) -> str:
    """What stands for a model in place of a name that does not: the newest run of the folder, the nearest name of a model,
    the nearest descriptor; else the command that makes a run, or brings a GPT-2."""
    in_runs = os.path.basename(os.path.dirname(os.path.abspath(init))) == "runs"
    meant = nearest_path(init)
    if os.path.isdir(init) and (run := newest_run(init)):
        return f"{shlex.quote(run)}   (the run that was started last)"
    if meant is not None and (is_run_folder(str(meant)) or (meant / "config.json").exists()):
        return f"{shlex.quote(str(meant))}   (the nearest name of a folder with a model)"
    if in_runs and (run := newest_run(os.path.dirname(init))):
        return f"{shlex.quote(run)}   (the run that was started last)"
    if descriptors := nearest(init, [name for family in FAMILIES for name in family.descriptors], similarity=0.75):
        return f"{descriptors[0]}   (random weights of this size)"
    if in_runs or os.path.basename(os.path.abspath(init)) == "runs":
        return "python scripts/train.py   (makes a run)"
    return hint_for(init)


def load_weights(
    settings: ModelSettings, seed: int = SEED, *, say: Callable[[str], None] = announce
) -> tuple[GPT2Config, np.ndarray]:
    """Sizes and flat buffer (num_parameters,) float32 of what `settings.init` names: a descriptor (llm.c's random
    initialization with this seed), a llm.c model file, a Hugging Face GPT-2 folder, or nanoGPT's ckpt.pt. Gpt2JaxError
    for anything else.

    `say` gets what the user should know of another program's file.
    """
    config = model_config_from_settings(settings)
    if config is not None:
        return config, initialize_parameters(config, seed)
    if (folder := _huggingface_folder(settings.init)) is not None:
        return read_huggingface_folder(folder, say=say)
    if is_nanogpt_checkpoint(settings.init):
        return read_nanogpt_checkpoint(settings.init, say=say)
    return read_model_file(settings.init)


def read_sizes(settings: ModelSettings) -> GPT2Config:
    """The sizes of the model that `load_weights` would load."""
    config = model_config_from_settings(settings)
    if config is not None:
        return config
    if (folder := _huggingface_folder(settings.init)) is not None:
        return read_huggingface_config(os.path.join(folder, "config.json")).sizes
    if is_nanogpt_checkpoint(settings.init):
        return read_nanogpt_sizes(settings.init)
    return read_model_config(settings.init)


def _huggingface_folder(init: str) -> str | None:
    """A folder, or that of a file of weights in one; None for any other file."""
    if os.path.isdir(init):
        return init
    return os.path.dirname(init) or "." if os.path.basename(init) in WEIGHTS_FILES else None


def model_config_from_settings(settings: ModelSettings) -> GPT2Config | None:
    """The sizes that a descriptor and its overrides give; None when `init` names a file, whose own sizes hold."""
    sizes = {name: getattr(settings, name) for name in GPT2Config.__dataclass_fields__}
    overrides = {name: value for name, value in sizes.items() if value is not None}
    if is_descriptor(settings.init):
        config = family_of_descriptor(settings.init).config_from_descriptor(settings.init)
        assert isinstance(config, GPT2Config)  # the only family so far
        return dataclasses.replace(config, **overrides)
    if overrides:
        raise Gpt2JaxError(
            f"--{next(iter(overrides)).replace('_', '-')}: expected a size only with a descriptor such as d12, "
            f"found --init {settings.init}, whose own sizes hold"
        )
    return None
