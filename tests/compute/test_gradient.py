"""The gradient of every way to compute, against automatic differentiation of a plain GPT-2; and the forward pass alone."""

from __future__ import annotations

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax import jax_compat
from gpt2_jax.compute.forward import all_logits, logits_at, make_loss_function, token_losses
from gpt2_jax.compute.plan import Plan
from gpt2_jax.compute.step import accumulated_gradient, loss_and_gradient, micro_batch_gradient, with_squares
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.models.initialize import initialize_parameters
from gpt2_jax.ops import classifier
from gpt2_jax.ops.recompute import RECOMPUTED
from tests.conftest import TINY, available
from tests.implementations import dtypes, kinds, own_products, plan_of_kind
from tests.reference_model import compiled_quickly, expected

# A dozen tensors deep, each rounding differs by a few units of its dtype, relative to the largest gradient.
TOLERANCE = {"float32": 64 * 2.0**-24, "bfloat16": 8 * 2.0**-9}
N = TINY.layout.num_parameters

some_kinds = pytest.mark.parametrize("kind", ["xla", *available(["threaded"]), "nvidia"])
levels = pytest.mark.parametrize("recompute", RECOMPUTED)


@cache
def compiled(plan: Plan, function=loss_and_gradient, shape=(3, 16)) -> jax.stages.Compiled:
    """The function of (params, grads, x, y): the usual one as it is trained with, others compiled in less time."""
    params, tokens = jax.ShapeDtypeStruct((plan.layout.num_parameters,), jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32)
    lowered = jax.jit(partial(function, plan)).lower(params, params, tokens, tokens)
    as_usual = plan.recompute == "none" and function is loss_and_gradient
    return lowered.compile() if as_usual else compiled_quickly(lowered)


def tolerance(plan: Plan) -> float:
    if plan.weight_gradient_precision == "BF16_BF16_F32_X3":  # what that leaves out; custom_calls/tests/problem.h says why
        return TOLERANCE[plan.dtype] + 3.1 * 2.0**-16
    return TOLERANCE[plan.dtype]


def assert_close(found, wanted, plan):
    assert (found[0].dtype, found[1].dtype) == (jnp.float32, jnp.float32)
    np.testing.assert_allclose(found[0], wanted[0], rtol=tolerance(plan))
    np.testing.assert_allclose(found[1], wanted[1], rtol=0, atol=tolerance(plan) * float(jnp.abs(wanted[1]).max()))
    start, stop = plan.layout["wte"].padding_span
    assert stop > start
    assert (np.asarray(found[1])[start:stop] == 0).all()


def assert_squared_norms(found, layout):
    """Tensor by tensor, of the gradient as it is: at most 1024 squares are added up in float32, then layers and rows of wte."""
    _, grads, squares = found
    for tensor, square in zip(layout.tensors, squares.tolist(), strict=True):
        wanted = np.square(np.asarray(grads[tensor.offset : tensor.stop], dtype=np.float64)).sum()
        assert square == pytest.approx(wanted, rel=1100 * 2.0**-24), tensor.name


@kinds
@dtypes
@levels
def test_overwrites_the_buffer_with_the_gradient(tiny_params, tiny_batch, kind, dtype, recompute):
    plan = plan_of_kind(kind, dtype, recompute=recompute)
    garbage = jnp.full((N,), jnp.nan)
    found = compiled(plan)(jnp.asarray(tiny_params), garbage, *tiny_batch)
    assert_close(found, expected("loss_and_gradient", TINY, dtype, tiny_params, *tiny_batch), plan)
    assert_squared_norms(found, TINY.layout)


@own_products
def test_in_full_float32_a_custom_call_is_within_the_roundings_of_float32(tiny_params, tiny_batch, kind):
    plan = plan_of_kind(kind, matmul_precision="highest")
    assert tolerance(plan) == TOLERANCE["float32"]
    found = compiled(plan)(jnp.asarray(tiny_params), jnp.zeros(N), *tiny_batch)
    assert_close(found, expected("loss_and_gradient", TINY, "float32", tiny_params, *tiny_batch), plan)


