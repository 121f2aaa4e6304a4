"""The files that llm.c's own Python script writes, so that llm.c's programs can train from and check this project."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.compute.forward import all_logits
from gpt2_jax.compute.plan import Plan
from gpt2_jax.compute.step import accumulated_gradient
from gpt2_jax.data.tokenizer import gpt2_tokenizer, token_bytes
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.files import write_together
from gpt2_jax.llmc.debug_state import DebugState, write_debug_state
from gpt2_jax.llmc.model_file import write_model_file
from gpt2_jax.llmc.token_shard import open_token_shard
from gpt2_jax.llmc.tokenizer_file import write_tokenizer_file


def first_batch(tokens_path: str, vocab_size: int, batch_size: int, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets (B, T) int32: the first B * T + 1 tokens of a shard."""
    count = batch_size * sequence_length + 1
    tokens = open_token_shard(tokens_path)[:count].astype(np.int32)
    if tokens.size < count:
        raise Gpt2JaxError(f"{tokens_path}: expected at least {count} tokens, found {tokens.size}")
    if tokens.max() >= vocab_size:
        raise Gpt2JaxError(f"{tokens_path}: expected token ids below {vocab_size}, found {tokens.max()}")
    shape = (batch_size, sequence_length)
    return tokens[:-1].reshape(shape), tokens[1:].reshape(shape)


def debug_state(plan: Plan, params: np.ndarray, x_BT: np.ndarray, y_BT: np.ndarray) -> DebugState:
    """Logits, loss and gradients of one batch, as the plan computes them."""
    x, y, params_N = jnp.asarray(x_BT), jnp.asarray(y_BT), jnp.asarray(params)
    loss, grads_N, _ = jax.jit(partial(accumulated_gradient, plan))(params_N, None, x[None], y[None])
    logits_BTV = jax.jit(partial(all_logits, plan))(params_N, x)
    return DebugState(x_BT, y_BT, np.asarray(logits_BTV), np.float32(loss), np.asarray(grads_N))


def write_starter_pack(
    folder: Path, name: str, plan: Plan, params: np.ndarray, x_BT: np.ndarray, y_BT: np.ndarray
) -> list[Path]:
    """Write gpt2_NAME.bin, gpt2_NAME_bf16.bin, gpt2_NAME_debug_state.bin and gpt2_tokenizer.bin, all or on an error
    none; returns their paths."""
    assert isinstance(plan.config, GPT2Config)  # llm.c's files are of GPT-2s
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Gpt2JaxError(f"{folder}: expected a folder to write to, found: {error.strerror}") from None
    paths = [
        folder / f"gpt2_{name}.bin",
        folder / f"gpt2_{name}_bf16.bin",
        folder / f"gpt2_{name}_debug_state.bin",
        folder / "gpt2_tokenizer.bin",
    ]
    tokenizer = gpt2_tokenizer()
    with write_together() as write:
        write_model_file(paths[0], plan.config, params, write=write)
        write_model_file(paths[1], plan.config, params, dtype="bfloat16", write=write)
        write_debug_state(paths[2], debug_state(plan, params, x_BT, y_BT), write=write)
        write_tokenizer_file(paths[3], token_bytes(tokenizer), tokenizer.eot_token, write=write)
    return paths
