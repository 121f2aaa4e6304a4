"""Validation loss, and the loss of knowing nothing but word frequencies to hold against it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax import model
from gpt2_jax.layout import ParameterLayout
from gpt2_jax.llmc.loader import TokenLoader
from gpt2_jax.llmc.token_shard import open_token_shard

_MAX_UNIGRAM_TOKENS = 100_000_000  # of each split: a second's work, also for shards of billions


def make_loss_function(layout: ParameterLayout, *, dtype: jnp.dtype, matmul: str) -> jax.stages.Wrapped:
    """The compiled loss (params, x_BT, y_BT) -> float32 scalar, without a gradient."""

    def loss(params_N: jax.Array, x_BT: jax.Array, y_BT: jax.Array) -> jax.Array:
        return model.loss(params_N, x_BT, y_BT, layout, dtype=dtype, matmul=matmul)

    return jax.jit(loss)


def validation_loss(
    loss_function: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    params_N: jax.Array,
    loader: TokenLoader,
    num_batches: int,
) -> float:
    """Mean loss over the first `num_batches` batches of a sequential loader, which starts over."""
    loader.reset()
    losses = [loss_function(params_N, *map(jnp.asarray, loader.next_batch())) for _ in range(num_batches)]
    return float(np.mean([np.float64(loss) for loss in losses]))


def unigram_cross_entropy(train_paths: Sequence[str], validation_paths: Sequence[str], vocab_size: int) -> float:
    """Cross-entropy in nats of the validation tokens under the training tokens' add-one counts.

    A model with a lower loss has learned more than how frequent each token is. At most the first 100 million tokens
    of each split are counted.
    """

    def counts(paths: Sequence[str]) -> np.ndarray:
        total, left = np.zeros(vocab_size, dtype=np.int64), _MAX_UNIGRAM_TOKENS
        for path in paths:
            tokens = open_token_shard(path)[:left]
            # A token id beyond the vocabulary is the loader's to report.
            total += np.bincount(tokens, minlength=vocab_size)[:vocab_size]
            left -= len(tokens)
        return total

    train, validation = counts(train_paths) + 1, counts(validation_paths)
    log_probability = np.log(train / train.sum())
    return float(-(validation * log_probability).sum() / validation.sum())
