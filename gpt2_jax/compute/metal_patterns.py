"""Which parts of a program jax-mps makes into one operation of MLX, and why it does not for the others.

jax-mps looks for three forms in a program that holds our parts: a product with its bias (mps.addmm), softmax (mps.softmax)
and LayerNorm (mps.layer_norm). Here is each rule that its matchers in src/pjrt_plugin/passes of
github.com/tillahoffmann/jax-mps have (0.10.11), with the first that a part breaks. Its fourth, RMSNorm, is no part of GPT-2.
What jax-mps has as a function of its own is a custom call in the program already.

The plugin simplifies a program first, above all what only inserts or removes dimensions of size 1. So such operations are
passed over here. A part that is divided over two functions of a program is not seen.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo


@dataclass(frozen=True)
class Part:
    """A part of a program that is one operation in jax-mps, or could be."""

    kind: str  # product + bias, softmax, layer norm
    place: str = ""  # in the source
    refused: str = ""  # the first rule that it breaks
    remark: str = ""  # what makes it worth less


class _BrokenRuleError(Exception):
    """The first rule that a part breaks."""


def parts_of(module: ir.Module, place: Callable[[ir.Operation], str] = lambda _: "") -> Iterator[Part]:
    """The parts of all functions of a module, each as often as its function is called; `place` tells an operation's."""
    functions = {_text(each.attributes["sym_name"]): each.operation for each in module.body.operations}
    for name, times in _times_called(functions).items():
        for operation in _inside(functions[name]):
            for looks_like, kind, match in _KINDS:
                if looks_like(operation):
                    try:
                        part = Part(kind, place(operation), remark=match(operation))
                    except _BrokenRuleError as broken:
                        part = Part(kind, place(operation), refused=str(broken))
                    yield from [part] * times


# A product and its bias.


def _is_product_and_bias(add: ir.Operation) -> bool:
    """An addition of what comes from a product, and of what comes from a smaller array that is no constant."""
    return _is(add, "add") and any(
        _is(_through(one, "reshape", "convert", "transpose"), "dot_general") and _is_smaller_array(other)
        for one, other in (add.operands, reversed(add.operands))
    )


def _is_smaller_array(value: ir.Value) -> bool:
    broadcast = _through(value, "reshape", "convert")
    return _is(broadcast, "broadcast_in_dim") and _constant(value) is None and _size(broadcast.operands[0]) > 1


def _match_product_and_bias(add: ir.Operation) -> str:
    product, bias = add.operands
    if _is_smaller_array(product) and not _is_smaller_array(bias):
        product, bias = bias, product
    dot = _expected("dot_general", _made_by(product), "between the product and its bias lies a {}")
    _rule(len(list(product.uses)) == 1, "the product is used beside the addition too")
    numbers = stablehlo.DotDimensionNumbers(dot.attributes["dot_dimension_numbers"])
    left, right = numbers.lhs_contracting_dimensions, numbers.rhs_contracting_dimensions
    batches = numbers.lhs_batching_dimensions, numbers.rhs_batching_dimensions
    leading = list(range(len(batches[0])))
    _rule(list(left) == [_rank(dot.operands[0]) - 1], "the product does not contract the last dimension of its first operand")
    _rule(list(right) == [len(leading)], "the product does not contract the first dimension of its second operand")
    _rule(all(list(each) == leading for each in batches), "the product's batch dimensions are not the leading ones")
    _rule(_is_float(add.results[0]), "it is of integers")
    _rule(_is_along_last(bias, add.results[0]), "the bias is not one vector along the last dimension")
    return ""


# Softmax.


def _is_softmax(divide: ir.Operation) -> bool:
    """A division of an exponential, or of what is made of one, by the sum of exponentials."""
    if not _is(divide, "divide") or not _is(_through(divide.operands[0], "convert", "reshape", "multiply"), "exponential"):
        return False
    total = _through(divide.operands[1], "broadcast_in_dim", "reshape", "convert")
    return _reduces(total, "add") and _is(_through(total.operands[0], "convert", "reshape"), "exponential")