@kinds
@dtypes
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_accumulates_micro_batches(tiny_params, tiny_batch, kind, dtype, recompute):
    plan = plan_of_kind(kind, dtype, recompute=recompute)
    x_ABT, y_ABT = (part[:, None] for part in tiny_batch)
    garbage = jnp.full((N,), jnp.nan)
    found = compiled(plan, accumulated_gradient, x_ABT.shape)(jnp.asarray(tiny_params), garbage, x_ABT, y_ABT)
    assert_close(found, expected("loss_and_gradient", TINY, dtype, tiny_params, *tiny_batch), plan)
    assert_squared_norms(found, TINY.layout)


def _scaled(plan, params, grads, x, y, *, accumulate):
    """Half of the gradient, as a step over two micro-batches makes it."""
    return with_squares(plan, *micro_batch_gradient(plan, params, grads, (x, y, None), 0.5, accumulate=accumulate))


_half_on_top = partial(_scaled, accumulate=True)


@kinds
def test_adds_a_scaled_gradient_to_what_the_buffer_holds(tiny_params, tiny_batch, kind):
    plan = plan_of_kind(kind, matmul_precision="highest")
    loss, gradient = expected("loss_and_gradient", TINY, "float32", tiny_params, *tiny_batch)
    before = np.random.default_rng(7).normal(0, float(jnp.abs(gradient).max()) / 4, N).astype(np.float32)
    before[slice(*TINY.layout["wte"].padding_span)] = 0
    found = compiled(plan, _half_on_top)(jnp.asarray(tiny_params), jnp.asarray(before), *tiny_batch)
    assert_close(found, (loss / 2, before + gradient / 2), plan)
    assert_squared_norms(found, TINY.layout)


@some_kinds
@levels
def test_what_is_computed_anew_changes_the_gradient_by_roundings_at_most(tiny_params, tiny_batch, kind, recompute):
    plan, anew = plan_of_kind(kind), plan_of_kind(kind, recompute=recompute)
    wanted, found = (compiled(each)(jnp.asarray(tiny_params), jnp.zeros(N), *tiny_batch) for each in (plan, anew))
    assert float(found[0]) == pytest.approx(float(wanted[0]), rel=2.0**-22)
    # One float32 operation more or less of every kind, relative to the largest gradient.
    np.testing.assert_allclose(found[1], wanted[1], rtol=0, atol=2.0**-20 * float(jnp.abs(wanted[1]).max()))


@pytest.mark.parametrize("kind", ["xla", *available(["threaded"])])
@levels
def test_only_a_whole_block_makes_products_twice(kind, recompute):
    """Those up to the last, whose result no derivative needs."""

    def products(plan):
        tokens, params = jax.ShapeDtypeStruct((3, 16), jnp.int32), jax.ShapeDtypeStruct((N,), jnp.float32)
        text = jax.jit(partial(loss_and_gradient, plan)).lower(params, params, tokens, tokens).as_text()
        return len(re.findall("dot_general |custom_call @gpt2_jax_matmul", text))

    plain, anew = products(plan_of_kind(kind)), products(plan_of_kind(kind, recompute=recompute))
    assert plain > 0
    assert (anew > plain) == (recompute == "block")


@pytest.mark.parametrize("kind", [*available(["threaded"]), "nvidia"])
@dtypes
def test_the_classifier_in_chunks_of_rows(tiny_params, tiny_batch, kind, dtype, monkeypatch):
    """Of unequal size, whose gradients of the token table are added up."""
    monkeypatch.setattr(classifier, "CLASSIFIER_ROWS", 5)
    monkeypatch.setattr(classifier, "_LOW_ROWS", (5, 5))
    plan = plan_of_kind(kind, dtype)
    halved = jax.jit(partial(_scaled, plan, accumulate=False))
    found = halved(jnp.asarray(tiny_params), jnp.full((N,), jnp.nan), *tiny_batch)
    wanted = expected("loss_and_gradient", TINY, dtype, tiny_params, *tiny_batch)
    assert_close((2 * found[0], 2 * found[1]), wanted, plan)
    assert_squared_norms(found, TINY.layout)


@own_products
@dtypes
def test_sequences_longer_than_a_block_of_attentions_queries(kind, dtype):
    config = GPT2Config(max_sequence_length=160, vocab_size=70, num_layers=1, num_heads=2, channels=16)
    params = initialize_parameters(config)
    x, y = np.random.default_rng(0).integers(0, 70, (2, 2, 150)).astype(np.int32)
    plan = plan_of_kind(kind, dtype, config)
    found = compiled(plan, shape=(2, 150))(jnp.asarray(params), jnp.zeros_like(params), x, y)
    assert_close(found, expected("loss_and_gradient", config, dtype, params, x, y), plan)


