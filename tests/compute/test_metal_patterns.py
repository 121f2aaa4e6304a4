"""What jax-mps would make one operation of: each form as it wants it, and each of its rules broken once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from gpt2_jax.compute import metal_check, metal_patterns

X, GAIN = jax.ShapeDtypeStruct((4, 6), jnp.float32), jax.ShapeDtypeStruct((6,), jnp.float32)
W_IO, W_OI = jax.ShapeDtypeStruct((6, 6), jnp.float32), jax.ShapeDtypeStruct((6, 6), jnp.float32)
HEADS = jax.ShapeDtypeStruct((2, 4, 6), jnp.float32)


@pytest.fixture(autouse=True)
def as_users_write():
    with jax.numpy_rank_promotion("allow"):
        yield


def parts(function, *shapes):
    module = metal_check.lower(jax.jit(function).trace(*shapes), "mps")
    return list(metal_patterns.parts_of(module))


def only(function, *shapes):
    (part,) = parts(function, *shapes)
    return part


def linear(x, w, b):
    return x @ w + b


def softmax(x, axis=-1, *, shift=None, total=None, low=False):
    shift = jnp.max(x, axis=axis, keepdims=True) if shift is None else shift
    exponential = jnp.exp(x - shift)
    total = jnp.sum(exponential, axis=axis, keepdims=True) if total is None else total(exponential)
    return exponential.astype(jnp.bfloat16) / total.astype(jnp.bfloat16) if low else exponential / total


def normed(x, gain, bias, *, axis=-1, epsilon=1e-5, variance=None, mean=None, gain_last=False):
    m = jnp.mean(x, axis=axis, keepdims=True)
    v = (jnp.mean(x * x, axis=axis, keepdims=True) - m * m) if variance is None else variance(x, m)
    rstd, centred = lax.rsqrt(v + epsilon), x - (m if mean is None else mean(x))
    return centred * rstd * gain + bias if gain_last else centred * (rstd * gain) + bias


@pytest.mark.parametrize(
    ("kind", "function", "shapes"),
    [
        ("product + bias", linear, (X, W_IO, GAIN)),
        ("product + bias", lambda x, w, b: b + jnp.einsum("bti,io->bto", x, w), (HEADS, W_IO, GAIN)),
        ("product + bias", lambda x, w, b: linear(x, w.T, b), (X, W_OI, GAIN)),
        ("softmax", jax.nn.softmax, (X,)),
        ("softmax", lambda x: jax.nn.softmax(x, axis=0), (X,)),
        ("softmax", softmax, (X,)),
        ("layer norm", normed, (X, GAIN, GAIN)),
        (
            "layer norm",
            lambda x, g, b: normed(x, g, b, variance=lambda x, m: jnp.maximum(0, jnp.mean(x * x, -1, keepdims=True) - m * m)),
            (HEADS, GAIN, GAIN),
        ),
    ],
)
def test_the_wanted_form_is_recognised(kind, function, shapes):
    part = only(function, *shapes)
    assert (part.kind, part.refused, part.remark) == (kind, "", "")


@pytest.mark.parametrize(
    ("function", "shapes", "rule"),
    [
        (lambda x, w, b: (x @ w).reshape(2, 2, 6) + b, (X, W_IO, GAIN), "between the product and its bias lies a reshape"),
        (lambda x, w, b: (x @ w).astype(jnp.bfloat16) + b.astype(jnp.bfloat16), (X, W_IO, GAIN), "lies a convert"),
        (lambda x, w, b: (linear(x, w, b), x @ w + 1.0), (X, W_IO, GAIN), None),
        (lambda x, w, b: (lambda y: y * (y + b))(x @ w), (X, W_IO, GAIN), "used beside the addition"),
        (
            lambda x, w, b: lax.dot_general(x, w, (((0,), (0,)), ((), ()))) + b,
            (W_IO, W_IO, GAIN),
            "last dimension of its first",
        ),
        (lambda x, w, b: lax.dot_general(x, w, (((1,), (1,)), ((), ()))) + b, (X, W_OI, GAIN), "first dimension of its second"),
        (
            lambda x, w, b: lax.dot_general(x, w, (((2,), (1,)), ((1,), (0,)))) + b,
            (jax.ShapeDtypeStruct((2, 4, 6), jnp.float32), jax.ShapeDtypeStruct((4, 6, 6), jnp.float32), GAIN),
            "batch dimensions",
        ),
        (lambda x, w, b: x @ w + b, tuple(jax.ShapeDtypeStruct(s.shape, jnp.int32) for s in (X, W_IO, GAIN)), "of integers"),
        (lambda x, w, b: x @ w + b[:, None], (W_IO, W_IO, GAIN), "not one vector along the last dimension"),
    ],
)
def test_each_rule_of_a_product_and_its_bias(function, shapes, rule):
    refused = [part.refused for part in parts(function, *shapes) if part.kind == "product + bias"]
    assert refused == [""] if rule is None else rule in refused[0]


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (lambda x: softmax(x, low=True), "a convert lies between the exponential and the division"),
        (
            lambda x: softmax(x, total=lambda e: jnp.sum(jnp.exp(x), -1, keepdims=True)),
            "the sum is not of the exponential that is divided",
        ),
        (
            lambda x: softmax(x, total=lambda e: jnp.sum(e, -1, keepdims=True).astype(jnp.bfloat16).astype(jnp.float32)),
            "the sum is converted",
        ),
        (lambda x: softmax(x, total=lambda e: lax.reduce(e, 1.0, lax.add, (1,))[:, None]), "the sum does not begin with 0"),
        (lambda x: softmax(x, shift=lax.reduce(x, 0.0, lax.max, (1,))[:, None]), "the maximum does not begin with -inf"),
        (lambda x: softmax(x, axis=(0, 1)), "over more than one dimension"),
        (lambda x: (lambda e: e / jnp.sum(e, -1, keepdims=True))(jnp.exp(x)), "not subtracted"),
        (lambda x: softmax(x, shift=jnp.mean(x, -1, keepdims=True)), "is no maximum, but comes from a divide"),
        (lambda x: softmax(x, shift=jnp.max(jnp.abs(x), -1, keepdims=True)), "the maximum is of another array"),
        (lambda x: softmax(x, shift=jnp.max(x, 0, keepdims=True)), "different dimensions"),
        (lambda x: softmax(x, total=lambda e: jnp.sum(e, 0)[:, None]), "the sum is not broadcast along its own"),
        (lambda x: softmax(x, shift=jnp.max(x, -1)[None, :]), "the maximum is not broadcast along its own"),
    ],
)
def test_each_rule_of_softmax(function, rule):
    part = only(function, W_IO)
    assert part.kind == "softmax"
    assert rule in part.refused


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"epsilon": 2.0}, "no constant between 0 and 1"),
        ({"gain_last": True}, "not multiplied with 1 / deviation"),
        ({"mean": lambda x: jnp.mean(x, 0, keepdims=True)}, "not its mean over the last dimension"),
        ({"mean": lambda x: lax.reduce(x, 1.0, lax.add, (1,))[:, None] / 6}, "not its mean over the last dimension"),
        ({"axis": 0}, "not multiplied with x - mean"),
        ({"variance": lambda x, m: jnp.mean(jnp.square(x - m), -1, keepdims=True)}, "a mean of squared differences"),
        ({"variance": lambda x, m: jnp.mean(jnp.abs(x), -1, keepdims=True) - m * m}, "not the mean of x * x"),
        ({"variance": lambda x, m: jnp.mean(x * x, -1, keepdims=True) - m * jnp.abs(m)}, "not the mean of x times itself"),
    ],
)
def test_each_rule_of_layer_norm(changed, rule):
    part = only(lambda x, gain, bias: normed(x, gain, bias, **changed), W_IO, GAIN, GAIN)
    assert part.kind == "layer norm"
    assert rule in part.refused


def test_layer_norm_wants_a_gain_and_a_shift_along_the_last_dimension():
    def of_gain(x, gain, bias):
        return normed(x, gain[:, None], bias)

    def without_shift(x, gain, bias):
        return normed(x, gain, 0.0) * bias

    assert "the gain, one vector" in only(of_gain, W_IO, GAIN, GAIN).refused
    assert "no shift" in only(without_shift, X, GAIN, GAIN).refused


def test_what_a_backward_pass_reads_makes_softmax_worth_less():
    part = next(part for part in parts(jax.grad(lambda x: jnp.sum(jnp.tanh(softmax(x)))), X) if not part.refused)
    assert "read elsewhere" in part.remark


def test_a_part_counts_as_often_as_its_function_is_called():
    inner = jax.jit(linear)
    found = parts(lambda x, w, b: inner(inner(x, w, b), w, b), X, W_IO, GAIN)
    assert [part.refused for part in found] == ["", ""]


def test_other_operations_are_no_parts():
    assert parts(lambda x, b: x * x + b + 1.0 / (1.0 + jnp.exp(x)), X, GAIN) == []
