"""The proof without a Mac: what an Apple plugin would be given holds only what it knows, and computes the right numbers."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from gpt2_jax.buffer.adamw import BETA1, BETA2, EPSILON
from gpt2_jax.buffer.rounding import stochastically_rounded
from gpt2_jax.compute import metal_check, metal_plugins, metal_tables
from gpt2_jax.compute.backend import metal_backend
from gpt2_jax.compute.forward import make_loss_function, next_token_logits
from gpt2_jax.compute.metal_plugins import METAL_PLUGINS
from gpt2_jax.compute.step import create_state, make_step
from gpt2_jax.config import OptimizerSettings, RunConfig, format_config, load_config
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.models.initialize import initialize_parameters
from gpt2_jax.models.weights import model_config_from_settings
from tests.conftest import CPU, REPOSITORY, plan_of

JAX_METAL = metal_backend(METAL_PLUGINS[-1], "test")
STABLEHLO = metal_tables.table_of("jax-metal")["stablehlo_version"]
PRESETS = sorted((REPOSITORY / "configs").glob("*.toml"))
NAMES = ["training step", "validation loss", "losses of tokens", "next-token logits"]
# What the plugin lacks, on the CPU.
LIKE_JAX_METAL = dataclasses.replace(CPU, lacks=JAX_METAL.lacks | {"donation"})
SMALL = GPT2Config(max_sequence_length=8, vocab_size=100, num_layers=2, num_heads=2, channels=16)


def small_run(**compute):
    """A run of SMALL with two micro-batches."""
    base = RunConfig()
    return RunConfig(
        model=dataclasses.replace(base.model, init="d6", **dataclasses.asdict(SMALL)),
        data=dataclasses.replace(base.data, batch_size=2, sequence_length=8, total_batch_size=32),
        optimizer=dataclasses.replace(base.optimizer, weight_decay=0.1, warmup_steps=2),
        compute=dataclasses.replace(base.compute, **compute),
    )


@pytest.mark.parametrize("plugin", METAL_PLUGINS, ids=lambda plugin: plugin.name)
@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_holds_only_what_the_plugin_knows(preset, plugin):
    config = load_config(preset)
    model = model_config_from_settings(config.model)
    checked = list(metal_check.check_functions(config, model, metal_backend(plugin, "test")))
    assert [function.name for function in checked] == NAMES
    for function in checked:
        assert function.violations == []
        assert bool(function.portable) == (plugin.name == "jax-metal")
        # Every layer's four products are there, so this is the whole model.
        assert function.operations["stablehlo.dot_general"] >= 6 * model.num_layers
    step = checked[0].operations
    assert step["stablehlo.scatter"] == 1  # the embedding's gradient
    assert (step["stablehlo.while"] > 0) == (config.num_micro_batches > 1 and "loops" not in plugin.lacks)


@pytest.mark.parametrize(
    ("dtype", "optimizer"),
    [
        ("float32", {"schedule": "wsd"}),
        ("bfloat16", {"schedule": "linear", "master_weights": False}),
        ("bfloat16", {"schedule": "constant", "skip_loss_z": 5.0, "skip_gradient_z": 6.0}),
    ],
)
def test_what_settings_bring_holds_only_what_jax_metal_knows(dtype, optimizer):
    config = small_run(dtype=dtype)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **optimizer))
    for function in metal_check.check_functions(config, SMALL, JAX_METAL):
        assert function.violations == []
        assert function.portable


def bad_loop(x):
    return lax.fori_loop(0, 3, lambda _, y: y * 2, x)


def bad_branch(x):
    return lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x)


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (bad_loop, "stablehlo.while at test_metal_check.py"),
        (bad_branch, "stablehlo.case at test_metal_check.py"),
        (lambda x: jnp.sort(x), "stablehlo.sort at test_metal_check.py"),
        (lambda x: jnp.log1p(x), "stablehlo.log_plus_one at test_metal_check.py"),
        (lambda x: jnp.argmax(x, axis=0), "stablehlo.reduce at test_metal_check.py"),
        (lambda x: lax.population_count(x.astype(jnp.int32)), "stablehlo.popcnt at test_metal_check.py"),
        (lambda x: lax.complex(x, x).real, "element type complex<f32>"),
        (lambda x: x.astype(jnp.float8_e4m3fn), "element type f8E4M3FN"),
        (lambda x: jnp.einsum("bij,bij->b", x[None], x[None]), "stablehlo.dot_general at test_metal_check.py"),
    ],
)
def test_what_jax_metal_does_not_know_is_found_with_its_place(function, found):
    module = metal_check.lower(jax.jit(function).trace(jax.ShapeDtypeStruct((4, 6), jnp.float32)), "METAL")
    assert any(found in line for line in metal_check.violations(module, loops=False)), found


def test_a_loop_is_a_violation_only_where_the_record_says_so():
    traced = jax.jit(bad_loop).trace(jax.ShapeDtypeStruct((4, 6), jnp.float32))
    assert metal_check.violations(metal_check.lower(traced, "METAL"), loops=True) == []


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (bad_loop, "stablehlo.while at test_metal_check.py"),
        (bad_branch, "stablehlo.case at test_metal_check.py"),
        (lambda x: jnp.sort(x), "stablehlo.sort at test_metal_check.py"),
        (lambda x: jnp.argmax(x, axis=0), "stablehlo.reduce at test_metal_check.py"),
        (lambda x: x.astype(jnp.float8_e4m3fn), "element type f8E4M3FN"),
        (lambda x: jnp.dot(*[x.astype(jnp.bfloat16)[0]] * 2, preferred_element_type=jnp.float32), "its operands' type"),
    ],
)
def test_what_jax_mps_does_not_know_is_found_with_its_place(function, found):
    """A bfloat16 product declared float32 too, which the plugin would leave in bfloat16."""
    module = metal_check.lower(jax.jit(function).trace(jax.ShapeDtypeStruct((4, 6), jnp.float32)), "mps")
    assert any(found in line for line in metal_check.violations(module, loops=False, plugin="jax-mps")), found


@pytest.mark.parametrize(
    ("plugin", "function", "found"),
    [
        ("metaljax", lambda x: lax.rng_uniform(0.0, 1.0, x.shape) + x, "stablehlo.rng at test_metal_check.py"),
        ("metaljax", lambda x: lax.reduce_precision(x, 9, 2), "stablehlo.reduce_precision at test_metal_check.py"),
        ("metaljax", bad_branch, "stablehlo.case at test_metal_check.py"),
        ("metaljax", bad_loop, "stablehlo.while at test_metal_check.py"),
        ("jax-graft", lambda x: lax.rng_uniform(0.0, 1.0, x.shape) + x, "stablehlo.rng at test_metal_check.py"),
        ("jax-graft", lambda x: jnp.fft.fft(x).real, "stablehlo.fft at test_metal_check.py"),
        ("jax-graft", lambda x: lax.dot(x.astype(jnp.int8)[0], x.astype(jnp.int8)[0]), "operands of one float type"),
        ("jax-graft", lambda x: lax.complex(x, x).at[0].multiply(jnp.complex64(2)).real, "are not complex"),
        ("jax-graft", lambda x: x.astype(jnp.float8_e4m3fn), "element type f8E4M3FN"),
    ],
)
def test_what_the_other_plugins_do_not_know_is_found_with_its_place(plugin, function, found):
    platform = next(each.platform for each in METAL_PLUGINS if each.name == plugin)
    module = metal_check.lower(jax.jit(function).trace(jax.ShapeDtypeStruct((4, 6), jnp.float32)), platform)
    assert any(found in line for line in metal_check.violations(module, loops=False, plugin=plugin)), found


@pytest.mark.parametrize(
    ("plugin", "function"),
    [
        ("metaljax", lambda x: jnp.argmax(x, axis=0)),
        ("metaljax", lambda x: lax.reduce_precision(x, 8, 7)),
        ("metaljax", lambda x: lax.dot(*[x.astype(jnp.bfloat16)[0]] * 2, preferred_element_type=jnp.float32)),
        ("jax-graft", lambda x: lax.dot(*[x.astype(jnp.bfloat16)[0]] * 2, preferred_element_type=jnp.float32)),
        ("jax-graft", lambda x: x.at[jnp.array([1, 1])].add(1.0)),
        ("jax-graft", bad_branch),
    ],
)
def test_what_the_other_plugins_know_more_is_no_violation(plugin, function):
    platform = next(each.platform for each in METAL_PLUGINS if each.name == plugin)
    module = metal_check.lower(jax.jit(function).trace(jax.ShapeDtypeStruct((4, 6), jnp.float32)), platform)
    assert metal_check.violations(module, loops=True, plugin=plugin) == []


@pytest.mark.parametrize("plugin", METAL_PLUGINS, ids=lambda plugin: plugin.name)
def test_a_plugin_has_a_table_of_stablehlos_operations(plugin):
    table = metal_tables.table_of(plugin.name)
    assert table["plugin"].startswith(f"{plugin.name} ")
    known = {getattr(each, "OPERATION_NAME", "") for each in vars(stablehlo).values()}
    assert {f"stablehlo.{name}" for name in table["operations"]} <= known
    assert set(metal_check._KEEPS_LIMIT[plugin.name]) <= {name for name, limit in table["operations"].items() if limit}


@pytest.mark.parametrize(("installed", "is_newer"), [(None, False), ("0.11.1", False), ("0.11", False), ("0.11.2", True)])
def test_a_plugin_newer_than_its_table_is_said(installed, is_newer, monkeypatch):
    monkeypatch.setattr(metal_plugins, "version_text", lambda name: installed)
    said = metal_plugins.newer_than_its_table(METAL_PLUGINS[0])
    assert (said is not None) == is_newer
    assert said is None or said.startswith("jax-mps 0.11.2 is newer than the table of its operations, of 0.11.1")


@pytest.mark.parametrize(("target", "violates"), [("mps.layer_norm", False), ("gpt2_jax_matmul", True)])
def test_custom_calls_that_jax_mps_knows(target, violates):
    module = metal_check.lower(jax.jit(lambda x: x).trace(jnp.float32(0)), "mps")
    module = ir.Module.parse(CUSTOM_CALL.format(target=target), context=module.context)
    assert bool(metal_check.violations(module, loops=False, plugin="jax-mps")) == violates


GATHER = """
func.func @main(%x: tensor<3x5xf32>, %i: tensor<{indices}xi32>) -> tensor<3xf32> {{
  %0 = "stablehlo.gather"(%x, %i) <{{dimension_numbers = #stablehlo.gather<{numbers}>,
    slice_sizes = array<i64: 1, 1>}}> : (tensor<3x5xf32>, tensor<{indices}xi32>) -> tensor<3xf32>
  return %0 : tensor<3xf32>
}}"""
SCATTER = """
func.func @main(%x: tensor<5x5xf32>, %i: tensor<3x1xi32>, %u: tensor<{update}xf32>) -> tensor<5x5xf32> {{
  %0 = "stablehlo.scatter"(%x, %i, %u) <{{scatter_dimension_numbers = #stablehlo.scatter<{numbers}>}}> ({{
    ^bb0(%a: tensor<f32>, %b: tensor<f32>):
      %s = stablehlo.{body} %a, %b : tensor<f32>
      stablehlo.return %s : tensor<f32>
  }}) : (tensor<5x5xf32>, tensor<3x1xi32>, tensor<{update}xf32>) -> tensor<5x5xf32>
  return %0 : tensor<5x5xf32>
}}"""
ROWS = "update_window_dims = [1], inserted_window_dims = [0], scatter_dims_to_operand_dims = [0], index_vector_dim = 1"
COLUMNS = "update_window_dims = [0], inserted_window_dims = [1], scatter_dims_to_operand_dims = [1], index_vector_dim = 1"
CUSTOM_CALL = """
func.func @main(%x: tensor<3xf32>) -> tensor<3xf32> {{
  %0 = stablehlo.custom_call @{target}(%x) : (tensor<3xf32>) -> tensor<3xf32>
  return %0 : tensor<3xf32>
}}"""


@pytest.mark.parametrize(
    ("text", "violates"),
    [
        (
            GATHER.format(
                indices="3x2", numbers="collapsed_slice_dims = [0, 1], start_index_map = [0, 1], index_vector_dim = 1"
            ),
            False,
        ),
        (
            GATHER.format(
                indices="2x3", numbers="collapsed_slice_dims = [0, 1], start_index_map = [0, 1], index_vector_dim = 0"
            ),
            True,
        ),
        (
            GATHER.format(
                indices="3x1",
                numbers="collapsed_slice_dims = [1], operand_batching_dims = [0], start_indices_batching_dims = [0], "
                "start_index_map = [1], index_vector_dim = 1",
            ),
            True,
        ),
        (SCATTER.format(update="3x5", numbers=ROWS, body="add"), False),
        (SCATTER.format(update="5x3", numbers=COLUMNS, body="add"), True),
        (SCATTER.format(update="3x5", numbers=ROWS, body="subtract"), True),
        (CUSTOM_CALL.format(target="Sharding"), False),
        (CUSTOM_CALL.format(target="gpt2_jax_matmul"), True),
    ],
)
def test_limits_of_operations(text, violates):
    module = metal_check.lower(jax.jit(lambda x: x).trace(jnp.float32(0)), "METAL")
    module = ir.Module.parse(text, context=module.context)
    assert bool(metal_check.violations(module, loops=False)) == violates


def test_the_script_prints_what_is_recognised_and_what_is_not_and_why(tmp_path):
    """Here the plugin is not: jax's own forms of attention and LayerNorm stand for its functions."""
    path = tmp_path / "small.toml"
    path.write_text(format_config(small_run()), encoding="utf-8")
    script = [
        sys.executable,
        str(REPOSITORY / "scripts" / "check_metal.py"),
        "--config",
        str(path),
        "--plugin",
        "jax-mps",
        "--patterns",
    ]
    ended = subprocess.run(script, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "jax-mps makes faster forms of: attention" in ended.stdout
    step = ended.stdout.partition("training step")[2].partition("validation loss")[0]
    assert "functions of jax-mps: none, since jax-mps is not here" in step
    linears = 2 * 4 * SMALL.num_layers  # of two micro-batches
    assert f"product + bias: {linears} of {linears} recognised" in step
    assert f"layer norm: 0 of {2 * (2 * SMALL.num_layers + 1)} recognised" in step
    assert re.search(
        r"\d+ not, at layer_norm.py:\d+: the gain, one vector along the last dimension, is not multiplied with", step
    )
    assert re.search(r"\d+ at attention.py:\d+: its exponential is read elsewhere too", step)


def test_a_bad_step_fails_the_script(tmp_path):
    """Status 0 for the real step; 1 when the activation sorts, which jax-metal does only in one form."""
    path = tmp_path / "small.toml"
    path.write_text(format_config(small_run()), encoding="utf-8")
    script = [str(REPOSITORY / "scripts" / "check_metal.py"), "--config", str(path), "--plugin", "jax-metal"]
    program = (
        "import dataclasses, runpy, sys, gpt2_jax.ops.activation as ops, jax.numpy as jnp; {patch}; "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    for patch, status, words in (
        ("ops.TABLE", 0, "0 violations"),
        (
            "ops.TABLE = [dataclasses.replace(row, functions=ops.before_linear(jnp.sort)) for row in ops.TABLE]",
            1,
            "    stablehlo.sort at ",
        ),
    ):
        command = [sys.executable, "-c", program.format(patch=patch), *script]
        ended = subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=300)
        assert ended.returncode == status, ended.stdout + ended.stderr
        assert words in ended.stdout


def interpret(function, *arguments):
    """The result of a function lowered for jax-metal, written in its StableHLO, read back, and run by StableHLO's
    reference interpreter. Booleans come back as integers: in some versions of jaxlib they end the process."""
    if not hasattr(stablehlo, "eval_module"):
        pytest.skip("this jaxlib has no StableHLO interpreter")

    def without_booleans(*arguments):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.int32) if leaf.dtype == bool else leaf, function(*arguments))

    module = metal_check.lower(jax.jit(without_booleans).trace(*arguments), "METAL")
    with module.context:
        received = stablehlo.deserialize_portable_artifact(module.context, metal_check.portable_module(module, STABLEHLO))
        inputs = [ir.DenseElementsAttr.get(np.array(leaf, order="C")) for leaf in jax.tree.leaves(arguments)]
        outputs = [np.array(output) for output in stablehlo.eval_module(received, inputs)]
    return jax.tree.unflatten(jax.tree.structure(jax.eval_shape(function, *arguments)), outputs)


