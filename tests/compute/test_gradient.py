"""The in-place gradient against differentiating model.loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax import jax_compat
from gpt2_jax.compute.step import loss_and_gradient
from gpt2_jax.evaluate import make_loss_function, make_token_loss_function
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.generate import next_token_logits
from gpt2_jax.models import gpt2 as model
from gpt2_jax.models.initialize import initialize_parameters
from gpt2_jax.ops import in_place

# A dozen tensors deep, each rounding differs by a few units of its dtype, relative to the largest gradient.
TOLERANCE = {"float32": 64 * 2.0**-24, "bfloat16": 8 * 2.0**-9}

dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE))
implementations = pytest.mark.parametrize("implementation", ["naive", "threaded"])


def autodiff(params, x, y, layout, dtype):
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda p: jax.value_and_grad(model.loss)(p, x, y, layout, dtype=jnp.dtype(dtype)))(params)


def assert_squared_norms(found, layout):
    """Tensor by tensor, of the gradient as it is: at most 1024 squares are added up in float32, then layers and rows of wte."""
    _, grads, squares = found
    for tensor, square in zip(layout.tensors, squares.tolist(), strict=True):
        expected = np.square(np.asarray(grads[tensor.offset : tensor.stop], dtype=np.float64)).sum()
        assert square == pytest.approx(expected, rel=1100 * 2.0**-24), tensor.name


def assert_close(found, expected, dtype):
    np.testing.assert_allclose(found[0], expected[0], rtol=TOLERANCE[dtype])
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=TOLERANCE[dtype] * float(jnp.abs(expected[1]).max()))


@implementations
@dtypes
def test_overwrites_the_buffer_with_the_gradient(tiny_layout, tiny_params, tiny_batch, implementation, dtype):
    params, (x, y) = jnp.asarray(tiny_params), tiny_batch
    garbage = jnp.full_like(params, jnp.nan)
    found = jax.jit(
        lambda p, g: in_place.loss_and_gradient(p, g, x, y, tiny_layout, dtype=jnp.dtype(dtype), matmul=implementation)
    )(params, garbage)
    assert_close(found, autodiff(params, x, y, tiny_layout, dtype), dtype)
    assert_squared_norms(found, tiny_layout)
    start, stop = tiny_layout["wte"].padding_span
    assert (np.asarray(found[1])[start:stop] == 0).all()


@dtypes
def test_sequences_longer_than_a_block_of_attentions_queries(dtype):
    config = GPT2Config(max_sequence_length=160, vocab_size=70, num_layers=1, num_heads=2, channels=16)
    layout, params = config.layout, jnp.asarray(initialize_parameters(config))
    x, y = np.random.default_rng(0).integers(0, 70, (2, 2, 150)).astype(np.int32)
    options = {"dtype": jnp.dtype(dtype), "matmul": "threaded"}
    found = jax.jit(lambda p: in_place.loss_and_gradient(p, jnp.zeros_like(p), x, y, layout, **options))(params)
    assert_close(found, autodiff(params, x, y, layout, dtype), dtype)


@dtypes
def test_the_classifier_in_chunks_of_rows(tiny_layout, tiny_params, tiny_batch, dtype, monkeypatch):
    params, (x, y) = jnp.asarray(tiny_params), tiny_batch
    monkeypatch.setattr(in_place, "CLASSIFIER_ROWS", 5)
    options = {"dtype": jnp.dtype(dtype), "matmul": "threaded", "scale": 0.5}
    found = jax.jit(lambda p: in_place.loss_and_gradient(p, jnp.zeros_like(p), x, y, tiny_layout, **options))(params)
    assert_close((2 * found[0], 2 * found[1]), autodiff(params, x, y, tiny_layout, dtype), dtype)
    assert_squared_norms(found, tiny_layout)


@implementations
@dtypes
def test_the_losses_alone_are_those_of_every_target(tiny_layout, tiny_params, tiny_batch, implementation, dtype, monkeypatch):
    params, (x, y) = jnp.asarray(tiny_params), tiny_batch
    monkeypatch.setattr(in_place, "CLASSIFIER_ROWS", 5)  # several chunks, not of one size
    options = {"dtype": jnp.dtype(dtype), "matmul": implementation}
    found = jax.jit(lambda p: in_place.token_losses(p, x, y, tiny_layout, **options))(params)
    assert (found.shape, found.dtype) == (y.shape, jnp.float32)
    expected = make_token_loss_function(tiny_layout, dtype=jnp.dtype(dtype), matmul="xla")(params, x, y)
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE[dtype])
    trained = jax.jit(lambda p: in_place.loss_and_gradient(p, jnp.zeros_like(p), x, y, tiny_layout, **options))(params)
    # The same calls: what is left is the order of the mean.
    assert float(found.mean()) == pytest.approx(float(trained[0]), rel=4 * 2.0**-24)
    evaluated = make_loss_function(tiny_layout, **options)(params, x, y)
    assert float(evaluated) == pytest.approx(float(trained[0]), rel=TOLERANCE[dtype])


@implementations
@dtypes
def test_logits_of_one_position(tiny_layout, tiny_params, tiny_batch, implementation, dtype):
    params, x_1T, dtype_of_all = jnp.asarray(tiny_params), tiny_batch[0][:1], jnp.dtype(dtype)
    expected_TV = model.logits(params, x_1T, tiny_layout, dtype=dtype_of_all)[0, :, : tiny_layout.config.vocab_size]
    largest = float(jnp.abs(expected_TV).max())
    for position in (0, 6):
        options = {"layout": tiny_layout, "dtype": dtype_of_all, "matmul": implementation}
        found_V = next_token_logits(params, x_1T, jnp.int32(position), **options)
        np.testing.assert_allclose(found_V, expected_TV[position], rtol=0, atol=TOLERANCE[dtype] * largest)


def temporary_bytes(layout, tokens, **options):
    """Of the compiled function, beside arguments and result."""
    params = jax.ShapeDtypeStruct((layout.num_parameters,), jnp.float32)
    batch = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    step = jax.jit(
        lambda p, g, x, y: in_place.loss_and_gradient(
            p, g, x, y, layout, dtype=jnp.dtype("float32"), matmul="threaded", **options
        ),
        donate_argnums=1,
    )
    return step.lower(params, params, batch, batch).compile().memory_analysis().temp_size_in_bytes


can_alias = pytest.mark.skipif(
    not jax_compat.ffi_call_can_alias(), reason="this jax cannot alias a custom call's argument and result"
)
WIDE = GPT2Config(max_sequence_length=256, vocab_size=4000, num_layers=1, num_heads=2, channels=16).layout
DEEP = GPT2Config(max_sequence_length=256, vocab_size=70, num_layers=8, num_heads=2, channels=64).layout


@can_alias
def test_chunks_of_the_classifier_share_one_memory(monkeypatch):
    monkeypatch.setattr(in_place, "CLASSIFIER_ROWS", 64)
    logits_of_a_chunk = 4 * 64 * WIDE.config.padded_vocab_size
    assert logits_of_a_chunk < temporary_bytes(WIDE, 256) < 2 * logits_of_a_chunk
    params, batch = jax.ShapeDtypeStruct((WIDE.num_parameters,), jnp.float32), jax.ShapeDtypeStruct((1, 256), jnp.int32)
    loss = make_loss_function(WIDE, dtype=jnp.dtype("float32"), matmul="threaded").lower(params, batch, batch)
    assert logits_of_a_chunk < loss.compile().memory_analysis().temp_size_in_bytes < 2 * logits_of_a_chunk


@can_alias
def test_what_is_computed_anew_is_not_kept():
    """An activation is 256 x 64 float32; of each layer's 16 GELU saves four, both LayerNorms two more, a block 15."""
    activation, layers = 4 * 256 * 64, DEEP.config.num_layers
    needed = {level: temporary_bytes(DEEP, 256, recompute=level) for level in model.RECOMPUTED}
    for level, saved in (("gelu", 4), ("layernorm", 6), ("block", 15)):
        # The layer that is computed anew has all of its own and cotangents of as many elements, as may its neighbour.
        assert needed["none"] - needed[level] >= saved * (layers - 3) * activation, (level, needed)


@implementations
def test_accumulates_micro_batches(tiny_layout, tiny_params, tiny_batch, implementation):
    params, (x, y) = jnp.asarray(tiny_params), tiny_batch
    found = jax.jit(
        lambda p: loss_and_gradient(p, x[:, None], y[:, None], tiny_layout, dtype=jnp.dtype("float32"), matmul=implementation)
    )(params)
    assert_close(found, autodiff(params, x, y, tiny_layout, "float32"), "float32")
    assert_squared_norms(found, tiny_layout)


@can_alias
def test_the_buffer_is_never_copied(tiny_layout, tiny_params, tiny_batch):
    """Memory that the compiled function needs beside its arguments: less than one more gradient buffer."""
    params, (x, y) = jnp.asarray(tiny_params), (jnp.asarray(part[:1, :4]) for part in tiny_batch)
    step = jax.jit(
        lambda p, g: in_place.loss_and_gradient(p, g, x, y, tiny_layout, dtype=jnp.dtype("float32"), matmul="threaded"),
        donate_argnums=1,
    )
    memory = step.lower(params, jnp.zeros_like(params)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < params.nbytes, memory
