"""The plan: what is chosen and why, what is refused, and that nothing of it leaks into jax."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.compute.forward import token_losses
from gpt2_jax.compute.plan import SEAMS, make_plan
from gpt2_jax.compute.step import accumulated_gradient
from gpt2_jax.config import ComputeSettings
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import config_from_descriptor
from gpt2_jax.ops.apple.classifier import ON_MLX_ONLY
from gpt2_jax.ops.apple.plugin import ON_JAX_MPS_ONLY
from gpt2_jax.ops.cpu import library
from gpt2_jax.ops.matmul import ON_NVIDIA_ONLY
from gpt2_jax.ops.table import SWITCHED_OFF
from tests.conftest import CPU, TINY, can_alias, plan_of

needs_library = pytest.mark.skipif(not library.is_built(), reason="the library of custom calls was not built")
LOSES_BARRIERS = dataclasses.replace(CPU, lacks=CPU.lacks | {"barriers"})
KEEPS_BARRIERS = dataclasses.replace(CPU, lacks=CPU.lacks - {"barriers"})


def refusal(**settings) -> Gpt2JaxError:
    """The error of a plan that cannot be made: two lines, of which the second begins with the hint."""
    with pytest.raises(Gpt2JaxError) as raised:
        plan_of(**settings)
    lines = str(raised.value).splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("---> HINT: ")
    return raised.value


@pytest.fixture
def library_says(monkeypatch):
    """A function that says of every custom call what the library would say of it."""

    def pretend(*, available=True, reason="", precisions=("F32_F32_F32", "BF16_BF16_F32_X3"), but=()):
        def row(name):
            without = name in but
            return {
                "name": name,
                "available": available and not without,
                "reason": "this CPU has no such unit" if without else reason,
                "precisions": list(precisions),
            }

        monkeypatch.setattr(library, "implementation", row)

    return pretend


@pytest.fixture
def not_built(monkeypatch):
    def missing():
        raise NotImplementedError("lib.so was not built: it needs a C++ compiler")

    monkeypatch.setattr(library, "description", missing)


def test_a_plan_is_frozen_and_equal_to_one_of_the_same_settings():
    plan = plan_of(matmul="auto")
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.dtype = "bfloat16"
    same = plan_of(dataclasses.replace(TINY), backend=dataclasses.replace(CPU), matmul="auto")
    assert same == plan
    assert hash(same) == hash(plan)
    others = [
        plan_of(config_from_descriptor("d12"), matmul="auto"),
        plan_of(matmul="auto", dtype="bfloat16"),
        plan_of(matmul="auto", recompute="block"),
        plan_of(matmul="auto", matmul_precision="highest"),
    ]
    assert plan not in others
    assert len({plan, same, *others}) == 5


def test_an_equal_plan_is_not_compiled_again():
    traced = []

    def loss(plan, params_N):
        traced.append(plan)
        return params_N.sum() * (2.0 if plan.dtype == "float32" else 3.0)

    compiled = jax.jit(loss, static_argnums=0)
    results = [float(compiled(plan_of(dtype=dtype), jnp.ones(3))) for dtype in ("float32", "float32", "bfloat16", "float32")]
    assert results == [6, 6, 9, 6]
    assert len(traced) == 2


def test_auto_goes_on_where_an_implementation_lacks_the_precision(library_says):
    """A NotImplementedError once ended the program."""
    library_says(precisions=())
    plan = plan_of(matmul="auto")
    assert plan.linear.name == "xla"
    for name in ("amx", "threaded"):
        assert "precision" in dict(plan.linear.refusals)[name] or "F32_F32_F32" in dict(plan.linear.refusals)[name]
    assert plan.fallbacks() == [] or not library.is_built()


@pytest.mark.parametrize("matmul", ["amx", "threaded", "accelerate"])
def test_what_was_named_and_cannot_serve_is_an_error_of_two_lines(library_says, matmul):
    library_says(but=[matmul])
    error = refusal(matmul=matmul)
    assert error.problem == f"--matmul {matmul}: expected to use it, found: this CPU has no such unit"
    assert error.hint == "--matmul auto"
    library_says(precisions=())
    assert refusal(matmul=matmul).problem.startswith(f"--matmul {matmul}: expected to use it, found: ")


def test_a_name_that_is_none_lists_those_that_are():
    error = refusal(matmul="quantum")
    assert error.problem.startswith("--matmul: expected one of auto, amx, threaded, ")
    assert error.problem.endswith("found 'quantum'")


def test_an_unknown_name_in_the_environment_is_an_error_with_the_known_ones(monkeypatch):
    monkeypatch.setenv("GPT2_JAX_DISABLE", "amx, attention:nobody,simd")
    error = refusal()
    assert "found attention:nobody" in error.problem
    assert "attention:custom_call" in error.problem
    assert error.hint == "unset GPT2_JAX_DISABLE"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("tread,linear:amx", "amx,threaded"),
        ("atention:custom_call", "attention:custom_call"),
        ("adamw:customcall,embedding:gather", "adamw:custom_call,embedding:gather"),
    ],
)
def test_a_mistyped_name_in_the_environment_brings_the_one_that_was_meant(monkeypatch, typed, meant):
    monkeypatch.setenv("GPT2_JAX_DISABLE", typed)
    assert refusal().hint == f"GPT2_JAX_DISABLE={meant}   (or unset GPT2_JAX_DISABLE)"
    monkeypatch.setenv("GPT2_JAX_DISABLE", meant)
    plan_of(matmul="auto")


@needs_library
def test_a_cpu_feature_that_the_library_does_not_know_is_refused(monkeypatch):
    """It would allow none, and the run be slow without a word."""
    features = {"seen": ["avx2", "fma"], "allowed": ["fma"], "mask": "avx3, fma", "unknown": ["avx3"]}
    described = library.description() | {"cpu_features": features}
    monkeypatch.setattr(library, "description", lambda: described)
    error = refusal()
    assert error.problem == "GPT2_JAX_CPU_FEATURES: expected none, or some of avx2, fma, found avx3"
    assert error.hint == "GPT2_JAX_CPU_FEATURES=avx2,fma   (or unset GPT2_JAX_CPU_FEATURES)"
    features |= {"mask": "quick", "unknown": ["quick"]}
    assert refusal().hint == "unset GPT2_JAX_CPU_FEATURES"


@pytest.mark.parametrize("seam", SEAMS)
def test_every_implementation_but_the_reference_can_be_switched_off_alone(monkeypatch, seam):
    before = plan_of(matmul="auto")
    choice = getattr(before, seam)
    if choice.name in ("xla", "concatenate"):
        pytest.skip("the reference is what is used here")
    monkeypatch.setenv("GPT2_JAX_DISABLE", f"{seam}:{choice.name}")
    after = getattr(plan_of(matmul="auto"), seam)
    assert after.name != choice.name
    assert dict(after.refusals)[choice.name] == SWITCHED_OFF


def test_with_everything_switched_off_the_way_out_is_named(monkeypatch):
    monkeypatch.setenv("GPT2_JAX_DISABLE", ",".join(f"writer:{row.name}" for row in SEAMS["writer"]))
    error = refusal()
    assert error.problem.startswith("writer: expected an implementation that can be used, found none")
    assert error.hint == "unset GPT2_JAX_DISABLE"


def test_strict_refuses_a_library_that_was_not_built(not_built):
    assert plan_of(matmul="auto").linear.name == "xla"
    error = refusal(matmul="auto", strict=True)
    assert error.problem.startswith("--strict: expected no fallback, found linear: not ")
    assert "lib.so was not built" in error.problem


@can_alias
@needs_library
def test_strict_accepts_what_the_hardware_refuses(library_says):
    library_says(but=["amx"])
    plan = plan_of(matmul="auto", strict=True)
    assert plan.linear.name == "threaded"
    assert dict(plan.linear.refusals)["amx"] == "this CPU has no such unit"


def test_strict_refuses_a_device_that_is_here_and_not_used():
    backend = dataclasses.replace(CPU, fallback="a driver is here, but no plugin")
    assert plan_of(backend=backend).backend.fallback
    assert "a driver is here, but no plugin" in refusal(backend=backend, strict=True).problem


@pytest.mark.parametrize("recompute", ["gelu", "layernorm", "block"])
def test_recomputing_that_saves_nothing_is_a_fallback(recompute):
    (fallback,) = plan_of(backend=LOSES_BARRIERS, recompute=recompute).fallbacks()
    assert fallback.startswith("recompute: XLA for cpu keeps")
    assert "recompute" in refusal(backend=LOSES_BARRIERS, recompute=recompute, strict=True).problem
    assert plan_of(backend=KEEPS_BARRIERS, recompute=recompute, strict=True).fallbacks() == []
    assert plan_of(backend=LOSES_BARRIERS, strict=True).fallbacks() == []


@pytest.mark.parametrize("matmul", ["auto", "xla"])
def test_every_seam_and_every_refusal_is_told_once(matmul, monkeypatch):
    monkeypatch.setenv("GPT2_JAX_DISABLE", "attention:custom_call,simd")
    plan = plan_of(matmul=matmul)
    text = "\n".join(f"{name}: {value}" for name, value in plan.rows())
    named = [
        seam.strip()
        for name, value in plan.rows()
        if name == "ops"
        for seam in value.partition(" for ")[2].partition(":")[0].split(",")
    ]
    assert sorted([*named, "linear"]) == sorted(SEAMS)
    of_other_machines = {ON_NVIDIA_ONLY, ON_JAX_MPS_ONLY, ON_MLX_ONLY}
    reasons = {reason for _, choice in plan.choices() for _, reason in choice.refusals} - of_other_machines
    assert SWITCHED_OFF in reasons
    lines = text.splitlines()
    for reason in reasons:
        assert [line.endswith(f": {reason}") for line in lines if line.startswith(": not ")].count(True) == 1
    assert any(line.startswith(": not simd, attention:custom_call") for line in lines)
    assert not any(reason in text for reason in of_other_machines)


def names_of_precisions() -> list[str]:
    names = ["default", "high", "highest", "bfloat16", "tensorfloat32", "float32"]
    presets = getattr(jax.lax, "DotAlgorithmPreset", None)
    return names + [preset.name for preset in presets or () if preset.name != "DEFAULT"]


@contextlib.contextmanager
def setting_of_jax(name: str, value: object) -> Iterator[None]:
    before = getattr(jax.config, name)
    try:
        jax.config.update(name, value)
    except ValueError:
        pytest.skip(f"this jax does not know {value}")
    try:
        yield
    finally:
        jax.config.update(name, before)


@pytest.mark.parametrize("name", names_of_precisions())
def test_every_setting_of_jax_for_precision_gives_a_plan(name):
    """Some of JAX_DEFAULT_MATMUL_PRECISION's values once ended in a traceback."""
    with setting_of_jax("jax_default_matmul_precision", name):
        for dtype in ("float32", "bfloat16"):
            plan = plan_of(matmul="auto", dtype=dtype)
            assert plan.matmul_precision == name
            assert plan.describe_precision() in dict(plan.rows())["matmul"]