def rounding_error(dtype):
    """The expected error of a result relative to the largest of its kind. It has come through some 10 roundings a layer,
    taken as independent; in float32 those are of sums of up to V = 128 terms each, in bfloat16 they outweigh the sums."""
    num_roundings = 10 * SMALL.num_layers
    if dtype == "float32":
        return 2.0**-24 * np.sqrt(num_roundings * SMALL.padded_vocab_size)
    return 2.0**-8 * np.sqrt(num_roundings)


def parameters_of_small():
    params = initialize_parameters(SMALL)
    params += np.random.default_rng(0).normal(0, 0.02, params.shape).astype(np.float32)
    params[slice(*SMALL.layout["wte"].padding_span)] = 0
    return params


@pytest.fixture
def small_params():
    return parameters_of_small()


@pytest.mark.parametrize(("dtype", "num_steps"), [("float32", 3), ("bfloat16", 2)])
def test_the_step_for_jax_metal_trains_as_xla_on_the_cpu(small_params, dtype, num_steps):
    layout, weight_decay = SMALL.layout, 0.1
    settings = OptimizerSettings(
        schedule="cosine",
        learning_rate=1e-3,
        warmup_steps=2,
        final_learning_rate_fraction=0.1,
        weight_decay=weight_decay,
    )
    plan = plan_of(SMALL, backend=LIKE_JAX_METAL, matmul="auto", dtype=dtype)
    step, here = make_step(plan, settings, 10), create_state(plan, small_params)
    there = jax.tree.map(np.asarray, here)
    # The norm, by which every gradient is scaled, sums as many terms as there are parameters; a root halves the error.
    error = rounding_error(dtype) + 2.0**-25 * np.sqrt(layout.num_parameters)
    tokens = np.random.default_rng(1).integers(0, SMALL.vocab_size, (num_steps, 2, 2, 9)).astype(np.int32)
    for number, batch in enumerate(tokens, start=1):
        x_ABT, y_ABT = batch[..., :-1], batch[..., 1:]
        before = there.params, np.asarray(here.params)
        there, metrics_there = interpret(step, there, x_ABT, y_ABT)
        here, metrics = step(here, x_ABT, y_ABT)
        assert int(there.optimizer.step) == number
        assert bool(metrics_there.verdict.applies)
        for found, expected, factor in (
            (metrics_there.loss, metrics.loss, 1),
            (metrics_there.gradient_norm, metrics.gradient_norm, 1),
            (metrics_there.learning_rate, metrics.learning_rate, 1),
            (there.optimizer.m, here.optimizer.m, 1),
            (there.optimizer.v, here.optimizer.v, 2),  # squares have twice the relative error
            (metrics_there.squared_norms, metrics.squared_norms, 2),
        ):
            np.testing.assert_allclose(found, expected, rtol=0, atol=factor * error * np.abs(expected).max())

        # An element whose gradient is rounding noise moves by noise over noise. So the buffers may differ by what the
        # moments, compared above, make of them, and beyond that by a few roundings of the element and of its change.
        after = there.params, np.asarray(here.params)
        rate = float(metrics.learning_rate)
        changes = [rate * direction(state.optimizer, number) for state in (there, here)]
        decay = 1 - rate * weight_decay * decays(layout)
        expected = [old.astype(np.float64) * decay - change for old, change in zip(before, changes, strict=True)]
        allowed = 2.0**-24 * (4 * np.abs(after[1]) + 16 * np.abs(changes[0]) + 16 * np.abs(changes[1]))
        assert (np.abs((after[0] - after[1]) - (expected[0] - expected[1])) <= allowed).all()
        assert (after[0][slice(*layout["wte"].padding_span)] == 0).all()


