"""Matrix products without a compiler: an XLA FFI handler in Python that calls a BLAS library's cblas_sgemm with ctypes.

For where the C++ library of custom calls was not built: it takes the arguments of gpt2_jax_matmul and
gpt2_jax_matmul_bias (custom_calls/src/custom_calls.h), for the implementations 'accelerate' (macOS) and 'openblas' (the package
scipy-openblas32) alone. float32 matrices are used where they lie, bfloat16 ones go through copies. The structures are
those of xla/ffi/api/c_api.h, version 0.1, which every jaxlib since 0.4.34 takes.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from typing import Any

import ml_dtypes
import numpy as np

_DTYPES = {11: np.dtype(np.float32), 16: np.dtype(ml_dtypes.bfloat16)}  # by XLA_FFI_DataType
_STRING, _METADATA, _INTERNAL_ERROR = 4, 1, 13  # an XLA_FFI_AttrType, _Extension_Type, _Error_Code
_LARGEST_SIZE = 2**31 - 1  # of a C int; ctypes would cut off what is beyond it, without a word
_ROW_MAJOR, _NO_TRANSPOSE, _TRANSPOSE = 101, 111, 112  # of cblas.h


def _structure(**fields: Any) -> Any:
    """Most of the interface's structures begin with their size and a pointer to extensions."""
    fields = {"size": c_size_t, "extension": c_void_p} | fields
    return type("_Structure", (Structure,), {"_fields_": list(fields.items())})


class _Extension(Structure):
    _fields_ = (("size", c_size_t), ("type", c_int), ("next", c_void_p), ("metadata", c_void_p))


class _Bytes(Structure):
    _fields_ = (("start", c_void_p), ("length", c_size_t))


class _Scalar(Structure):
    _fields_ = (("dtype", c_int), ("value", POINTER(c_int64)))


_Version = _structure(major=c_int, minor=c_int)


class _Metadata(Structure):
    _fields_ = (("size", c_size_t), ("version", _Version))


_Error = _structure(message=c_char_p, code=c_int)
_Api = _structure(version=_Version, internal=c_void_p, create_error=ctypes.CFUNCTYPE(c_void_p, POINTER(_Error)))
_Buffer = _structure(dtype=c_int, data=c_void_p, rank=c_int64, dimensions=POINTER(c_int64))
_Buffers = _structure(count=c_int64, types=POINTER(c_int), buffers=POINTER(POINTER(_Buffer)))
_Attributes = _structure(count=c_int64, types=POINTER(c_int), names=POINTER(POINTER(_Bytes)), values=POINTER(c_void_p))
_CallFrame = _structure(
    api=POINTER(_Api), context=c_void_p, stage=c_int, arguments=_Buffers, results=_Buffers, attributes=_Attributes
)
_HANDLER = ctypes.CFUNCTYPE(c_void_p, POINTER(_CallFrame))


def load_sgemm(library: str, *symbols: str) -> Callable[..., None]:
    """The first of these symbols that the library has. OSError and AttributeError when there is no such thing."""
    loaded = ctypes.CDLL(library)
    sgemm = getattr(loaded, next((symbol for symbol in symbols if hasattr(loaded, symbol)), symbols[-1]))
    sgemm.restype = None
    sgemm.argtypes = (*(c_int,) * 6, c_float, c_void_p, c_int, c_void_p, c_int, c_float, c_void_p, c_int)
    return sgemm


def matmul_handler(sgemm: Callable[..., None]) -> Any:
    """A handler for both targets, to be made into a capsule and kept for as long as the process."""
    one_at_a_time = threading.Lock()  # ctypes lets go of Python's lock, and some releases of OpenBLAS need one

    def handle(frame_pointer: Any) -> Any:
        frame = frame_pointer.contents
        if frame.extension:
            extension = _Extension.from_address(frame.extension)
            if extension.type == _METADATA:
                version = _Metadata.from_address(extension.metadata).version
                version.major, version.minor = 0, 1
                return None
        try:
            arguments = [_array(frame.arguments.buffers[i].contents) for i in range(frame.arguments.count)]
            _multiply(sgemm, one_at_a_time, arguments, _array(frame.results.buffers[0].contents), _attributes(frame.attributes))
        # Not Exception alone: ctypes prints whatever a callback raises, Ctrl-C's KeyboardInterrupt too, and goes on as if the
        # product had been computed.
        except BaseException as error:
            message = f"gpt2_jax_matmul by ctypes: {type(error).__name__}: {error}".encode()
            return frame.api.contents.create_error(_Error(ctypes.sizeof(_Error), None, message, _INTERNAL_ERROR))
        return None

    return _HANDLER(handle)


def _array(buffer: Any) -> np.ndarray:
    """The elements where they lie."""
    dtype = _DTYPES[buffer.dtype]
    count = int(np.prod(buffer.dimensions[: buffer.rank], dtype=np.int64))
    if count == 0:
        return np.empty(0, dtype)
    return np.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(buffer.data), dtype)


def _attributes(attributes: Any) -> dict[str, Any]:
    """By name; there are texts and 64-bit integers."""
    result: dict[str, Any] = {}
    for i in range(attributes.count):
        name = attributes.names[i].contents
        address = attributes.values[i]
        if attributes.types[i] == _STRING:
            text = _Bytes.from_address(address)
            value: Any = ctypes.string_at(text.start, text.length).decode()
        else:
            value = _Scalar.from_address(address).value[0]
        result[ctypes.string_at(name.start, name.length).decode()] = value
    return result


def _multiply(
    sgemm: Callable[..., None], lock: threading.Lock, arguments: list[np.ndarray], out: np.ndarray, attributes: dict[str, Any]
) -> None:
    m, n, k = (attributes[name] for name in "mnk")
    if max(m, n, k) > _LARGEST_SIZE:
        raise ValueError(f"cblas_sgemm takes sizes of 32 bits, this product has {max(m, n, k)}")
    sums = out if out.dtype == np.float32 else np.empty(out.size, np.float32)
    sums_MN = sums.reshape(m, n)
    # With a bias the product is added to it.
    sums_MN[:] = arguments[2][attributes["bias_offset"] :][:n] if "bias_offset" in attributes else 0
    operands: list[Any] = []
    for name, stored, rows, columns in (("a", arguments[0], m, k), ("b", arguments[1], k, n)):
        matrix = stored[attributes[f"{name}_offset"] :][: rows * columns].reshape(rows, columns)
        transposed = attributes[f"transpose_{name}"]
        if attributes["precision"] == "BF16_BF16_F32":
            matrix = matrix.astype(ml_dtypes.bfloat16)
        matrix = matrix.astype(np.float32, copy=False)
        operands += [_TRANSPOSE if transposed else _NO_TRANSPOSE, matrix, max(1, rows if transposed else columns)]
    transpose_a, a, lda, transpose_b, b, ldb = operands
    if m and n and k:
        sizes = (_ROW_MAJOR, transpose_a, transpose_b, m, n, k)
        with lock:
            sgemm(*sizes, 1.0, a.ctypes.data, lda, b.ctypes.data, ldb, 1.0, sums.ctypes.data, n)
    if sums is not out:
        out[:] = sums.astype(out.dtype)