def _match_softmax(divide: ir.Operation) -> str:
    result = divide.results[0]
    total = _expected("reduce", _through(divide.operands[1], "broadcast_in_dim", "reshape", "convert"), "")
    exponential = _expected("exponential", _made_by(divide.operands[0]), "a {} lies between the exponential and the division")
    _rule(total.operands[0] == exponential.results[0], "the sum is not of the exponential that is divided")
    _rule(not _passes(divide.operands[1], "convert", total), "the sum is converted before the division")
    axes = _dimensions(total)
    _rule(len(axes) == 1, "it goes over more than one dimension")
    _rule(_constant(total.operands[1]) == 0, "the sum does not begin with 0")
    _rule(_is_broadcast_back(divide.operands[1], result, axes[0]), "the sum is not broadcast along its own dimension alone")
    shifted = _made_by(exponential.operands[0])
    x, shift = _expected("subtract", shifted, "the maximum is not subtracted from what the exponential takes").operands
    highest = _through(shift, "broadcast_in_dim", "reshape")
    if _is(highest, "maximum"):  # with -inf, as jax writes it
        highest = next((made for each in highest.operands if _reduces(made := _made_by(each), "maximum")), highest)
    highest = _expected("reduce", highest, "what is subtracted is no maximum, but comes from a {}")
    _rule(_reduces(highest, "maximum"), "what is subtracted is no maximum, but another reduction")
    _rule(_constant(highest.operands[1]) == -math.inf, "the maximum does not begin with -inf")
    _rule(highest.operands[0] == x, "the maximum is of another array than it is subtracted from")
    _rule(_dimensions(highest) == axes, "maximum and sum go over different dimensions")
    _rule(_is_broadcast_back(shift, result, axes[0]), "the maximum is not broadcast along its own dimension alone")
    read_elsewhere = len(list(exponential.results[0].uses)) > 2
    return "its exponential is read elsewhere too, so that the operation is extra work" if read_elsewhere else ""


# LayerNorm.


def _is_layer_norm(rsqrt: ir.Operation) -> bool:
    """A reciprocal root of a mean, plus something, by which a difference is multiplied, alone or with a gain."""
    if not _is(rsqrt, "rsqrt") or not _is(_made_by(rsqrt.operands[0]), "add"):
        return False
    return any(_is(_made_by(other), "subtract") for product in _products(rsqrt.results[0]) for other in _others(product))


def _match_layer_norm(rsqrt: ir.Operation) -> str:
    total = _expected("add", _made_by(rsqrt.operands[0]), "")
    epsilon = next((value for each in total.operands if (value := _constant(each)) is not None), None)
    _rule(epsilon is not None and 0 < epsilon < 1, "what is added to the variance is no constant between 0 and 1")
    variance = next(each for each in total.operands if _constant(each) is None)
    reasons: list[str] = []
    for scale in _products(rsqrt.results[0]):
        try:
            return _match_from_scale(scale, variance)
        except _BrokenRuleError as broken:
            reasons.append(str(broken))
    # A backward pass multiplies with it too, without a gain.
    raise _BrokenRuleError(next((reason for reason in reasons if reason != _NO_GAIN), _NO_GAIN))


_NO_GAIN = "the gain, one vector along the last dimension, is not multiplied with 1 / deviation, but with the normed value"