def test_stochastic_rounding_for_jax_metal_gives_the_same_bits(small_params):
    layout = SMALL.layout
    seeds = np.random.default_rng(3).integers(0, 2**32, len(layout.tensors), dtype=np.uint32)

    def rounded(params, seeds):
        # The interpreter is handed signed integers.
        return stochastically_rounded(params, layout, lax.bitcast_convert_type(seeds, jnp.uint32))

    found = interpret(rounded, small_params, seeds.view(np.int32))
    np.testing.assert_array_equal(found, jax.jit(rounded)(small_params, seeds.view(np.int32)))


def direction(moments, updates_done):
    """AdamW's direction from its moments, in float64."""
    m_hat = np.asarray(moments.m, np.float64) / (1 - BETA1**updates_done)
    v_hat = np.asarray(moments.v, np.float64) / (1 - BETA2**updates_done)
    return m_hat / (np.sqrt(v_hat) + EPSILON)


def decays(layout):
    index = np.arange(layout.num_parameters)
    return sum(((index >= start) & (index < stop)).astype(np.float64) for start, stop in layout.decay_spans)


def test_validation_and_sampling_for_jax_metal_compute_as_xla_on_the_cpu(small_params):
    plan = plan_of(SMALL, backend=LIKE_JAX_METAL, matmul="auto")
    tokens = np.random.default_rng(2).integers(0, SMALL.vocab_size, (2, 9)).astype(np.int32)
    x_BT, y_BT = tokens[:, :-1], tokens[:, 1:]
    loss = make_loss_function(plan)
    found = interpret(loss, small_params, x_BT, y_BT)
    expected = float(loss(small_params, x_BT, y_BT))
    assert abs(float(found) - expected) <= rounding_error("float32") * expected

    position = np.int32(5)
    logits = partial(next_token_logits, plan)
    found = interpret(logits, small_params, x_BT[:1], position)
    expected = np.asarray(logits(small_params, x_BT[:1], position))
    np.testing.assert_allclose(found, expected, rtol=0, atol=rounding_error("float32") * np.abs(expected).max())
