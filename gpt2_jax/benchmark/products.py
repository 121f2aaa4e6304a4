"""The matrix products of a training step: their operands, and every implementation that makes them.

Operands and results are as each implementation's own training step has them: row-major, weights (outputs, inputs) and
float32, gradients of weights float32. For products in bfloat16, x and dy are bfloat16; an implementation that cannot read
a float32 weight rounds it within the measured time. The custom calls write a weight's gradient to where it belongs, all
others make a new array.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.ops import matmul
from gpt2_jax.ops.cpu import library as custom_calls
from gpt2_jax.ops.threaded import WeightView

# This project's own, from the plainest to the fastest, then the peers.
IMPLEMENTATIONS = (*matmul.CUSTOM_CALLS, "xla", "numpy", "pytorch")
PRECISIONS = ("F32_F32_F32", "BF16_BF16_F32", "BF16_BF16_F32_X3", "BF16_BF16_F32_X6", "S8_S8_S32_X6")
PEER_PRECISIONS = {"xla": PRECISIONS[:2], "numpy": PRECISIONS[:1], "pytorch": PRECISIONS[:2]}
PRODUCTS = ("fwd", "dx", "dw")


class Linear(NamedTuple):
    """One kind of linear layer of a model: its weight (outputs, inputs), and how many of them the model has."""

    name: str
    outputs: int
    inputs: int
    layers: int


def linears_of(config: GPT2Config) -> list[Linear]:
    """The linear layers of a GPT-2 in forward order, by their tensors' names; the classifier last."""
    C, L = config.channels, config.num_layers
    return [
        Linear("qkvw", 3 * C, C, L),
        Linear("attprojw", C, C, L),
        Linear("fcw", 4 * C, C, L),
        Linear("fcprojw", C, 4 * C, L),
        Linear("wte", config.padded_vocab_size, C, 1),
    ]


def dimensions(product: str, linear: Linear, tokens: int) -> tuple[int, int, int]:
    """(m, k, n) of y = x wᵀ, of dx = dy w, or of dw = dyᵀ x."""
    return {
        "fwd": (tokens, linear.inputs, linear.outputs),
        "dx": (tokens, linear.outputs, linear.inputs),
        "dw": (linear.outputs, tokens, linear.inputs),
    }[product]


def flops(product: str, linear: Linear, tokens: int) -> int:
    """Of one product: 2 m k n."""
    m, k, n = dimensions(product, linear, tokens)
    return 2 * m * k * n


