"""Steps with dropout and with frozen tensors: against PyTorch, and by every implementation."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.compute.forward import token_losses
from gpt2_jax.compute.plan import Plan, make_plan
from gpt2_jax.compute.step import accumulated_gradient, create_state, loss_and_gradient, make_step
from gpt2_jax.config import ComputeSettings, OptimizerSettings
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.gradient_check import compare_gradients
from gpt2_jax.interop.pytorch import make_pytorch_model, pytorch_gradients, pytorch_loss
from gpt2_jax.ops.dropout import PLACES, noise_of, noise_of_place, noise_of_step, stays
from gpt2_jax.ops.recompute import RECOMPUTED
from tests.conftest import CPU, TINY, available

RATE = 0.25
NOISE = noise_of_step(42, jnp.int32(3))
BY_ALL = pytest.mark.parametrize("matmul", available(["xla", "threaded"]))
WITHOUT_DONATION = dataclasses.replace(CPU, lacks=CPU.lacks | {"donation"})
WITHOUT_SLICES = dataclasses.replace(CPU, lacks=CPU.lacks | {"slice_updates", "donation"})


def plan_with(matmul: str = "xla", *, backend=CPU, dropout: float = 0.0, freeze: str = "", **compute) -> Plan:
    optimizer = OptimizerSettings(dropout=dropout, freeze=freeze)
    return make_plan(ComputeSettings(matmul=matmul, **compute), backend, TINY, optimizer=optimizer)


def gradient(plan: Plan, params, batch, noise=NOISE):
    zeros = jnp.zeros_like(params) if plan.writes_in_place else None
    return jax.jit(partial(loss_and_gradient, plan))(jnp.asarray(params), zeros, *batch, noise)


@pytest.mark.torch
@BY_ALL
def test_gradients_with_dropout_are_pytorchs_with_the_same_masks(tiny_params, tiny_batch, matmul, monkeypatch):
    import torch

    # Every dropout of PyTorch's model is this function, called in the order of the forward pass.
    places = iter([(0, "embedding"), *((layer, place) for layer in range(TINY.num_layers) for place in PLACES[1:])])

    def masked(x, *_, **__):
        kept = np.array(stays(RATE, tuple(x.shape), noise_of_place(NOISE, *next(places))))
        return x * torch.from_numpy(kept) / (1 - RATE)

    monkeypatch.setattr(torch.nn.functional, "dropout", masked)
    model = make_pytorch_model(TINY, tiny_params)
    _, expected = pytorch_loss(model, *tiny_batch)
    assert next(places, None) is None
    expected.backward()
    loss, grads, _ = gradient(plan_with(matmul, dropout=RATE), tiny_params, tiny_batch)
    assert abs(float(loss) - expected.item()) < 1e-5
    reference = TINY.layout.views(pytorch_gradients(model, TINY))
    compared = compare_gradients(TINY.layout.views(np.asarray(grads)), reference, TINY, "float32")
    assert all(each.passed for each in compared), compared
    without = gradient(plan_with(matmul), tiny_params, tiny_batch)
    assert abs(float(without[0]) - expected.item()) > 1e-3


@BY_ALL
def test_what_recomputes_drops_the_same(tiny_params, tiny_batch, matmul):
    found = [gradient(plan_with(matmul, dropout=RATE, recompute=level), tiny_params, tiny_batch) for level in RECOMPUTED]
    for loss, grads, _ in found[1:]:
        assert float(loss) == float(found[0][0])
        # The same operations in other fusions: roundings of the largest terms.
        np.testing.assert_allclose(grads, found[0][1], rtol=1e-5, atol=1e-7)


def test_every_step_drops_its_own(tiny_params, tiny_batch):
    plan = plan_with(dropout=RATE)
    step, state = make_step(plan, OptimizerSettings(learning_rate=0.0), 9, seed=5), create_state(plan, tiny_params)
    losses = []
    for _ in range(2):
        state, metrics = step(state, *(each[None] for each in tiny_batch))
        losses.append(float(metrics.loss))
    expected = [float(gradient(plan, tiny_params, tiny_batch, noise_of(noise_of_step(5, jnp.int32(i)), 0))[0]) for i in (0, 1)]
    assert abs(losses[0] - losses[1]) > 1e-4
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


def test_every_micro_batch_drops_its_own(tiny_params, tiny_batch):
    x, y = tiny_batch
    both = np.stack([x[:1], x[:1]]), np.stack([y[:1], y[:1]])
    plan = plan_with(dropout=RATE)
    loss, grads, _ = jax.jit(partial(accumulated_gradient, plan))(jnp.asarray(tiny_params), None, *both, NOISE)
    parts = [gradient(plan, tiny_params, (x[:1], y[:1]), noise_of(NOISE, number)) for number in (0, 1)]
    assert abs(float(parts[0][0]) - float(parts[1][0])) > 1e-4
    assert abs(float(loss) - np.mean([float(part[0]) for part in parts])) < 1e-6
    np.testing.assert_allclose(grads, (parts[0][1] + parts[1][1]) / 2, rtol=1e-5, atol=1e-7)


@BY_ALL
def test_a_model_that_is_only_used_drops_nothing(tiny_params, tiny_batch, matmul):
    found = [token_losses(plan_with(matmul, dropout=rate), jnp.asarray(tiny_params), *tiny_batch) for rate in (0.0, RATE)]
    # The dropping plan attends by the reference: a rounding or two of the losses.
    np.testing.assert_allclose(*found, rtol=1e-5)


def test_the_plan_says_who_cannot_drop():
    plan = plan_with("auto", dropout=RATE)
    assert plan.attention.name == "xla"
    if dict(plan_with("auto").attention.refusals).get("custom_call") is None:
        assert dict(plan.attention.refusals)["custom_call"] == "cannot drop attention weights (--dropout)"
        assert any("attention:" in value and "cannot drop" in value for _, value in plan.rows())
        assert plan_with("auto").attention.name == "custom_call"


def test_without_dropout_nothing_of_it_is_compiled(tiny_params, tiny_batch):
    batch = tuple(each[None] for each in tiny_batch)
    settings = OptimizerSettings()
    texts = [
        make_step(plan, settings, 9, seed=seed).lower(create_state(plan, tiny_params), *batch).as_text()
        for plan, seed in ((plan_with(), 1), (plan_with(), 2), (plan_with(dropout=RATE), 1))
    ]
    assert texts[0] == texts[1]
    assert "ui32" not in texts[0]
    assert "ui32" in texts[2]


FROZEN = ("wte", "wpe", "ln1w", "ln1b", "qkvw", "ln2w", "ln2b")


@BY_ALL
@pytest.mark.parametrize(("backend", "micro_batches"), [(WITHOUT_DONATION, 3), (WITHOUT_SLICES, 1)], ids=["slices", "joined"])
def test_frozen_tensors_stay_and_the_others_train_as_ever(tiny_params, tiny_batch, matmul, backend, micro_batches):
    """Neither update nor decay, their moments neither; the others' gradients are what they are without freezing, and the
    norm is that of these alone."""
    settings = OptimizerSettings(learning_rate=1e-2, weight_decay=0.1, gradient_clip=0.0)
    batch = [np.repeat(each[None], micro_batches, 0) for each in tiny_batch]
    results = {}
    for freeze in ("", "wte, wpe,ln[12]?,qkvw"):
        plan = plan_with(matmul, backend=backend, freeze=freeze)
        state = create_state(plan, tiny_params)
        m = np.random.default_rng(0).normal(size=tiny_params.shape).astype(np.float32)
        m[slice(*TINY.layout["wte"].padding_span)] = 0
        state = state.replace(optimizer=state.optimizer._replace(m=jnp.asarray(m), v=jnp.square(jnp.asarray(m))))
        step = make_step(plan, settings, 20)
        new, metrics = step(state, *batch)
        new, _ = step(new, *batch) if freeze else (new, metrics)  # the gradient buffer is used again
        results[freeze] = new, metrics
    assert plan.frozen == FROZEN
    (_, free_metrics), (held, metrics) = results.values()
    for before, after, name in (
        (tiny_params, held.params, "params"),
        (m, held.optimizer.m, "m"),
        (np.square(m), held.optimizer.v, "v"),
    ):
        views = TINY.layout.views(np.asarray(after))
        for tensor, of_tensor in TINY.layout.views(np.asarray(before)).items():
            assert np.array_equal(of_tensor, views[tensor]) == (tensor in FROZEN), (name, tensor)
    trained = [number for number, tensor in enumerate(TINY.layout.tensors) if tensor.name not in FROZEN]
    squares = np.asarray(metrics.squared_norms)
    np.testing.assert_allclose(squares[trained], np.asarray(free_metrics.squared_norms)[trained], rtol=1e-4)
    assert (np.delete(squares, trained) == 0).all()
    np.testing.assert_allclose(float(metrics.gradient_norm), np.sqrt(squares.sum()), rtol=1e-6)


def test_gradients_of_frozen_tensors_are_not_computed(tiny_params, tiny_batch):
    def products(freeze: str) -> int:
        plan = plan_with(freeze=freeze)
        lowered = jax.jit(partial(loss_and_gradient, plan)).lower(jnp.asarray(tiny_params), None, *tiny_batch)
        return lowered.compile().as_text().count(" dot(")

    # Of each of the four matrices in two layers one product less, and one of the classifier.
    assert products("") - products("qkvw,attprojw,fcw,fcprojw,wte") == 4 * 2 + 1


@pytest.mark.parametrize(
    ("freeze", "expected", "found", "hint"),
    [
        ("wte,qkv", "names of tensors", "'qkv'", "--freeze qkvw"),
        ("*", "a tensor that is left to train", "none", "--freeze wte,wpe"),
    ],
)
def test_names_that_freeze_nothing_or_everything_are_refused(freeze, expected, found, hint):
    with pytest.raises(Gpt2JaxError, match=rf"--freeze: expected {expected}.*found {found}") as error:
        plan_with(freeze=freeze)
    assert error.value.hint.startswith(hint)
