"""Kernels of our own for NVIDIA GPUs: each against its plain twin on a GPU, and what can be said of them without one."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.ops import activation, classifier, folded
from gpt2_jax.ops.cuda import cublas, kernels, libraries
from gpt2_jax.ops.layer_norm import layer_norm, normed
from gpt2_jax.ops.table import Fallback
from gpt2_jax.ops.threaded import Site
from tests.conftest import CPU, TINY, plan_of

BFLOAT16, FLOAT32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
ULP = 2.0**-8  # what a rounding to bfloat16 may be off by, relative
SIZES = {
    "CLASSIFIER": {"V": 50304, "TRUE_V": 50257, "SCALE": "0.5f", "THREADS": 1024},
    "LAYER_NORM": {"C": 768, "ROWS": 1000, "EPSILON": "1e-05f", "PARTS": 3, "AFFINE": 0, "THREADS": 256},
    "LAYER_NORM, AFFINE": {"C": 768, "ROWS": 1000, "EPSILON": "1e-05f", "PARTS": 1, "AFFINE": 1, "THREADS": 256},
    "FOLD": {"C": 768, "OUTPUTS": 2304, "PARTS": 3, "ACCUMULATE": 1, "CLUSTER": 1, "THREADS": 256},
}


def has_gpu() -> bool:
    try:
        return bool(jax.devices("gpu"))
    except RuntimeError:
        return False


def has_nvrtc() -> bool:
    try:
        kernels._nvrtc()
    except NotImplementedError:
        return False
    return True


on_gpu = pytest.mark.skipif(not has_gpu(), reason="no NVIDIA GPU")


@pytest.mark.skipif(not has_nvrtc(), reason="NVRTC is not installed")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("kernel", SIZES)
def test_the_kernels_compile_for_every_generation(kernel, architecture):
    constants = {kernel.split(",")[0]: "1", **{name: str(value) for name, value in SIZES[kernel].items()}}
    if "CLUSTER" in constants and architecture != "sm_80":
        constants["CLUSTER"] = "8"
    image = kernels.compile_kernels(kernels._SOURCE.read_bytes(), constants, architecture)
    assert image.startswith(b"\x7fELF")


@pytest.mark.skipif(not has_nvrtc(), reason="NVRTC is not installed")
def test_what_does_not_compile_says_why():
    with pytest.raises(RuntimeError, match=r"kernels\.cu.*error: "):
        kernels.compile_kernels(b"extern broken", {}, "sm_90")


def test_they_are_refused_with_a_reason_where_they_cannot_run(monkeypatch):
    cuda = dataclasses.replace(CPU, name="cuda", platform="cuda", lacks=frozenset({"custom_calls"}))
    assert kernels.refusal(plan_of(backend=cuda)) == "in bfloat16 only"

    def missing(*_):
        raise NotImplementedError("it is not installed")

    for refusal in (kernels.refusal, cublas.refusal):
        assert refusal(plan_of(dtype="bfloat16")) == "on NVIDIA GPUs only"
        with monkeypatch.context() as patch:
            patch.setattr(libraries, "device", missing)
            reason = refusal(plan_of(backend=cuda, dtype="bfloat16"))
            assert (reason, type(reason)) == ("it is not installed", Fallback)
            patch.setattr(libraries, "device", lambda: libraries.Device((7, 5), 49152, 40))
            assert refusal(plan_of(backend=cuda, dtype="bfloat16")) == "GPUs of compute capability 8.0 on"
            patch.setattr(libraries, "device", lambda: libraries.Device((9, 0), 232448, 132))
            patch.setattr(libraries, "find", missing)
            kernels._nvrtc.cache_clear()
            cublas._load.cache_clear()
            reason = refusal(plan_of(backend=cuda, dtype="bfloat16"))
            assert isinstance(reason, Fallback)
            assert reason in ("it is not installed", "this jax cannot alias a custom call's argument and result")


def test_a_row_that_shared_memory_cannot_hold_is_refused(monkeypatch):
    monkeypatch.setattr(kernels, "refusal", lambda plan: None)
    monkeypatch.setattr(libraries, "device", lambda: libraries.Device((8, 9), 101_376, 128))
    plan = plan_of(dtype="bfloat16")
    assert classifier._refuses_kernel(plan) is None
    large = dataclasses.replace(plan, config=dataclasses.replace(TINY, vocab_size=60_000))
    assert classifier._refuses_kernel(large) == "a row of logits has 120064 bytes, of which 100864 fit into shared memory"
    wide = dataclasses.replace(plan, config=dataclasses.replace(TINY, channels=2056, num_heads=1))
    assert folded.refuses_kernels(wide) == "rows of a multiple of 8 up to 2048 channels, not 2056"


@on_gpu
@pytest.mark.parametrize(("vocab_size", "rows"), [(50257, 300), (203, 7), (1000, 64)])
def test_the_loss_and_its_gradient_are_their_twins(vocab_size, rows):
    """Against float64 from the same logits: a float32 sum of V terms, a rounding to bfloat16."""
    config = dataclasses.replace(TINY, vocab_size=vocab_size)
    site = Site(plan_of(config, dtype="bfloat16"), ("wte",))
    generator = np.random.default_rng(0)
    V, scale = config.padded_vocab_size, 0.125
    logits = jnp.asarray(generator.normal(size=(rows, V)) * 3, BFLOAT16)
    y = jnp.asarray(generator.integers(0, vocab_size, rows), jnp.int32)
    losses, gradient = jax.jit(lambda logits, y: classifier._kernel_rows(site, logits, y, scale))(logits, y)
    wide = np.asarray(logits.astype(FLOAT32), np.float64)[:, :vocab_size]
    log_sum = np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1)) + wide.max(1)
    np.testing.assert_allclose(losses, log_sum - wide[np.arange(rows), y], rtol=0, atol=1e-5)
    expected = np.exp(wide - log_sum[:, None])
    expected[np.arange(rows), y] -= 1
    found = np.asarray(gradient.astype(FLOAT32), np.float64)
    np.testing.assert_allclose(found[:, :vocab_size], expected * scale, rtol=ULP, atol=1e-9)
    assert not found[:, vocab_size:].any()


@on_gpu
@pytest.mark.parametrize("channels", [8, 32, 768, 1024, 1280, 1600, 2048])
@pytest.mark.parametrize("parts", [1, 3])
def test_the_norm_and_its_cotangent_are_their_twins(channels, parts):
    generator = np.random.default_rng(channels)
    x, residual, *dns = (jnp.asarray(generator.normal(size=(3, 1237, channels)) * 2 + 0.3, BFLOAT16) for _ in range(2 + parts))
    dns = [dn.reshape(-1, channels) for dn in dns]
    n, rstd = jax.jit(folded._kernel_normalize)(x)
    twin, twin_rstd = normed(x)
    np.testing.assert_allclose(rstd, twin_rstd, rtol=1e-5)
    np.testing.assert_allclose(n.astype(FLOAT32), twin, rtol=ULP, atol=1e-6)
    dx, sums = dataclasses.astuple(jax.jit(folded._kernel_dx)(n, rstd, dns, residual))
    n, d = (np.asarray(array, np.float64) for array in (n.astype(FLOAT32), sum(dn.astype(FLOAT32) for dn in dns)))
    d = d.reshape(n.shape)
    expected = (d - d.mean(-1, keepdims=True) - n * (d * n).mean(-1, keepdims=True)) * np.asarray(rstd, np.float64)
    expected += np.asarray(residual.astype(FLOAT32), np.float64)
    np.testing.assert_allclose(dx.astype(FLOAT32), expected, rtol=ULP, atol=1e-5 * np.abs(expected).max())
    rows = np.asarray(dx.astype(FLOAT32), np.float64).reshape(-1, channels)
    np.testing.assert_array_less(np.abs(sums - rows.sum(0)), len(rows) * 2.0**-24 * np.abs(rows).sum(0) + 1e-30)


def sums_of_products(a, b):
    """Column sums of a * b in float64, and by how much a float32 sum of float32 products may be off."""
    terms = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    return terms.sum(0), len(terms) * 2.0**-24 * np.abs(terms).sum(0) + 1e-30


@on_gpu
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("channels", [16, 48, 768, 1600])
@pytest.mark.parametrize(("norm_name", "name", "parts"), [("ln1", "qkv", 3), ("ln2", "fc", 1)])
def test_folding_and_its_gradients_are_their_twins(norm_name, name, parts, channels, accumulate):
    config = dataclasses.replace(TINY, channels=channels, num_heads=2)
    plan = plan_of(config, dtype="bfloat16")
    names = (norm_name + "w", norm_name + "b", name + "w", name + "b")
    site = Site(plan, names, layer=1, parts=parts, accumulate=accumulate)
    generator = np.random.default_rng(channels)
    flat_N, before_N = (jnp.asarray(generator.normal(size=plan.layout.num_parameters), FLOAT32) for _ in range(2))
    gain, shift, weight, _ = (np.asarray(site.view(flat_N, each).array()) for each in names)
    weights = jax.jit(lambda flat_N: folded._kernel_fold(site, flat_N, BFLOAT16))(flat_N)
    twin = jax.jit(lambda flat_N: folded._xla_fold(site, flat_N, BFLOAT16))(flat_N)
    for (w, b), (twin_w, twin_b) in zip(weights, twin, strict=True):
        np.testing.assert_array_equal(w.astype(FLOAT32), twin_w.astype(FLOAT32))
        # A float32 sum of C terms may fall on the other side of a boundary of bfloat16.
        np.testing.assert_allclose(b.astype(FLOAT32), twin_b.astype(FLOAT32), rtol=2 * ULP, atol=1e-4)
    gradients = [
        (jnp.asarray(generator.normal(size=w.shape), BFLOAT16), jnp.asarray(generator.normal(size=b.shape), FLOAT32))
        for w, b in weights
    ]
    after_N, slots = jax.jit(partial(folded._kernel_unfold, site))(flat_N, before_N, gradients)
    dfolded = np.concatenate([np.asarray(dw.astype(FLOAT32)) for dw, _ in gradients])
    db = np.concatenate([np.asarray(each) for _, each in gradients])
    expected = np.array(before_N)
    tensor = plan.layout[names[2]]
    place = slice(tensor.layer_offset(1), tensor.layer_offset(1) + weight.size)
    dw = dfolded * gain + db[:, None] * shift
    expected[place] = dw.reshape(-1) + (expected[place] if accumulate else 0)
    scale = np.abs(dfolded * gain) + np.abs(db[:, None] * shift) + np.abs(expected[place].reshape(dw.shape))
    bound = np.zeros_like(expected)
    bound[place] = (4 * 2.0**-24 * scale).reshape(-1)
    np.testing.assert_array_less(np.abs(after_N - expected), bound + 1e-30)
    for each, factor in ((names[0], dfolded), (names[1], np.broadcast_to(db[:, None], weight.shape))):
        total, off = sums_of_products(factor, weight)
        np.testing.assert_array_less(np.abs(slots[each] - total), off)
    np.testing.assert_array_equal(slots[names[3]], db)


@on_gpu
@pytest.mark.parametrize("channels", [16, 768, 2048])
def test_the_last_norm_and_its_gradients_are_their_twins(channels):
    config = dataclasses.replace(TINY, channels=channels, num_heads=2)
    plan = plan_of(config, dtype="bfloat16")
    site = Site(plan, ("lnfw", "lnfb"))
    generator = np.random.default_rng(channels)
    flat_N = jnp.asarray(generator.normal(size=plan.layout.num_parameters), FLOAT32)
    x, dresidual, dh = (jnp.asarray(generator.normal(size=(3, 1237, channels)) * 2 + 0.3, BFLOAT16) for _ in range(3))
    gain, shift = (np.asarray(site.view(flat_N, name).array(), np.float64) for name in site.names)
    (same, h), (n, rstd) = jax.jit(partial(folded._kernel_forward, site))(x, flat_N)
    np.testing.assert_array_equal(same.astype(FLOAT32), x.astype(FLOAT32))
    twin = layer_norm(x.astype(FLOAT32), jnp.asarray(gain, FLOAT32), jnp.asarray(shift, FLOAT32))
    np.testing.assert_allclose(h.astype(FLOAT32), twin, rtol=ULP, atol=1e-5)
    dx, _, slots = jax.jit(partial(folded._kernel_backward, site))(
        (normed, rstd), flat_N, (dresidual, dh), jnp.zeros_like(flat_N)
    )
    n, dy = (np.asarray(each.astype(FLOAT32), np.float64) for each in (n, dh))
    d = dy * gain
    expected = (d - d.mean(-1, keepdims=True) - n * (d * n).mean(-1, keepdims=True)) * np.asarray(rstd, np.float64)
    expected += np.asarray(dresidual.astype(FLOAT32), np.float64)
    np.testing.assert_allclose(dx.value.astype(FLOAT32), expected, rtol=ULP, atol=1e-5 * np.abs(expected).max())
    rows = [np.reshape(each, (-1, channels)) for each in (dy, n, dx.value.astype(FLOAT32), np.ones_like(n))]
    for found, a, b in ((slots["lnfw"], 0, 1), (slots["lnfb"], 0, 3), (dx.sums, 2, 3)):
        total, off = sums_of_products(rows[a], rows[b])
        np.testing.assert_array_less(np.abs(found - total), off)


@on_gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1024, 768, 3072), (37, 8, 32), (300, 1600, 6400)])
def test_the_product_with_gelus_derivative_is_its_twin(rows, outputs, inputs, deterministic):
    """Against float64: a float32 sum of O products, times a slope, rounded to bfloat16 once or twice.

    cuBLASLt takes the GPU's own tanh, which is off by 2**-11. The slope has x times 1 - tanh² times what tanh's argument
    grows by, and does not shrink with 1 - tanh² where tanh itself is off.
    """
    generator = np.random.default_rng(rows)
    dy, w, x = (jnp.asarray(generator.normal(size=s), BFLOAT16) for s in ((rows, outputs), (outputs, inputs), (rows, inputs)))
    found = jax.jit(partial(cublas.gelu_backward, plan_of(dtype="bfloat16", deterministic=deterministic)))(dy, w, x)
    dy, w, x = (np.asarray(each.astype(FLOAT32), np.float64) for each in (dy, w, x))
    _, pull_back = jax.vjp(activation.gelu, jnp.asarray(x, FLOAT32))
    slope = np.asarray(pull_back(jnp.ones_like(x, FLOAT32))[0], np.float64)
    of_tanh = 2.0**-11 * (0.5 + np.abs(x) * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x * x))
    bound = (2 * ULP * np.abs(slope) + outputs * 2.0**-24 + of_tanh) * (np.abs(dy) @ np.abs(w))
    np.testing.assert_array_less(np.abs(found.astype(FLOAT32) - (dy @ w) * slope), bound)