@dataclass(frozen=True)
class Operands:
    """One step's operands in float32: a weight for every layer, x and dy for every kind of linear layer."""

    linears: list[Linear]
    tokens: int
    weights: dict[str, list[np.ndarray]]
    x: dict[str, np.ndarray]
    dy: dict[str, np.ndarray]

    def pair(self, product: str, linear: Linear, layer: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """(a, b) of the product as they are stored: (x, w), (dy, w) or (dy, x)."""
        a = (self.x if product == "fwd" else self.dy)[linear.name]
        return a, self.x[linear.name] if product == "dw" else self.weights[linear.name][layer]

    def exact(self, product: str, linear: Linear, layer: int, rows: np.ndarray) -> np.ndarray:
        """These rows of the product in float64."""
        a, b = self.pair(product, linear, layer)
        rows_of_a = (a.T if product == "dw" else a)[rows].astype(np.float64)
        return rows_of_a @ (b.T if product == "fwd" else b).astype(np.float64)


def make_operands(config: GPT2Config, tokens: int, seed: int = 0) -> Operands:
    """Random normal operands; weights with GPT-2's standard deviation of 0.02."""
    linears, layout = linears_of(config), config.layout
    generator = np.random.default_rng(seed)
    # Blocks of normals are repeated, since drawing all takes seconds. Their lengths are prime, so that no two rows are equal.
    weight_block = 0.02 * generator.standard_normal(1_048_583, dtype=np.float32)
    x_block, dy_block = generator.standard_normal((2, 524_309), dtype=np.float32)
    tensors = layout.views(np.resize(weight_block, layout.num_parameters))
    return Operands(
        linears=linears,
        tokens=tokens,
        weights={
            linear.name: list(tensors[linear.name]) if layout[linear.name].stacked else [tensors[linear.name]]
            for linear in linears
        },
        x={linear.name: np.resize(x_block, (tokens, linear.inputs)) for linear in linears},
        dy={linear.name: np.resize(dy_block, (tokens, linear.outputs)) for linear in linears},
    )


# (product, linear's name) -> which rows of the result are made
Rows = dict[tuple[str, str], np.ndarray]
# The same -> the operand that has those rows
_First = dict[tuple[str, str], jax.Array]
# (product, linear, layer) -> the result, computed when it is returned
Multiply = Callable[[str, Linear, int], Any]


class ProductRunner:
    """Runs the products of any implementation, and keeps the operands that several of them share."""

    def __init__(self, operands: Operands):
        self.operands = operands
        self._weights = {name: [jnp.array(w) for w in layers] for name, layers in operands.weights.items()}
        self._arrays: dict[tuple[str, str, tuple[int, ...], jnp.dtype], jax.Array] = {}
        # (linear's name, layer, elements) -> the memory that a gradient is written to
        self._gradients: dict[tuple[str, int, int], jax.Array] = {}

    def prepare(self, implementation: str, precision: str, rows: Rows) -> Multiply:
        """The function that computes these rows of the products by one implementation.

        NotImplementedError or RuntimeError, here or from the first product, if the implementation is not available.
        """
        if implementation == "numpy":
            return self._numpy(rows)
        if implementation == "pytorch":
            return self._pytorch(precision, rows)
        return self._jax(implementation, precision, rows)

    def _first(self, product: str, linear: Linear, rows: Rows) -> np.ndarray:
        """The operand that has the result's rows, cut to those that are made."""
        whole = self.operands.pair(product, linear)[0]
        which = rows[product, linear.name]
        if len(which) == dimensions(product, linear, self.operands.tokens)[0]:
            return whole
        return np.ascontiguousarray(whole[:, which] if product == "dw" else whole[which])

    def _each(self, rows: Rows) -> list[tuple[str, Linear]]:
        return [(product, linear) for linear in self.operands.linears for product in PRODUCTS if (product, linear.name) in rows]

    def _numpy(self, rows: Rows) -> Multiply:
        first = {(product, linear.name): self._first(product, linear, rows) for product, linear in self._each(rows)}

        def multiply(product: str, linear: Linear, layer: int) -> np.ndarray:
            a, b = first[product, linear.name], self.operands.pair(product, linear, layer)[1]
            return (a.T if product == "dw" else a) @ (b.T if product == "fwd" else b)

        return multiply

    def _pytorch(self, precision: str, rows: Rows) -> Multiply:
        try:
            import torch
        except ImportError:
            raise NotImplementedError("PyTorch is not installed: pip install -e '.[test]'") from None
        torch.set_num_threads(custom_calls.num_threads())
        dtype = torch.bfloat16 if precision == "BF16_BF16_F32" else torch.float32
        first, x = {}, {}
        for product, linear in self._each(rows):
            first[product, linear.name] = torch.from_numpy(self._first(product, linear, rows)).to(dtype)
            x[linear.name] = torch.from_numpy(self.operands.x[linear.name]).to(dtype)
        rounded: dict[tuple[str, int], torch.Tensor] = {}

        def multiply(product: str, linear: Linear, layer: int) -> torch.Tensor:
            a, key = first[product, linear.name], (linear.name, layer)
            if product == "dw":
                return (a.t() @ x[linear.name]).float()
            # Autocast rounds a weight once a step: the forward product does, and the backward one finds it.
            if product == "fwd":
                rounded[key] = torch.from_numpy(self.operands.weights[linear.name][layer]).to(dtype)
                return torch.nn.functional.linear(a, rounded[key])
            return a @ rounded[key]

        return multiply

    def _jax(self, implementation: str, precision: str, rows: Rows) -> Multiply:
        dtype = jnp.dtype("bfloat16" if precision == "BF16_BF16_F32" else "float32")

        def array(name: str, linear: Linear, values: np.ndarray) -> jax.Array:
            key = (name, linear.name, values.shape, dtype)
            if key not in self._arrays:
                self._arrays[key] = jnp.asarray(values.astype(dtype))
            return self._arrays[key]

        first, x = {}, {}
        for product, linear in self._each(rows):
            first[product, linear.name] = array(product, linear, self._first(product, linear, rows))
            x[linear.name] = array("x", linear, self.operands.x[linear.name])
        if implementation != "xla":
            return self._custom_call(implementation, precision, rows, first, x)

        def multiply(product: str, linear: Linear, layer: int) -> jax.Array:
            function = _compiled(implementation, precision, product, _out_dtype(product, linear, dtype))
            b = x[linear.name] if product == "dw" else self._weights[linear.name][layer]
            return function(first[product, linear.name], b).block_until_ready()

        return multiply

    def _custom_call(self, implementation: str, precision: str, rows: Rows, first: _First, x: dict[str, jax.Array]) -> Multiply:
        dtype = next(iter(x.values())).dtype
        elements: dict[str, int] = {}
        for product, linear in self._each(rows):
            if product == "dw":
                size = elements[linear.name] = len(rows["dw", linear.name]) * linear.inputs
                for layer in range(linear.layers):
                    if (linear.name, layer, size) not in self._gradients:
                        self._gradients[linear.name, layer, size] = jnp.zeros(size, jnp.float32)

        def multiply(product: str, linear: Linear, layer: int) -> jax.Array:
            a = first[product, linear.name]
            if product == "dw":
                key = (linear.name, layer, elements[linear.name])
                function = _compiled_into(implementation, precision)
                self._gradients[key] = function(self._gradients[key], a, x[linear.name]).block_until_ready()
                return self._gradients[key]
            function = _compiled(implementation, precision, product, _out_dtype(product, linear, dtype))
            return function(a, self._weights[linear.name][layer]).block_until_ready()

        return multiply


def _out_dtype(product: str, linear: Linear, dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of a result, as in the step: float32 for gradients of weights and for logits."""
    wide = product == "dw" or (product == "fwd" and linear.name == "wte")
    return jnp.dtype("float32") if wide else dtype


@cache
def _compiled(implementation: str, precision: str, product: str, out_dtype: jnp.dtype) -> jax.stages.Wrapped:
    def product_of(a: jax.Array, b: jax.Array) -> jax.Array:
        return matmul.matmul(
            a,
            b,
            transpose_a=product == "dw",
            transpose_b=product == "fwd",
            out_dtype=out_dtype,
            implementation=implementation,
            precision=precision,
        )

    return jax.jit(product_of)


@cache
def _compiled_into(implementation: str, precision: str) -> jax.stages.Wrapped:
    def product_into(gradient: jax.Array, dy: jax.Array, x: jax.Array) -> jax.Array:
        target = WeightView(gradient, 0, (dy.shape[1], x.shape[1]))
        return matmul.custom_call_into(target, dy, x, transpose_a=True, implementation=implementation, precision=precision)[0]

    return jax.jit(product_into, donate_argnums=(0,))


def rows_of(result: Any, rows: np.ndarray, columns: int) -> np.ndarray:
    """Rows of any implementation's result, in float64."""
    if isinstance(result, jax.Array):
        # np.asarray would make NumPy a second owner of the memory, and jax would not write to it in place any more.
        result = np.from_dlpack(result) if result.dtype == jnp.float32 else np.asarray(result)  # type: ignore[arg-type]
    if isinstance(result, np.ndarray):
        return result.reshape(-1, columns)[rows].astype(np.float64)
    return result[rows].double().numpy()
