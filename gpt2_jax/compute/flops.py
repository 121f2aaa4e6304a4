"""Floating-point operations of training, and the share of a device's peak that they reach. Imports nothing of JAX."""

from __future__ import annotations

from gpt2_jax.families.family import FamilyConfig

# Makers' figures for dense products in bfloat16 summed in float32, in FLOP/s, by jax's name of the device (V100: float16).
_PEAK_BFLOAT16 = {
    "Tesla V100-SXM2-16GB": 125e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-PCIE-80GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}


def flops_per_token(config: FamilyConfig, sequence_length: int) -> int:
    """Of one token's forward and backward pass: 6 N + 6 L C T, as llm.c counts them (N with padding and positions,
    attention causal; nanoGPT's count has 12 L C T)."""
    return 6 * config.layout.num_parameters + 6 * config.num_layers * config.channels * sequence_length


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """The device's peak in products of `dtype` (float32: TF32, half of bfloat16's); None for a device that is not known."""
    peak = _PEAK_BFLOAT16.get(device_kind)
    return None if peak is None else peak if dtype == "bfloat16" else peak / 2
