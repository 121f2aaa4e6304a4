"""How a seam chooses: the first that accepts, refusals with their reasons, names, and what GPT2_JAX_DISABLE switches off."""

from __future__ import annotations

import dataclasses

import pytest

from gpt2_jax.compute.backend import Backend
from gpt2_jax.compute.plan import SEAMS
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.ops.cpu import library
from gpt2_jax.ops.matmul import CUSTOM_CALLS, IMPLEMENTATIONS, ON_NVIDIA_ONLY
from gpt2_jax.ops.table import Fallback, Implementation, always, choose
from tests.conftest import available, can_alias, plan_of
from tests.implementations import plan_of_kind

PLAN = plan_of()
TABLE = (
    Implementation("broken", lambda plan: Fallback("not installed"), "the best"),
    Implementation("elsewhere", lambda plan: "on another device only", "the second best"),
    Implementation("measured", always, "there to be measured", only_by_name=True),
    Implementation("good", always, "good enough"),
    Implementation("behind", lambda plan: Fallback("also not installed"), "never taken"),
    Implementation("xla", always, "the reference"),
)


@pytest.fixture(autouse=True)
def everything_on(monkeypatch):
    monkeypatch.delenv("GPT2_JAX_DISABLE", raising=False)


def test_the_first_that_accepts_is_taken_and_the_others_refusals_are_kept():
    choice = choose("seam", TABLE, PLAN)
    assert (choice.name, choice.reason) == ("good", "good enough")
    assert choice.refusals == (
        ("broken", "not installed"),
        ("elsewhere", "on another device only"),
        ("behind", "also not installed"),
    )
    assert {type(reason) for _, reason in choice.refusals} == {str}


def test_only_a_fallback_in_front_of_the_chosen_one_is_one():
    """What stands behind it was not missed; a refusal of another kind cannot be mended."""
    assert choose("seam", TABLE, PLAN).fallbacks == ("seam: not broken: not installed",)
    assert choose("seam", TABLE[3:], PLAN).fallbacks == ()


def test_what_is_named_is_taken_whatever_stands_in_front_of_it():
    for name in ("measured", "good", "xla"):
        choice = choose("seam", TABLE, PLAN, name, "--flag")
        assert (choice.name, choice.reason, choice.fallbacks) == (name, f"asked for with --flag {name}", ())


def test_what_is_named_and_cannot_serve_is_an_error_with_the_reason():
    with pytest.raises(Gpt2JaxError, match="--flag elsewhere: expected to use it, found: on another device only"):
        choose("seam", TABLE, PLAN, "elsewhere", "--flag")


def test_an_unknown_name_is_refused_with_the_list():
    names = "auto, broken, elsewhere, measured, good, behind, xla"
    with pytest.raises(Gpt2JaxError, match=f"--flag: expected one of {names}, found 'magic'"):
        choose("seam", TABLE, PLAN, "magic", "--flag")
    with pytest.raises(Gpt2JaxError, match=r"--matmul: expected one of auto, amx, threaded, .*, xla, found 'magic'"):
        plan_of(matmul="magic")


def test_without_any_that_accepts_the_reasons_are_told(monkeypatch):
    monkeypatch.setenv("GPT2_JAX_DISABLE", "seam:good,seam:xla")
    with pytest.raises(Gpt2JaxError, match="seam: expected an implementation that can be used, found none: not installed; on"):
        choose("seam", TABLE, PLAN)


def test_what_is_switched_off_is_neither_chosen_nor_served_by_name(monkeypatch):
    monkeypatch.setenv("GPT2_JAX_DISABLE", " seam:good ,other:xla,")
    choice = choose("seam", TABLE, PLAN)
    assert choice.name == "xla"
    assert dict(choice.refusals)["good"] == "switched off by GPT2_JAX_DISABLE"
    # What stands between it and the next is missed too; that it was switched off itself is no fallback.
    assert choice.fallbacks == ("seam: not broken: not installed", "seam: not behind: also not installed")
    with pytest.raises(Gpt2JaxError, match=r"--matmul good: .* switched off by GPT2_JAX_DISABLE"):
        choose("seam", TABLE, PLAN, "good")


def test_custom_calls_are_switched_off_by_their_bare_names(monkeypatch):
    monkeypatch.setenv("GPT2_JAX_DISABLE", "threaded, simd,amx")
    plan = plan_of(matmul="auto")
    assert plan.linear.name == "xla"
    refusals = dict(plan.linear.refusals)
    assert refusals["simd"] == refusals["threaded"] == "switched off by GPT2_JAX_DISABLE"
    assert "naive" not in refusals or refusals["naive"] != "switched off by GPT2_JAX_DISABLE"


