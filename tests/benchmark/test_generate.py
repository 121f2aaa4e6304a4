"""bench_generate: the bound by hand, what is left out and what fails, and one small run with every process."""

from __future__ import annotations

import dataclasses
import json

import pytest

from gpt2_jax.benchmark import generate
from gpt2_jax.benchmark.generate import Workload, bench_generate, check_workload
from gpt2_jax.benchmark.generate_system import COPIED_BYTES, COPY
from gpt2_jax.errors import Gpt2JaxError
from tests.conftest import TINY

WORK = Workload("tiny", TINY, "cpu", "float32", batch_size=2, length=16, tokens=4)


def test_the_bytes_of_a_token_by_hand():
    C, layers, padded_vocabulary = 32, 2, 256
    weights = layers * (3 * C * C + C * C + 4 * C * C + 4 * C * C) + padded_vocabulary * C
    # Keys and values of 14 positions, the mean of those at the four timed tokens, of both texts.
    assert WORK.bytes_of_token() == {"weights": 4 * weights, "cache": 4 * 2 * layers * C * 14 * 2}
    half = dataclasses.replace(WORK, dtype="bfloat16").bytes_of_token()
    assert {name: 2 * number for name, number in half.items()} == WORK.bytes_of_token()


def test_the_bound_by_hand():
    record = generate._record(WORK, {COPY: [0.25, 0.5, 0.5], "gpt2_jax": [0.1, 0.2, 0.4]}, {"transformers": "not here"})
    rate = 2 * COPIED_BYTES / 0.5
    assert record["bound"]["copy_gigabytes_per_second"] == pytest.approx(rate / 1e9)
    assert record["bound"]["tokens_per_second"] == pytest.approx(2 * rate / sum(WORK.bytes_of_token().values()))
    row = record["systems"]["gpt2_jax"]
    assert (row["tokens_per_second"], row["rounds"]) == (10, [20, 10, 5])
    assert row["share_of_bound"] == pytest.approx(10 / record["bound"]["tokens_per_second"])
    assert record["left_out"] == {"transformers": "not here"}
    assert any("bound" in line for line in generate._table(record))
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 17}, "--length: expected 3 to 16, found 17"),
        ({"tokens": 15}, "--tokens: expected 1 to 14, found 15"),
        ({"batch_size": 0}, "--batch-size: expected 1 to 1024, found 0"),
    ],
)
def test_work_that_no_system_can_do(change, message):
    with pytest.raises(Gpt2JaxError, match=message):
        check_workload(dataclasses.replace(WORK, **change))


def test_a_run_in_processes_of_their_own(monkeypatch):
    """transformers' is measured by hand: torch takes long to load. A system that cannot be started is a failure, and said."""
    monkeypatch.setattr(generate, "SYSTEMS", ("gpt2_jax", "no_such_system"))
    said: list[str] = []
    assert not bench_generate(WORK, 2, said.append)
    record = json.loads(said[-1])
    assert set(record["systems"]) == {"gpt2_jax"}
    assert len(record["systems"]["gpt2_jax"]["rounds"]) == 2
    assert record["systems"]["gpt2_jax"]["share_of_bound"] > 0
    assert record["left_out"]["no_such_system"].startswith("it failed: KeyError")
    assert (record["bench"], record["model_name"], record["length"]) == ("generate", "tiny", 16)