def _match_from_scale(scale: ir.Operation, variance: ir.Value) -> str:
    result = scale.results[0]
    gain = [each for each in scale.operands if not _is(_through(each, "broadcast_in_dim", "reshape"), "rsqrt")]
    _rule(len(gain) == 1 and _is_along_last(gain[0], result), _NO_GAIN)
    scaled = [user for user in _users(result) if _is(user, "multiply") and _is(_other(user, result), "subtract")]
    _rule(scaled != [], "the product of gain and 1 / deviation is not multiplied with x - mean")
    x, mean = _expected("subtract", _other(scaled[0], result), "").operands
    last = _rank(x) - 1
    mean_of = _mean(_through(mean, "broadcast_in_dim", "reshape"))
    _rule(mean_of == (x, [last]), "what is subtracted from x is not its mean over the last dimension")
    difference = _through(variance, "reshape", "broadcast_in_dim")
    if _is(difference, "maximum"):  # with 0
        difference = next((_made_by(each) for each in difference.operands if _constant(each) != 0), difference)
    not_so = "the variance is not E[x^2] - E[x]^2, but a mean of squared differences"
    of_squares, squared_mean = (_through(each, "reshape") for each in _expected("subtract", difference, not_so).operands)
    squares, over = _mean(of_squares) or (x, [])
    _rule(
        over == [last] and _is_product_of(_made_by(squares), x, x),
        "what the variance begins with is not the mean of x * x over the last dimension",
    )
    _rule(
        _is(squared_mean, "multiply")
        and all(_mean(_through(each, "reshape")) == (x, [last]) for each in squared_mean.operands),
        "what the variance subtracts is not the mean of x times itself",
    )
    y = scaled[0].results[0]
    shifted = any(_is(user, "add") and _is_along_last_of(user, y) for user in _users(y))
    _rule(shifted, "no shift, one vector along the last dimension, is added")
    return ""


_KINDS: tuple[tuple[Callable[[ir.Operation], bool], str, Callable[[ir.Operation], str]], ...] = (
    (_is_product_and_bias, "product + bias", _match_product_and_bias),
    (_is_softmax, "softmax", _match_softmax),
    (_is_layer_norm, "layer norm", _match_layer_norm),
)


# Reading a program.


def _rule(holds: bool, otherwise: str) -> None:
    if not holds:
        raise _BrokenRuleError(otherwise)


def _expected(name: str, operation: ir.Operation | None, otherwise: str) -> ir.Operation:
    """The operation, if it has this name; else the rule is broken, and {} in its text is what was found."""
    if not _is(operation, name):
        raise _BrokenRuleError(otherwise.format(_short(operation)))
    return operation


def _times_called(functions: dict[str, ir.Operation]) -> Counter[str]:
    """How often each function runs in one of 'main', which calls others; a loop's body counts once."""
    times = Counter({"main": 1})
    calls = {
        name: [_text(op.attributes["callee"]) for op in _inside(function) if op.name == "func.call"]
        for name, function in functions.items()
    }
    waiting = ["main"]
    while waiting:
        for callee in calls[waiting.pop()]:
            times[callee] += 1
            waiting.append(callee)
    return times


def _inside(operation: ir.Operation) -> Iterator[ir.Operation]:
    for region in operation.regions:
        for block in region:
            for inner in block:
                yield inner.operation
                yield from _inside(inner.operation)


def _made_by(value: ir.Value) -> ir.Operation | None:
    """The operation that a value is a result of; None for a function's argument."""
    owner = value.owner
    return None if isinstance(owner, ir.Block) else owner.operation


def _is(operation: ir.Operation | None, name: str) -> TypeGuard[ir.Operation]:
    return operation is not None and operation.name == f"stablehlo.{name}"


def _short(operation: ir.Operation | None) -> str:
    return "argument of the function" if operation is None else operation.name.removeprefix("stablehlo.")


def _through(value: ir.Value, *names: str) -> ir.Operation | None:
    """The operation behind those that are named."""
    made = _made_by(value)
    while made is not None and made.name.removeprefix("stablehlo.") in names:
        made = _made_by(made.operands[0])
    return made


def _passes(value: ir.Value, name: str, until: ir.Operation) -> bool:
    """Whether an operation of this name lies between a value and the operation behind it."""
    made = _made_by(value)
    while made is not None and made != until:
        if _is(made, name):
            return True
        made = _made_by(made.operands[0])
    return False


def _users(value: ir.Value) -> list[ir.Operation]:
    return [use.owner.operation for use in value.uses]


def _products(value: ir.Value) -> Iterator[ir.Operation]:
    """The multiplications that read a value, or its broadcast."""
    for user in _users(value):
        if _is(user, "multiply"):
            yield user
        elif _is(user, "broadcast_in_dim") or _is(user, "reshape"):
            yield from _products(user.results[0])