@pytest.mark.parametrize("name", ["tensorfloat32", "bfloat16", "float32"])
@pytest.mark.parametrize("matmul", ["auto", "xla"])
def test_the_setting_of_jax_computes(name, matmul, tiny_params, tiny_batch):
    with setting_of_jax("jax_default_matmul_precision", name):
        plan = plan_of(matmul=matmul)
        losses = jax.jit(token_losses, static_argnums=0)(plan, tiny_params, *tiny_batch)
    assert np.isfinite(losses).all()


def test_a_runs_own_precision_goes_over_jaxs():
    with setting_of_jax("jax_default_matmul_precision", "bfloat16"):
        assert plan_of(matmul_precision="highest").matmul_precision == "highest"


@pytest.mark.parametrize("name", ["jax_disable_jit", "jax_debug_nans", "jax_enable_x64"])
def test_a_switch_of_jax_that_a_run_cannot_heed_is_named(name):
    with setting_of_jax(name, True):
        error = refusal()
    assert error.problem.startswith(f"{name.upper()}: expected it to be off, found it on")
    assert error.hint == f"unset {name.upper()}"


def test_the_precision_of_a_plan_stays_its_own(tiny_params, tiny_batch):
    """A run once set it for the whole process, and all that was traced later had it."""
    before = jax.config.jax_default_matmul_precision
    x, y = (part[None] for part in tiny_batch)

    def products(precision: str) -> tuple[int, int]:
        gradient = jax.jit(accumulated_gradient, static_argnums=0)
        plan = plan_of(matmul_precision=precision)
        text = gradient.lower(plan, tiny_params, None, x, y).as_text()
        return text.count("HIGHEST, HIGHEST"), text.count("stablehlo.dot_general")

    for _ in range(2):
        highest, products_of_all = products("highest")
        assert highest == products_of_all > 20
        assert jax.config.jax_default_matmul_precision == before
        assert products("default")[0] == 0


def test_the_steps_options_for_xla_are_asked_for_on_nvidia_only():
    assert plan_of().compiler_options() == {}
    backend = dataclasses.replace(CPU, lacks=CPU.lacks - {"cuda_libraries"} | {"custom_calls"})
    assert make_plan(ComputeSettings(), backend, TINY).compiler_options()