@kinds
@dtypes
def test_the_losses_alone_are_those_of_every_target(tiny_params, tiny_batch, kind, dtype, monkeypatch):
    monkeypatch.setattr(classifier, "CLASSIFIER_ROWS", 5)  # several chunks, not of one size
    plan, params = plan_of_kind(kind, dtype), jnp.asarray(tiny_params)
    found = jax.jit(partial(token_losses, plan))(params, *tiny_batch)
    assert (found.shape, found.dtype) == (tiny_batch[1].shape, jnp.float32)
    wanted = expected("token_losses", TINY, dtype, tiny_params, *tiny_batch)
    np.testing.assert_allclose(found, wanted, rtol=tolerance(plan))
    # The same products: what is left is the order of the mean.
    trained = compiled(plan)(params, jnp.zeros(N), *tiny_batch)[0]
    assert float(found.mean()) == pytest.approx(float(trained), rel=4 * 2.0**-24)


@kinds
@dtypes
def test_logits(tiny_params, tiny_batch, kind, dtype):
    plan, params = plan_of_kind(kind, dtype), jnp.asarray(tiny_params)
    wanted = expected("logits", TINY, dtype, tiny_params, *tiny_batch)
    atol = tolerance(plan) * float(jnp.abs(wanted).max())
    at = jax.jit(partial(logits_at, plan))
    for position in (0, 6):
        found = at(params, tiny_batch[0], jnp.int32(position))
        assert (found.shape, found.dtype) == ((3, TINY.vocab_size), jnp.float32)
        np.testing.assert_allclose(found, wanted[:, position], rtol=0, atol=atol)
    found = jax.jit(partial(all_logits, plan))(params, tiny_batch[0])
    assert (found.shape, found.dtype) == (wanted.shape, jnp.float32)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=atol)


can_alias = pytest.mark.skipif(
    not jax_compat.ffi_call_can_alias(), reason="this jax cannot alias a custom call's argument and result"
)
WIDE = GPT2Config(max_sequence_length=256, vocab_size=4000, num_layers=1, num_heads=2, channels=16)
DEEP = GPT2Config(max_sequence_length=256, vocab_size=70, num_layers=8, num_heads=2, channels=64)


def temporary_bytes(plan, function, *arguments, donate=()):
    """Of the compiled function, beside arguments and result."""
    params = jax.ShapeDtypeStruct((plan.layout.num_parameters,), jnp.float32)
    lowered = jax.jit(function, donate_argnums=donate).lower(*(params if each == "N" else each for each in arguments))
    return lowered.compile().memory_analysis().temp_size_in_bytes


def gradients_temporary_bytes(plan, tokens):
    batch = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    return temporary_bytes(plan, partial(loss_and_gradient, plan), "N", "N", batch, batch, donate=1)


@can_alias
def test_chunks_of_the_classifier_share_one_memory(monkeypatch):
    monkeypatch.setattr(classifier, "CLASSIFIER_ROWS", 64)
    plan = plan_of_kind("threaded", config=WIDE)
    logits_of_a_chunk = 4 * 64 * WIDE.padded_vocab_size
    assert logits_of_a_chunk < gradients_temporary_bytes(plan, 256) < 2 * logits_of_a_chunk
    batch = jax.ShapeDtypeStruct((1, 256), jnp.int32)
    assert logits_of_a_chunk < temporary_bytes(plan, make_loss_function(plan), "N", batch, batch) < 2 * logits_of_a_chunk


@can_alias
def test_what_is_computed_anew_is_not_kept():
    """An activation is 256 x 64 float32; of each layer's 16 GELU saves four, both LayerNorms two more, a block 15."""
    activation, layers = 4 * 256 * 64, DEEP.num_layers
    needed = {
        level: gradients_temporary_bytes(plan_of_kind("threaded", config=DEEP, recompute=level), 256) for level in RECOMPUTED
    }
    for level, saved in (("gelu", 4), ("layernorm", 6), ("block", 15)):
        # The layer that is computed anew has all of its own and cotangents of as many elements, as may its neighbour.
        assert needed["none"] - needed[level] >= saved * (layers - 3) * activation, (level, needed)


