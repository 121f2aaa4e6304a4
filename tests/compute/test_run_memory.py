"""What memory a run needs where it runs; that too little of it is explained is tested by whole runs in test_trainer.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from gpt2_jax.compute.run_memory import memory_needed, needing_less
from gpt2_jax.ops.in_place import writes_in_place

from gpt2_jax.compute.backend import Backend, select_backend
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.models import gpt2 as model
from tests.conftest import change


@pytest.mark.parametrize(
    ("matmul", "lacks", "saves"),
    [
        ("xla", {"barriers"}, False),
        ("xla", set(), True),
        pytest.param(
            *("threaded", {"barriers"}, True),
            marks=pytest.mark.skipif(not writes_in_place("threaded"), reason="no library of custom calls, or an old jax"),
        ),
    ],
)
def test_memory_is_expected_to_be_saved_where_recomputing_saves_it(config, tiny_layout, matmul, lacks, saves):
    backend = Backend("cpu", "cpu", "test", frozenset(lacks))
    none, block = (
        memory_needed(change(config, compute={"recompute": level}), backend, matmul, tiny_layout).activations
        for level in ("none", "block")
    )
    assert (block < none) == saves


@pytest.mark.parametrize(
    ("sections", "lacks", "first"),
    [
        ({"data": {"batch_size": 5, "total_batch_size": 240}}, {"barriers"}, "--batch-size 1 --total-batch-size 240 "),
        ({"data": {"batch_size": 1}}, {"barriers"}, "--dtype bfloat16; or a shorter --sequence-length; or a smaller model"),
        ({"data": {"batch_size": 1}}, set(), "--recompute block; or --dtype bfloat16; or a shorter"),
        ({"data": {"batch_size": 1}, "compute": {"recompute": "block", "dtype": "bfloat16"}}, set(), "a shorter "),
    ],
)
def test_what_would_need_less_memory_is_said_where_it_would(config, sections, lacks, first):
    backend = Backend("cpu", "cpu", "test", frozenset(lacks))
    hint = "; or ".join(needing_less(change(config, **sections), backend, "xla"))
    assert hint.startswith(first)


def test_the_cpus_record_is_right_about_barriers():
    """Were it otherwise, the CPU's record would be wrong."""
    model_config = GPT2Config(max_sequence_length=64, vocab_size=203, num_layers=2, num_heads=2, channels=64)
    layout = model_config.layout

    def temporaries(recompute: str) -> int:
        def loss(params_N, x_BT):
            return model.loss(params_N, x_BT, x_BT, layout, dtype=jnp.dtype("float32"), recompute=recompute)

        shapes = jnp.zeros(layout.num_parameters), jnp.zeros((8, 64), jnp.int32)
        return jax.jit(jax.value_and_grad(loss)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    saved = 1 - temporaries("block") / temporaries("none")
    assert (saved < 0.25) == ("barriers" in select_backend("cpu").lacks)
