"""The time that a training step's matrix products take, by every implementation in one run.

One round of an implementation is the products of a step in the step's order: forward through the layers and the
classifier, then back, dx and dw of each. So every weight is met once a round and comes from memory, not from a cache,
as in training. The rounds of all implementations alternate, and medians over them are reported.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from gpt2_jax.benchmark.machine import seconds_running
from gpt2_jax.benchmark.products import (
    IMPLEMENTATIONS,
    PEER_PRECISIONS,
    PRECISIONS,
    PRODUCTS,
    Linear,
    Multiply,
    Operands,
    ProductRunner,
    Rows,
    dimensions,
    flops,
    make_operands,
    rows_of,
)
from gpt2_jax.compute.backend import cpu_backend
from gpt2_jax.compute.plan import make_plan
from gpt2_jax.config import ComputeSettings
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.names import nearest

ERROR_ROWS = 4  # rows of a result, evenly spread, that are compared with float64
_PAUSE = 0.05  # seconds after a round: the threads of OpenMP and OpenBLAS spin for some 20 ms when their work is done
_LONGEST_ROUND = 9.0  # seconds; an implementation whose round would take longer is timed on slices of rows


# (product, linear's name, layer) -> the compared rows of a result in float64
_References = dict[tuple[str, str, int], np.ndarray]


class _OutOfTimeError(Exception):
    """A round did not end before its deadline."""


@dataclass
class Run:
    """One implementation in one precision, and what was measured of it, by product and linear layer."""

    implementation: str
    precision: str
    operands: Operands
    references: _References
    rows: Rows
    layers_a_round: int
    multiply: Multiply
    seconds: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))  # one mean a round
    errors: dict[tuple[str, str], float] = field(default_factory=dict)  # max|err| / max|ref|

    def round(self, layers: Sequence[int], *, timed: bool = True, classifier: bool = True, deadline: float = math.inf) -> None:
        """The products of a step with these layers. Results are kept until its end, as a step keeps them."""
        body, head = self.operands.linears[:-1], self.operands.linears[-1]
        forward = [("fwd", linear, layer) for layer in layers for linear in body]
        middle = [(product, head, 0) for product in PRODUCTS] if classifier else []
        backward = [(product, linear, layer) for layer in layers[::-1] for linear in body[::-1] for product in ("dx", "dw")]
        seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
        results = []
        for product, linear, layer in [*forward, *middle, *backward]:
            started = time.perf_counter()
            results.append((product, linear, layer, self.multiply(product, linear, layer)))
            seconds[product, linear.name].append(time.perf_counter() - started)
            if seconds_running() > deadline:
                raise _OutOfTimeError
        for product, linear, layer, result in results:
            if (product, linear.name) not in self.errors:
                self.errors[product, linear.name] = self._error(product, linear, layer, result)
        if timed:
            for key, values in seconds.items():
                self.seconds[key].append(statistics.mean(values))

    def _error(self, product: str, linear: Linear, layer: int, result: Any) -> float:
        compared = _compared_rows(product, linear, self.operands)
        key = (product, linear.name, layer)
        if key not in self.references:
            self.references[key] = self.operands.exact(product, linear, layer, compared)
        columns = dimensions(product, linear, self.operands.tokens)[2]
        found = rows_of(result, np.searchsorted(self.rows[product, linear.name], compared), columns)
        return float(np.abs(found - self.references[key]).max() / np.abs(self.references[key]).max())

    def is_extrapolated(self, product: str, linear: Linear) -> bool:
        """True when a part of the product's rows, or of the layers, stands for all of them."""
        rows = dimensions(product, linear, self.operands.tokens)[0]
        return len(self.rows[product, linear.name]) < rows or self.layers_a_round < linear.layers

    def median_seconds(self, product: str, linear: Linear) -> float:
        """The median over the rounds, of one whole product."""
        return self._whole(product, linear, statistics.median(self.seconds[product, linear.name]))

    @property
    def round_seconds(self) -> list[float]:
        """Seconds of all products of a step, for each round that had every one of them."""
        parts = [
            [linear.layers * self._whole(product, linear, value) for value in self.seconds[product, linear.name]]
            for product in PRODUCTS
            for linear in self.operands.linears
        ]
        return [sum(values) for values in zip(*parts, strict=False)]

    def _whole(self, product: str, linear: Linear, seconds: float) -> float:
        """The seconds of a whole product from those of the slice that was timed."""
        return seconds * dimensions(product, linear, self.operands.tokens)[0] / len(self.rows[product, linear.name])


