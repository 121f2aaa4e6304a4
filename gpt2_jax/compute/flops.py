"""Floating-point operations of training, and the share of a device's peak that they reach. Imports nothing of JAX."""

from __future__ import annotations

import re
from typing import NamedTuple

from gpt2_jax.families.family import FamilyConfig


class _Peaks(NamedTuple):
    """A card's dense products by its maker's data sheet, in TFLOP/s; tensor cores' without sparsity, summed in float32."""

    half: float  # of bfloat16, or of float16 on the cards before Ampere, which have no bfloat16
    tf32: float | None  # None: the card has no TF32
    float32: float


# By words of the card's name, which jax takes from the driver. Of several rows that fit, the one with the most words counts.
_PEAKS = {
    "V100 SXM2": _Peaks(125, None, 15.7),
    "V100 PCIe": _Peaks(112, None, 14),
    "V100S PCIe": _Peaks(130, None, 16.4),
    "T4": _Peaks(65, None, 8.1),
    "GeForce RTX 2080 Ti": _Peaks(53.8, None, 13.4),
    "A100": _Peaks(312, 156, 19.5),
    "A800": _Peaks(312, 156, 19.5),
    "A30": _Peaks(165, 82, 10.3),
    "A40": _Peaks(149.7, 74.8, 37.4),
    "A10": _Peaks(125, 62.5, 31.2),
    "A10G": _Peaks(70, 35, 31.5),
    "RTX A6000": _Peaks(154.8, 77.4, 38.7),
    "GeForce RTX 3090": _Peaks(71, 35.6, 35.6),
    "GeForce RTX 3090 Ti": _Peaks(80, 40, 40),
    "GeForce RTX 3080": _Peaks(59.5, 29.8, 29.8),
    "L4": _Peaks(121, 60, 30.3),
    "L40": _Peaks(181, 90.5, 90.5),
    "L40S": _Peaks(362, 183, 91.6),
    "RTX 6000 Ada": _Peaks(364.2, 182.1, 91.1),
    "GeForce RTX 4090": _Peaks(165, 82.6, 82.6),
    "GeForce RTX 4080": _Peaks(97.5, 48.7, 48.7),
    "H100": _Peaks(989, 494, 67),
    "H100 PCIe": _Peaks(756, 378, 51),
    "H100 NVL": _Peaks(835, 417, 60),
    "H800": _Peaks(989, 494, 67),
    "H800 PCIe": _Peaks(756, 378, 51),
    "H20": _Peaks(148, 74, 44),
    "H200": _Peaks(989, 494, 67),
    "H200 NVL": _Peaks(835, 417, 60),
    "GH200": _Peaks(989, 494, 67),
    "B200": _Peaks(2250, 1125, 75),
    "GB200": _Peaks(2500, 1250, 80),
    "GeForce RTX 5090": _Peaks(209.5, 104.8, 104.8),
}
# Words that make another card of a name, or a part of one (MIG), unless the row has them.
_VARIANTS = frozenset({"TI", "SUPER", "LAPTOP", "MOBILE", "MAX", "D", "MIG"})
# Names of jax's matmul precision that keep float32's products in float32; the others may be made in TF32 on a GPU.
_FULL_PRECISIONS = frozenset({"highest", "float32", "F32_F32_F32"})


def flops_per_token(config: FamilyConfig, sequence_length: int) -> int:
    """Of one token's forward and backward pass: 6 N + 6 L C T, as llm.c counts them (N with padding and positions,
    attention causal; nanoGPT's count has 12 L C T)."""
    return 6 * config.layout.num_parameters + 6 * config.num_layers * config.channels * sequence_length


def peak_flops(device_kind: str, dtype: str, precision: str) -> float | None:
    """The peak in FLOP/s of a device's products of `dtype`, 'float32' or 'bfloat16'; None for a device that is not known.

    `device_kind` is jax's name of the device, `precision` jax's matmul precision: unless it is 'highest', float32 is
    multiplied in TF32 where the card has it.
    """
    words = frozenset(re.findall(r"[A-Z0-9]+", device_kind.upper()))
    rows = {frozenset(name.upper().split()): peaks for name, peaks in _PEAKS.items()}
    fitting = [name for name in rows if name <= words]
    if not fitting:
        return None
    name = max(fitting, key=len)
    if words & _VARIANTS - name:
        return None
    peaks = rows[name]
    if dtype == "bfloat16":
        tera = peaks.half
    elif precision in _FULL_PRECISIONS or peaks.tf32 is None:
        tera = peaks.float32
    else:
        tera = peaks.tf32
    return tera * 1e12
