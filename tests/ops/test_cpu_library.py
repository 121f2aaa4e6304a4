"""The custom calls' handlers refuse wrong arguments, and say what they expected and what they found."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax import jax_compat
from gpt2_jax.ops.cpu import library as custom_calls
from gpt2_jax.ops.cpu.library import (
    ADAMW,
    ADD_ROWS_INTO,
    ATTENTION,
    ATTENTION_BACKWARD,
    BARRIER,
    COLUMN_SUMS,
    GELU,
    GELU_BACKWARD,
    LAYER_NORM,
    LAYER_NORM_BACKWARD,
    SOFTMAX_CROSS_ENTROPY,
    SUMS_OF_SQUARES,
    WRITE_INTO,
)
from tests.conftest import REPOSITORY

if not custom_calls.is_built():
    pytest.skip("the library of custom calls was not built", allow_module_level=True)

DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16, "s32": jnp.int32}
THREADS = {"num_threads": np.int64(2)}
PRODUCTS = {"num_heads": np.int64(2), "implementation": "threaded", "precision": "F32_F32_F32", **THREADS}


class Call(NamedTuple):
    arguments: dict[str, str]
    results: dict[str, str]
    attributes: dict[str, Any]


# Calls that succeed, their buffers zeros; the products' handlers are tested in custom_calls/tests/test_ffi.cc.
CALLS = {
    LAYER_NORM: Call({"x": "f32[2,6]", "gain": "f32[6]", "bias": "f32[6]"}, {"out": "f32[2,6]"}, THREADS),
    LAYER_NORM_BACKWARD: Call(
        {"x": "f32[2,6]", "gain": "f32[6]", "dout": "f32[2,6]", "dresidual": "f32[2,6]"},
        {"dx": "f32[2,6]", "dgain": "f32[6]", "dbias": "f32[6]"},
        THREADS,
    ),
    GELU: Call({"x": "bf16[2,6]"}, {"out": "bf16[2,6]"}, THREADS),
    GELU_BACKWARD: Call({"x": "bf16[2,6]", "dout": "bf16[2,6]"}, {"dx": "bf16[2,6]"}, THREADS),
    SOFTMAX_CROSS_ENTROPY: Call(
        {"logits": "f32[2,6]", "targets": "s32[2]"},
        {"losses": "f32[2]", "dlogits": "bf16[2,6]"},
        {"vocab_size": np.int64(5), "scale": np.float32(1), **THREADS},
    ),
    COLUMN_SUMS: Call({"x": "bf16[2,6]"}, {"sums": "f32[6]"}, THREADS),
    ATTENTION: Call({"qkv": "f32[2,3,24]"}, {"out": "f32[2,3,8]", "log_sums": "f32[2,2,3]"}, PRODUCTS),
    ATTENTION_BACKWARD: Call(
        {"qkv": "f32[2,3,24]", "out": "f32[2,3,8]", "log_sums": "f32[2,2,3]", "dout": "f32[2,3,8]"},
        {"dqkv": "f32[2,3,24]"},
        PRODUCTS,
    ),
    SUMS_OF_SQUARES: Call({"values": "f32[6]"}, {"sums": "f32[2]"}, {"spans": np.array([1, 4, 4, 6], np.int64), **THREADS}),
    ADAMW: Call(
        {"gradients": "f32[6]", "params": "f32[6]", "m": "f32[6]", "v": "f32[6]", "scalars": "f32[5]"},
        {"params_out": "f32[6]", "m_out": "f32[6]", "v_out": "f32[6]"},
        {
            "spans": np.array([1, 3, 1, 4, 6, 0], np.int64),
            **{name: np.float32(0) for name in ("weight_decay", "beta1", "beta2", "epsilon")},
            **THREADS,
        },
    ),
    WRITE_INTO: Call(
        {"target": "f32[6]", "piece 0": "f32[2]", "piece 1": "f32[3]"},
        {"out": "f32[6]"},
        {"offsets": np.array([4, 0], np.int64), "accumulate": np.int64(0)},
    ),
    BARRIER: Call({"x": "bf16[2,3]", "other": "s32[4]"}, {"out": "bf16[2,3]"}, {}),
    ADD_ROWS_INTO: Call(
        {"target": "f32[8]", "indices": "s32[2]", "rows": "bf16[2,3]"},
        {"out": "f32[8]", "change": "f32[]"},
        {"out_offset": np.int64(1)},
    ),
}

# One thing changed, and what the handler then expected. XLA itself checks the dtype of those of one dtype.
WRONG: list[tuple[str, dict[str, Any], str]] = [
    (LAYER_NORM, {"x": "s32[2,6]"}, "expected x of dtype f32 or bf16"),
    (LAYER_NORM, {"x": "f32[]"}, "expected x of rank 1 or more"),
    (LAYER_NORM, {"out": "f32[3,6]"}, "expected x and out of one shape and dtype"),
    (LAYER_NORM, {"out": "bf16[2,6]"}, "expected x and out of one shape and dtype"),
    (LAYER_NORM, {"gain": "f32[5]"}, "expected gain of size 6"),
    (LAYER_NORM, {"gain": "bf16[6]"}, "expected F32 but got BF16"),
    (LAYER_NORM, {"bias": "f32[2,6]"}, "expected bias of size 6"),
    (LAYER_NORM_BACKWARD, {"dout": "f32[2,5]"}, "expected x, dout, dresidual and dx of one shape and dtype"),
    (LAYER_NORM_BACKWARD, {"dresidual": "bf16[2,6]"}, "expected x, dout, dresidual and dx of one shape and dtype"),
    (LAYER_NORM_BACKWARD, {"dx": "f32[]"}, "expected dx of rank 1 or more"),
    (LAYER_NORM_BACKWARD, {"gain": "f32[7]"}, "expected gain of size 6"),
    (LAYER_NORM_BACKWARD, {"dgain": "f32[5]"}, "expected dgain of size 6"),
    (LAYER_NORM_BACKWARD, {"dbias": "f32[12]"}, "expected dbias of size 6"),
    (LAYER_NORM_BACKWARD, {"dbias": "s32[6]"}, "expected F32 but got S32"),
    (GELU, {"x": "s32[2,6]"}, "expected x of dtype f32 or bf16"),
    (GELU, {"out": "s32[2,6]"}, "expected out of dtype f32 or bf16"),
    (GELU, {"out": "f32[2,6]"}, "expected x and out of one shape and dtype"),
    (GELU, {"out": "bf16[6,2]"}, "expected x and out of one shape and dtype"),
    (GELU_BACKWARD, {"x": "f32[2,6]"}, "expected x, dout and dx of one shape and dtype"),
    (GELU_BACKWARD, {"dout": "bf16[1,6]"}, "expected x, dout and dx of one shape and dtype"),
    (GELU_BACKWARD, {"dx": "bf16[]"}, "expected dx of rank 1 or more"),
    (SOFTMAX_CROSS_ENTROPY, {"logits": "bf16[2,6]"}, "expected F32 but got BF16"),
    (SOFTMAX_CROSS_ENTROPY, {"logits": "f32[]"}, "expected logits of rank 1 or more"),
    (SOFTMAX_CROSS_ENTROPY, {"targets": "f32[2]"}, "expected S32 but got F32"),
    (SOFTMAX_CROSS_ENTROPY, {"targets": "s32[3]"}, "expected targets of size 2"),
    (SOFTMAX_CROSS_ENTROPY, {"losses": "f32[1]"}, "expected losses of size 2"),
    (SOFTMAX_CROSS_ENTROPY, {"dlogits": "f32[2,5]"}, "expected logits and dlogits of one shape"),
    (SOFTMAX_CROSS_ENTROPY, {"dlogits": "s32[2,6]"}, "expected dlogits of dtype f32 or bf16"),
    (SOFTMAX_CROSS_ENTROPY, {"vocab_size": np.int64(7)}, "expected vocab_size from 1 to the columns, got 7"),
    (SOFTMAX_CROSS_ENTROPY, {"vocab_size": np.int64(0)}, "expected vocab_size from 1 to the columns, got 0"),
    (SOFTMAX_CROSS_ENTROPY, {"targets": np.array([4, 5], np.int32)}, "expected targets below 5, got 5"),
    (SOFTMAX_CROSS_ENTROPY, {"targets": np.array([-1, 0], np.int32)}, "expected targets below 5, got -1"),
    (COLUMN_SUMS, {"x": "s32[2,6]"}, "expected x of dtype f32 or bf16"),
    (COLUMN_SUMS, {"x": "f32[]"}, "expected x of rank 1 or more"),
    (COLUMN_SUMS, {"sums": "f32[5]"}, "expected sums of size 6"),
    (COLUMN_SUMS, {"sums": "bf16[6]"}, "expected F32 but got BF16"),
    (ATTENTION, {"qkv": "s32[2,3,24]"}, "expected qkv of dtype f32 or bf16"),
    (ATTENTION, {"qkv": "f32[6,24]"}, "expected qkv [batch,time,3 channels]"),
    (ATTENTION, {"qkv": "f32[2,3,25]"}, "channels a multiple of 2 heads"),
    (ATTENTION, {"num_heads": np.int64(3)}, "channels a multiple of 3 heads"),
    (ATTENTION, {"num_heads": np.int64(0)}, "channels a multiple of 0 heads"),
    (ATTENTION, {"num_heads": np.int64(2**63 - 1)}, "heads"),
    (ATTENTION, {"out": "f32[2,3,4]"}, "expected out of size 48"),
    (ATTENTION, {"out": "bf16[2,3,8]"}, "expected out of qkv's dtype"),
    (ATTENTION, {"log_sums": "f32[2,3]"}, "expected log_sums of size 12"),
    (ATTENTION, {"log_sums": "bf16[2,2,3]"}, "expected F32 but got BF16"),
    (ATTENTION, {"implementation": "magic"}, 'expected an implementation among naive, blocked, simd, threaded ... got "magic"'),
    (ATTENTION, {"precision": "HIGHEST"}, 'expected a precision ... BF16_BF16_F32_X3 ... got "HIGHEST"'),
    (ATTENTION_BACKWARD, {"qkv": "bf16[2,3,24]"}, "expected out of qkv's dtype"),
    (ATTENTION_BACKWARD, {"out": "f32[2,2,8]"}, "expected out of size 48"),
    (ATTENTION_BACKWARD, {"dout": "f32[2,3,24]"}, "expected dout of size 48"),
    (ATTENTION_BACKWARD, {"dout": "bf16[2,3,8]"}, "expected dout of qkv's dtype"),
    (ATTENTION_BACKWARD, {"dqkv": "f32[2,3,8]"}, "expected dqkv of size 144"),
    (ATTENTION_BACKWARD, {"dqkv": "s32[2,3,24]"}, "expected dqkv of dtype f32 or bf16"),
    (ATTENTION_BACKWARD, {"log_sums": "f32[2,2,4]"}, "expected log_sums of size 12"),
    (SUMS_OF_SQUARES, {"values": "bf16[6]"}, "expected F32 but got BF16"),
    (SUMS_OF_SQUARES, {"sums": "f32[3]"}, "expected starts and stops of 3 spans, got 4 bounds"),
    *(
        (SUMS_OF_SQUARES, {"spans": np.array(spans, np.int64)}, f"expected spans within 6 elements, got [{wrong})")
        for spans, wrong in [((0, 4, 4, 7), "4,7"), ((-1, 2, 2, 6), "-1,2"), ((0, 1, 3, 2), "3,2")]
    ),
    (ADAMW, {"gradients": "f32[7]"}, "expected params of size 7"),
    (ADAMW, {"gradients": "bf16[6]"}, "expected F32 but got BF16"),
    *((ADAMW, {name: "f32[5]"}, f"expected {name} of size 6") for name in ("params", "m", "v", "params_out", "m_out", "v_out")),
    (ADAMW, {"scalars": "f32[4]"}, "expected scalars of size 5"),
    (ADAMW, {"spans": np.array([1, 3, 0, 4], np.int64)}, "expected spans of start, stop and whether they decay, got 4"),
    *(
        (ADAMW, {"spans": np.array(spans, np.int64)}, f"expected spans in order within 6 elements, got [{wrong})")
        for spans, wrong in [((0, 7, 0), "0,7"), ((-1, 2, 1), "-1,2"), ((3, 2, 0), "3,2"), ((0, 4, 0, 3, 6, 0), "3,6")]
    ),
    (WRITE_INTO, {"out": "f32[7]"}, "expected out of size 6"),
    (WRITE_INTO, {"target": "bf16[6]"}, "expected F32 but got BF16"),
    (WRITE_INTO, {"piece 1": "bf16[3]"}, "expected piece 1 of dtype f32"),
    (WRITE_INTO, {"piece 0": "f32[3]"}, "expected piece 0 within target, got 3 elements from element 4"),
    (WRITE_INTO, {"offsets": np.array([0], np.int64)}, "expected one offset for each of 2 pieces, got 1"),
    *(
        (WRITE_INTO, {"offsets": np.array([offset, 0], np.int64)}, "expected piece 0 within target")
        for offset in (5, -1, 2**63 - 1, -(2**63))
    ),
    (BARRIER, {"x": "bf16[7]"}, "expected out of size 7"),
    (BARRIER, {"out": "f32[2,3]"}, "expected out of x's dtype"),
    (ADD_ROWS_INTO, {"out": "f32[7]"}, "expected out of size 8"),
    (ADD_ROWS_INTO, {"change": "f32[2]"}, "expected change of size 1"),
    (ADD_ROWS_INTO, {"indices": "f32[2]"}, "expected S32 but got F32"),
    (ADD_ROWS_INTO, {"rows": "s32[2,3]"}, "expected rows of dtype f32 or bf16"),
    (ADD_ROWS_INTO, {"rows": "f32[]"}, "expected rows of rank 1 or more"),
    (ADD_ROWS_INTO, {"rows": "f32[3,2]"}, "expected a row for each of 2 indices"),
    *(
        (ADD_ROWS_INTO, {"indices": np.array([0, index], np.int32)}, f"expected indices of the 2 rows ... got {index}")
        for index in (2, -1, 2**31 - 1)
    ),
    *(
        (ADD_ROWS_INTO, {"out_offset": np.int64(offset)}, "expected out_offset within target")
        for offset in (9, -1, 2**63 - 1, -(2**63))
    ),
]


def shape_of(text: str) -> jax.ShapeDtypeStruct:
    """A buffer as the handlers' messages write it: f32[2,6]."""
    dtype, sizes = text.rstrip("]").split("[")
    return jax.ShapeDtypeStruct(tuple(int(size) for size in sizes.split(",") if size), DTYPES[dtype])