@can_alias
@pytest.mark.parametrize("name", available(["threaded"]))
@pytest.mark.parametrize("seam", sorted(set(SEAMS) - {"linear", "writer", "embedding"}))
def test_one_seams_custom_call_is_switched_off_alone(seam, name, monkeypatch):
    monkeypatch.setenv("GPT2_JAX_DISABLE", f"{seam}:custom_call")
    plan = plan_of(matmul=name)
    names = {name: choice.name for name, choice in plan.choices() if name not in ("linear", "writer", "embedding")}
    assert names == {name: "xla" if name == seam else "custom_call" for name in names}


def test_what_a_seam_chose_before_decides_what_a_later_one_takes(monkeypatch):
    monkeypatch.setenv("GPT2_JAX_DISABLE", "writer:in_place")
    plan = plan_of(matmul="auto")
    assert (plan.writer.name, plan.embedding.name) == ("concatenate", "xla")


@pytest.mark.parametrize("value", ["simd,tilez", "attention:simd", "magic:xla"])
def test_an_unknown_name_in_the_switch_is_an_error(value, monkeypatch):
    monkeypatch.setenv("GPT2_JAX_DISABLE", value)
    unknown = value.rpartition(",")[2]
    with pytest.raises(Gpt2JaxError, match=rf"GPT2_JAX_DISABLE: expected names of amx, threaded, .*, found {unknown}\b"):
        plan_of()


def test_every_table_ends_with_a_reference_that_is_always_there():
    for seam, table in SEAMS.items():
        # Gradients that are scattered over devices have a buffer, and so a reference, of their own.
        assert table[-1].accepts is always or seam == "writer"
        assert not any(table[-1].accepts(dataclasses.replace(plan_of(), zero=zero)) for zero in (0, 1)), seam
        assert not table[-1].only_by_name, seam
        names = [row.name for row in table]
        assert len(set(names)) == len(names), seam
        assert all(row.why or row.only_by_name for row in table), seam


def test_auto_chooses_something_for_every_seam_and_says_why():
    for seam, choice in plan_of(matmul="auto").choices():
        assert choice.name in [row.name for row in SEAMS[seam]]
        assert choice.reason


@pytest.mark.parametrize("name", CUSTOM_CALLS)
def test_custom_calls_are_refused_on_an_accelerator(name):
    accelerator = Backend("cuda", "cuda", "test", frozenset({"custom_calls"}))
    assert name in dict(plan_of(backend=accelerator, matmul="auto").linear.refusals)
    with pytest.raises(Gpt2JaxError, match="custom calls run on the CPU, not on cuda"):
        plan_of(backend=accelerator, matmul=name)


def test_on_the_cpu_what_is_for_nvidia_gpus_is_refused_and_no_fallback():
    plan = plan_of(matmul="auto")
    refusals = {(seam, name): reason for seam, choice in plan.choices() for name, reason in choice.refusals}
    for place in [("linear", "cublas"), ("norm_linear", "folded"), ("attention", "cudnn"), ("activation", "one_pass")]:
        assert refusals[place] == ON_NVIDIA_ONLY
    assert refusals["classifier", "low_precision"] == ON_NVIDIA_ONLY
    assert not plan.linear.fallbacks
    assert "cublas" not in IMPLEMENTATIONS  # --matmul does not offer it


def test_an_nvidia_gpu_takes_its_own():
    names = {seam: choice.name for seam, choice in plan_of_kind("nvidia", "bfloat16").choices()}
    assert names == {
        "linear": "cublas",
        "norm_linear": "folded",
        "attention": "xla",  # cuDNN is switched off in tests
        "activation": "one_pass",
        "writer": "update_slice",
        "classifier": "low_precision",
        "embedding": "gather",
        "adamw": "xla",
        "barrier": "xla",
    }


def test_a_missing_library_is_a_reason_not_a_crash(monkeypatch):
    def missing():
        raise NotImplementedError("it was not built")

    monkeypatch.setattr(library, "description", missing)
    plan = plan_of(matmul="auto")
    assert {choice.name for _, choice in plan.choices()} == {"xla", "concatenate"}
    assert plan.linear.fallbacks[:2] == ("linear: not amx: it was not built", "linear: not threaded: it was not built")
    with pytest.raises(Gpt2JaxError, match="it was not built"):
        plan_of(matmul="naive")
    with pytest.raises(Gpt2JaxError, match="--strict: expected no fallback, found linear: not amx: it was not built"):
        plan_of(matmul="auto", strict=True)


def test_a_plan_is_a_static_argument():
    """Equal plans are one key of jax's cache; plans that compute otherwise are not."""
    assert plan_of_kind("xla") == plan_of_kind("xla")
    assert hash(plan_of_kind("xla")) == hash(plan_of_kind("xla"))
    plans = [
        plan_of_kind("xla"),
        plan_of_kind("nvidia"),
        plan_of_kind("xla", "bfloat16"),
        plan_of_kind("xla", recompute="gelu"),
    ]
    assert len(set(plans)) == 4