class Refusal(NamedTuple):
    """Why an implementation was not measured, in one precision or, with None, in any."""

    implementation: str
    precision: str | None
    reason: str


def measure(
    config: GPT2Config,
    tokens: int,
    implementations: Sequence[str] = IMPLEMENTATIONS,
    *,
    rounds: int = 5,
    seconds: float | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[list[Run], list[Refusal]]:
    """Time every implementation in every precision that it offers over a step's products at this many tokens.

    `seconds` limits the whole program. Then a round has one layer instead of all, and the fastest implementations are
    timed first; those that have not ended a round by then are refused, except the first.
    """
    if unknown := sorted(set(implementations) - set(IMPLEMENTATIONS)):
        known = ", ".join(IMPLEMENTATIONS)
        instead = " ".join(dict.fromkeys(name for typed in implementations for name in nearest(typed, IMPLEMENTATIONS)))
        hint = f"--implementations {instead or 'threaded xla'}"
        raise Gpt2JaxError(f"--implementations: expected some of {known}, found {', '.join(unknown)}", hint)
    say("making the operands ...")
    operands = make_operands(config, tokens)
    runner = ProductRunner(operands)
    rates, refusals = _offered([name for name in IMPLEMENTATIONS if name in implementations], runner, config)

    quick = seconds is not None
    layers_a_round = 1 if quick else config.num_layers
    deadline = math.inf if seconds is None else seconds
    # A third of the time goes to preparing: warming up, compiling, comparing with float64.
    longest_round = _LONGEST_ROUND if seconds is None else max(0.1, (seconds - seconds_running()) / 1.5 / max(1, len(rates)))

    def layers_of(turn: int) -> list[int]:
        """The next layers for a run: others than the run before had, whose weights are in the caches."""
        first = turn if quick else 0
        return [(first + i) % config.num_layers for i in range(layers_a_round)]

    runs: list[Run] = []
    references: _References = {}
    for names in sorted(rates, key=lambda names: -sum(rates[names].values())) if quick else rates:
        implementation, precision = names
        rows = _affordable_rows(operands, rates[names], layers_a_round, longest_round)
        try:
            multiply = runner.prepare(implementation, precision, rows)
            run = Run(implementation, precision, operands, references, rows, layers_a_round, multiply)
            # The first is measured in any case.
            limit = deadline if runs else math.inf
            run.round(range(layers_a_round), timed=False, classifier=not quick, deadline=limit)
            if quick:
                run.round(layers_of(len(runs) + 1), deadline=limit)
        except _OutOfTimeError:
            refusals.append(Refusal(implementation, precision, f"the {deadline:.0f} seconds were over"))
        else:
            runs.append(run)
            say(f"{'measured' if quick else 'prepared'} {implementation} {precision}")
        time.sleep(_PAUSE)
    runs.sort(key=lambda run: list(rates).index((run.implementation, run.precision)))

    for number in range(1 if quick else 0, rounds):
        started = seconds_running()
        try:
            # Back and forth, so that no implementation always follows the same one.
            for place, run in enumerate(runs[:: -1 if number % 2 else 1]):
                run.round(layers_of(number * len(runs) + place), deadline=deadline)
                time.sleep(_PAUSE)
        except _OutOfTimeError:
            break
        say(f"round {number + 1} of {rounds} took {seconds_running() - started:.1f} s")
    return runs, refusals


_Rates = dict[str, float]  # by product, flop/s


def _offered(
    implementations: Sequence[str], runner: ProductRunner, config: GPT2Config
) -> tuple[dict[tuple[str, str], _Rates], list[Refusal]]:
    """The rates of every implementation and precision that can be had, and the refusals of the others."""
    unavailable = dict(make_plan(ComputeSettings(), cpu_backend("a bench of the CPU"), config).linear.refusals)
    rates: dict[tuple[str, str], _Rates] = {}
    refusals = []
    for implementation in implementations:
        if implementation in unavailable:
            refusals.append(Refusal(implementation, None, unavailable[implementation]))
            continue
        for precision in PEER_PRECISIONS.get(implementation, PRECISIONS):
            try:
                rates[implementation, precision] = _rates(implementation, precision, runner)
            except RuntimeError as error:
                refusals.append(Refusal(implementation, precision, _reason(error, precision)))
    return rates, refusals


def _rates(implementation: str, precision: str, runner: ProductRunner) -> _Rates:
    """Rough rates: the smallest linear layer's products on more and more rows, until one takes 5 ms."""
    operands = runner.operands
    linear = min(operands.linears, key=lambda linear: linear.outputs * linear.inputs)
    rates: _Rates = {}
    share = 1 / 8
    while len(rates) < len(PRODUCTS):
        rows = {(product, linear.name): _slice(product, linear, operands, share) for product in PRODUCTS}
        multiply = runner.prepare(implementation, precision, rows)
        for product in PRODUCTS:
            seconds = 0.0
            for _ in range(2):  # the first call compiles
                started = time.perf_counter()
                multiply(product, linear, 0)
                seconds = time.perf_counter() - started
            made = len(rows[product, linear.name]) / dimensions(product, linear, operands.tokens)[0]
            work = made * flops(product, linear, operands.tokens)
            if seconds > 0.005 or share == 1.0:
                rates.setdefault(product, work / seconds)
        share = min(1.0, 8 * share)
    return rates


def _affordable_rows(operands: Operands, rates: _Rates, layers: int, longest_round: float) -> Rows:
    """All rows of every product if a round then takes at most `longest_round` seconds, else slices that take a third of it."""
    work = {
        product: sum(min(linear.layers, layers) * flops(product, linear, operands.tokens) for linear in operands.linears)
        for product in PRODUCTS
    }
    whole = sum(work[product] / rates[product] for product in PRODUCTS) <= longest_round
    # The same time for each kind of product: their rates can differ by a factor of ten.
    shares = {product: 1.0 if whole else min(1.0, longest_round / 9 * rates[product] / work[product]) for product in PRODUCTS}
    return {
        (product, linear.name): _slice(product, linear, operands, shares[product])
        for product in PRODUCTS
        for linear in operands.linears
    }


def _slice(product: str, linear: Linear, operands: Operands, share: float) -> np.ndarray:
    """Evenly spread rows of a product, among them those that are compared with float64."""
    m = dimensions(product, linear, operands.tokens)[0]
    if share == 1.0:
        return np.arange(m)
    return np.union1d(_compared_rows(product, linear, operands), _spread(m, round(m * share)))


def _compared_rows(product: str, linear: Linear, operands: Operands) -> np.ndarray:
    return _spread(dimensions(product, linear, operands.tokens)[0], ERROR_ROWS)


def _spread(m: int, count: int) -> np.ndarray:
    return np.unique(np.linspace(0, m - 1, count).astype(np.int64))


def _reason(error: Exception, precision: str) -> str:
    """The reason that an implementation gives for its refusal. An error that is no refusal is raised again."""
    text = str(error).splitlines()[0]
    if isinstance(error, NotImplementedError):
        return text
    if not text.startswith("UNIMPLEMENTED"):
        raise error
    return text.partition(f"{precision}: ")[2] or text