def run(target: str, changes: dict[str, Any]) -> None:
    custom_calls.load()
    call = CALLS[target]
    arguments = []
    for name, text in call.arguments.items():
        change = changes.get(name, text)
        arguments.append(jnp.zeros_like(shape_of(change)) if isinstance(change, str) else jnp.asarray(change))
    results = tuple(shape_of(changes.get(name, text)) for name, text in call.results.items())
    attributes = {name: changes.get(name, value) for name, value in call.attributes.items()}
    jax.block_until_ready(jax.jit(lambda *args: jax_compat.ffi_call(target, results, *args, **attributes))(*arguments))


@pytest.mark.parametrize("target", CALLS)
def test_right_arguments(target):
    run(target, {})


@pytest.mark.parametrize(("target", "changes", "expected"), WRONG, ids=lambda value: str(value).removeprefix("gpt2_jax_"))
def test_wrong_arguments(target, changes, expected):
    with pytest.raises(RuntimeError, match=r"^INVALID_ARGUMENT") as caught:
        run(target, changes)
    message = str(caught.value)
    assert re.search(".*".join(map(re.escape, expected.split(" ... "))), message), message
    if "but got" in expected:
        return
    assert target + ": expected" in message
    for name, text in {**CALLS[target].arguments, **CALLS[target].results}.items():
        found = changes.get(name, text)
        if isinstance(found, str) and not name.startswith(("piece", "other")):
            assert f"{name} {found}" in message.partition("; found ")[2]


def test_package_and_library_have_one_interface_number_and_another_is_refused(monkeypatch):
    """A library that an earlier build left behind has the same names, and may mean other things by them."""
    header = (REPOSITORY / "custom_calls/src/custom_calls.h").read_text()
    assert re.search(r"#define GPT2_JAX_INTERFACE (\d+)", header)[1] == str(custom_calls.INTERFACE)
    built = custom_calls.INTERFACE
    monkeypatch.setattr(custom_calls, "INTERFACE", built + 1)
    with pytest.raises(NotImplementedError, match=f"expected interface {built + 1}, found {built} .pip install -e . builds"):
        custom_calls.load.__wrapped__()


def test_a_library_without_a_number_is_refused():
    with pytest.raises(NotImplementedError, match="found none"):
        custom_calls._check_interface(ctypes.CDLL(None), Path("lib.so"))


def test_the_rates_of_this_machine_are_measured():
    rates = custom_calls.rates()
    assert set(rates) == {"F32_F32_F32", "BF16_BF16_F32", "memory"}
    # No machine of today is below or above these.
    assert all(0.1 < rate < 1e6 for rate in rates.values())
