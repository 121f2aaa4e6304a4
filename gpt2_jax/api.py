"""What `import gpt2_jax` offers: `load` a model and let it write, `train` one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tiktoken

from gpt2_jax.compute.backend import Backend, open_device, select_backend, set_cpu_devices
from gpt2_jax.compute.decode import DecodingWeights, decoding_weights
from gpt2_jax.compute.forward import make_token_loss_function
from gpt2_jax.compute.plan import Plan, make_plan
from gpt2_jax.config import BackendName, ComputeSettings, ModelSettings, RunConfig, config_from_tables, find_config, load_config
from gpt2_jax.data.tokenizer import (
    gpt2_tokenizer,
    num_bytes_of_tokens,
    refuse_larger_vocabulary,
    tokenizer_beside,
    tokenizer_from_file,
)
from gpt2_jax.errors import Gpt2JaxError, announce
from gpt2_jax.evaluate import TextLoss, text_loss
from gpt2_jax.families.family import FamilyConfig
from gpt2_jax.generate import SEED, Sample, Sampling, compiled_length, prompt_tokens, samples
from gpt2_jax.models.weights import load_weights, model_source
from gpt2_jax.training import run


@dataclass(frozen=True, eq=False)
class Model:
    """A model that writes and is evaluated; `load` makes one."""

    source: str  # the file or folder that the weights are from, or a descriptor
    plan: Plan  # who computes what
    params: jax.Array  # the flat buffer (num_parameters,) float32, in llm.c's order
    tokenizer: tiktoken.Encoding

    @property
    def config(self) -> FamilyConfig:
        """The model's sizes."""
        return self.plan.config

    def generate(self, prompt: str = "", *, max_tokens: int = 256, **options: Any) -> str:
        """The text that continues `prompt`; options as for `samples`, but num_samples."""
        return "".join(self.stream(prompt, max_tokens=max_tokens, **options))

    def stream(self, prompt: str = "", *, max_tokens: int = 256, **options: Any) -> Iterator[str]:
        """The pieces of the text of `generate`, as they come."""
        return (texts[0].new for texts in self.samples(prompt, max_tokens=max_tokens, num_samples=1, **options))

    def samples(
        self,
        prompt: str = "",
        *,
        max_tokens: int = 256,
        num_samples: int = 1,
        temperature: float = 0.8,
        top_k: int = 50,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = SEED,
        say: Callable[[str], None] = announce,
    ) -> Iterator[list[Sample]]:
        """Texts that continue `prompt`, computed as one batch: yields them all, always the same objects, after each token,
        until each has ended. Sample i draws from the seed `seed` + i.

        A text ends by the end of the document, in front of one of the strings `stop`, or after `max_tokens`. The options
        are the flags of `gpt2-jax generate`. Gpt2JaxError for an option that means nothing, and for a tokenizer that is
        not the model's; remarks go to `say`.
        """
        return samples(
            self.plan,
            self._weights,
            self.tokenizer,
            prompt,
            max_tokens=max_tokens,
            num_samples=num_samples,
            sampling=Sampling(temperature, top_k, top_p, min_p, repetition_penalty),
            stop=stop,
            seed=seed,
            say=say,
        )

    def evaluate(
        self,
        text: str | np.ndarray,
        *,
        sequence_length: int | None = None,
        stride: int | None = None,
        batch_size: int = 4,
        before_batch: Callable[[], None] = lambda: None,
    ) -> TextLoss:
        """How well the model foretells a text, or token ids (num_tokens,), in windows of `sequence_length` tokens (default:
        the model's positions, or the text's length if that is less) that begin `stride` tokens after one another (default:
        half of that). `before_batch` is called before each batch of windows.

        A text is tokenized as a document, behind an end-of-text token. Where the tokenizer is not the model's, a text is
        refused, and the bytes of token ids count as none. Gpt2JaxError for that, for windows that do not fit the model, and
        as `text_loss`.
        """
        if isinstance(text, str):
            refuse_larger_vocabulary(self.tokenizer, self.config.vocab_size)
            text = np.array(prompt_tokens(text, self.tokenizer))
        length, stride = self.window(len(text), sequence_length, stride)
        return text_loss(
            self.token_losses,
            self.params,
            text,
            self._bytes_of_token,
            length=length,
            stride=stride,
            batch_size=batch_size,
            before_batch=before_batch,
        )

    def window(self, num_tokens: int, sequence_length: int | None = None, stride: int | None = None) -> tuple[int, int]:
        """The length and the stride of `evaluate`'s windows over so many tokens; Gpt2JaxError for those that do not fit."""
        longest = self.config.max_sequence_length
        length = sequence_length or min(longest, compiled_length(max(1, num_tokens - 1), longest))
        stride = stride or max(1, length // 2)
        for flag, value, most in (("--sequence-length", length, longest), ("--stride", stride, length)):
            if not 1 <= value <= most:
                raise Gpt2JaxError(f"{flag}: expected 1 to {most}, found {value}", f"{flag} {most}")
        return length, stride

    @cached_property
    def token_losses(self) -> jax.stages.Wrapped:
        """The compiled losses (params, x (B, T), y (B, T)) -> (B, T) float32 of every target, in nats."""
        return make_token_loss_function(self.plan)

    @cached_property
    def _bytes_of_token(self) -> np.ndarray:
        if self.config.vocab_size < self.tokenizer.n_vocab:
            return np.zeros(self.config.vocab_size, np.int64)
        return num_bytes_of_tokens(self.tokenizer, self.config.vocab_size)

    @cached_property
    def _weights(self) -> DecodingWeights:
        return decoding_weights(self.plan, self.params)


def load(
    checkpoint: str | os.PathLike,
    *,
    step: int | None = None,
    tokenizer: str | os.PathLike | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    backend: BackendName | Backend = "auto",
    say: Callable[[str], None] = announce,
) -> Model:
    """The model of a run folder (its newest complete checkpoint, or that of `step`), a llm.c model file, a Hugging Face
    folder, a model of the hub, nanoGPT's ckpt.pt, or random weights by a descriptor such as d12.

    `tokenizer` is a llm.c tokenizer file; by default the tokenizer.bin beside the model file, else GPT-2's own vocabulary.
    `dtype` is that of products and activations. Gpt2JaxError for what cannot be read, and for a device that is not there;
    remarks go to `say`.
    """
    backend = backend if isinstance(backend, Backend) else select_backend(backend)
    source = model_source(os.path.expanduser(checkpoint), step)
    path = tokenizer_beside(source) if tokenizer is None else Path(tokenizer).expanduser()
    encoding = gpt2_tokenizer() if path is None else tokenizer_from_file(path)
    config, params = load_weights(ModelSettings(init=source), say=say)
    open_device(backend)
    return Model(source, make_plan(ComputeSettings(dtype=dtype), backend, config), jnp.asarray(params), encoding)


def train(config: RunConfig | str | os.PathLike | Mapping[str, Mapping[str, Any]]) -> Path | None:
    """Train as `gpt2-jax train` does, and return the run folder; None for a dry run.

    `config` is a RunConfig, the path of a TOML file or the name of a preset, or such a file's tables as a mapping:
    {"data": {"train": "data/my_train.bin"}, "run": {"steps": 100}}. Gpt2JaxError for settings that cannot be met.
    """
    name = None
    if isinstance(config, Mapping):
        config = config_from_tables(config, "config")
    elif not isinstance(config, RunConfig):
        path = find_config(os.path.expanduser(config))
        name, config = path.stem, load_config(path)
    config.validate()
    compute = config.compute
    backend = select_backend(
        compute.backend, metal_plugin=compute.metal_plugin, full_float32=compute.matmul_precision == "highest"
    )
    if backend.platform == "cpu" and compute.devices > 1:
        set_cpu_devices(compute.devices)
    return run.train(config, name or Path(config.model.init).stem.replace(":", "-"), backend)