@can_alias
@levels
def test_the_buffer_is_never_copied(recompute):
    """Memory that the compiled function needs beside its arguments: less than one more gradient buffer."""
    bytes_needed = gradients_temporary_bytes(plan_of_kind("threaded", recompute=recompute), 4)
    assert bytes_needed < 4 * N, bytes_needed


@can_alias
def test_the_buffer_of_a_running_total_is_never_copied():
    plan, batches = plan_of_kind("threaded"), jax.ShapeDtypeStruct((2, 1, 4), jnp.int32)
    # The total of the micro-batches is one buffer; grads is not among its arguments' users.
    needed = temporary_bytes(plan, partial(accumulated_gradient, plan), "N", "N", batches, batches, donate=1)
    assert needed < 2 * 4 * N, needed


def test_the_reference_makes_the_buffer_by_one_concatenation():
    """No operation that sums or pads whole buffers, a tensor at a time."""
    plan, params, tokens = plan_of_kind("xla"), jnp.zeros(N), jnp.zeros((3, 9), jnp.int32)
    operations = str(jax.make_jaxpr(partial(loss_and_gradient, plan))(params, None, tokens, tokens))
    makes_buffers = re.findall(rf":f32\[{N}\] = (\w+)", operations)
    assert makes_buffers.count("concatenate") == 1
    others = set(makes_buffers) - {"concatenate", "broadcast_in_dim", "optimization_barrier"}
    assert not others, others


def test_adding_to_the_references_buffer_is_one_addition():
    plan, params, tokens = plan_of_kind("xla"), jnp.zeros(N), jnp.zeros((3, 9), jnp.int32)
    operations = str(jax.make_jaxpr(partial(_half_on_top, plan))(params, params, tokens, tokens))
    makes_buffers = re.findall(rf":f32\[{N}\] = (\w+)", operations)
    assert makes_buffers.count("add") == 1
    assert "pad" not in makes_buffers


@some_kinds
def test_the_buffer_is_never_cast_as_a_whole(kind):
    text = compiled(plan_of_kind(kind, "bfloat16")).as_text()
    assert f"f32[{N}]" in text
    assert f"bf16[{N}]" not in text


def test_no_weight_is_read_through_a_bare_cast_of_a_slice():
    """Which XLA's compiler for GPUs, unlike the CPU's, moves above the slice: a cast of the whole buffer."""
    params, tokens = jax.ShapeDtypeStruct((N,), jnp.float32), jax.ShapeDtypeStruct((3, 16), jnp.int32)
    plan = plan_of_kind("nvidia", "bfloat16")
    text = jax.jit(partial(loss_and_gradient, plan)).lower(params, params, tokens, tokens).as_text()
    slices, casts = set(), []
    for result, operation, operand, rest in re.findall(r"(%\w+) = stablehlo\.(\w+) (%\w+)(.*)", text):
        if (operation == "slice" and f"tensor<{N}xf32>" in rest) or (
            operation in ("slice", "reshape", "transpose") and operand in slices
        ):
            slices.add(result)
        elif operation == "convert" and operand in slices and "bf16>" in rest:
            casts.append((operand, rest))
    assert len(slices) > TINY.num_layers * 12
    assert not casts


@some_kinds
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_every_operation_stands_in_the_scope_of_its_op(kind, recompute):
    """So that a profile says where the time goes."""
    names = set(re.findall(r'op_name="(jit[^"]*)"', compiled(plan_of_kind(kind, recompute=recompute)).as_text()))
    scopes = {"embedding", "layer_0", "layer_1", "qkv", "attention", "attproj", "fc", "fcproj", "lnf", "classifier", "gradient"}
    found = {name: set(re.split(r"[/()]+", name)) for name in names}
    assert set().union(*found.values()) >= scopes
    # What is told apart by its layer alone are the residual stream's additions, and barriers.
    assert not [name for name, parts in found.items() if not parts & scopes]
    products = [parts - {"layer_0", "layer_1"} for name, parts in found.items() if name.endswith("dot_general")]
    assert all(parts & scopes for parts in products)