def _others(product: ir.Operation) -> Iterator[ir.Value]:
    """What a product is multiplied from, and what the products that read it are multiplied with."""
    yield from product.operands
    for user in _products(product.results[0]):
        yield from user.operands


def _other(operation: ir.Operation, value: ir.Value) -> ir.Operation | None:
    """What made the operand beside this one."""
    left, right = operation.operands
    return _made_by(right if left == value else left)


def _is_along_last_of(add: ir.Operation, value: ir.Value) -> bool:
    left, right = add.operands
    return _is_along_last(right if left == value else left, add.results[0])


def _is_product_of(operation: ir.Operation | None, *values: ir.Value) -> bool:
    return _is(operation, "multiply") and list(operation.operands) == list(values)


def _mean(divide: ir.Operation | None) -> tuple[ir.Value, list[int]] | None:
    """What an operation is the mean of, and over which dimensions; None for any other operation."""
    if not _is(divide, "divide"):
        return None
    total, count = _through(divide.operands[0], "reshape", "broadcast_in_dim"), _constant(divide.operands[1])
    if not _reduces(total, "add") or _constant(total.operands[1]) != 0:
        return None
    x, axes = total.operands[0], _dimensions(total)
    return (x, axes) if len(axes) == 1 and count == _shape(x)[axes[0]] else None


def _reduces(operation: ir.Operation | None, name: str) -> TypeGuard[ir.Operation]:
    """Whether an operation reduces one operand with one operation of this name."""
    if not _is(operation, "reduce") or len(operation.operands) != 2:
        return False
    (body,) = operation.regions[0]
    return [inner.operation.name for inner in body] == [f"stablehlo.{name}", "stablehlo.return"]


def _dimensions(reduce: ir.Operation) -> list[int]:
    return [int(each) for each in ir.DenseI64ArrayAttr(reduce.attributes["dimensions"])]


def _constant(value: ir.Value) -> float | None:
    """The number of a constant, all elements of which are the same; None for what is not one."""
    made = _through(value, "broadcast_in_dim", "reshape", "convert")
    if not _is(made, "constant"):
        return None
    elements = ir.DenseElementsAttr(made.attributes["value"])
    number: Any = elements.get_splat_value() if elements.is_splat else None  # an attribute of a float or an integer
    return None if number is None else float(number.value)


def _is_broadcast_back(value: ir.Value, result: ir.Value, axis: int) -> bool:
    """Whether a value has the result's shape by a broadcast along one dimension, which was reduced."""
    made = _made_by(value)
    if not _is(made, "broadcast_in_dim") or _broadcast_dimensions(made) != list(range(_rank(result))):
        return False
    return _shape(made.operands[0]) == [1 if place == axis else size for place, size in enumerate(_shape(result))]


def _is_along_last(value: ir.Value, result: ir.Value) -> bool:
    """Whether a value is one vector, broadcast along all dimensions of the result but the last."""
    made = _made_by(value)
    while _is(made, "broadcast_in_dim") or _is(made, "reshape"):
        source = made.operands[0]
        if _is(made, "broadcast_in_dim"):
            dimensions = _broadcast_dimensions(made)
            if not dimensions or dimensions[-1] != _rank(made.results[0]) - 1:
                return False
        if _size(source) != _shape(result)[-1] or _shape(source)[-1] != _size(source):
            return False
        if _rank(source) == 1:
            return True
        made = _made_by(source)
    return False


def _broadcast_dimensions(broadcast: ir.Operation) -> list[int]:
    return [int(each) for each in ir.DenseI64ArrayAttr(broadcast.attributes["broadcast_dimensions"])]


def _shape(value: ir.Value) -> list[int]:
    return list(ir.RankedTensorType(value.type).shape)


def _rank(value: ir.Value) -> int:
    return len(_shape(value))


def _size(value: ir.Value) -> int:
    return int(np.prod(_shape(value)))


def _is_float(value: ir.Value) -> bool:
    return str(ir.ShapedType(value.type).element_type) in ("f16", "bf16", "f32")


def _text(attribute: ir.Attribute) -> str:
    return str(attribute).strip('"@')
