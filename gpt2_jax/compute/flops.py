"""Floating-point operations of training, and the share of a device's peak that they reach. Imports nothing of JAX."""

from __future__ import annotations

import re
from typing import NamedTuple

from gpt2_jax.families.family import FamilyConfig


class _Peaks(NamedTuple):
    """Dense products of a card in TFLOP/s, without sparsity and summed in float32. None: its maker's figures are not known."""

    half: float  # bfloat16; float16 on the cards before Ampere, which have no bfloat16
    default: float | None  # float32 at jax's default precision: TF32, or float32 on the cards before Ampere
    float32: float | None  # float32 at the highest precision


# By words of the card's name, which jax takes from the driver. Of several rows that fit, the one with the most words counts.
# A figure stands here when it was found in its source; a card whose sources disagree is left out. Data sheets since Ampere
# print figures with sparsity, which are halved here.
_PEAKS = {
    # NVIDIA V100 data sheet
    "V100 SXM2": _Peaks(125, 15.7, 15.7),
    "V100 PCIe": _Peaks(112, 14, 14),
    "V100S PCIe": _Peaks(130, 16.4, 16.4),
    # NVIDIA T4 data sheet
    "T4": _Peaks(65, 8.1, 8.1),
    # NVIDIA A100 architecture white paper, table 4; the A800 has the same chip
    "A100": _Peaks(312, 156, 19.5),
    "A800": _Peaks(312, None, None),
    # NVIDIA A30, A40 and A10 data sheets; GA102 white paper, table 3
    "A30": _Peaks(165, 82, 10.3),
    "A40": _Peaks(149.7, 74.8, 37.4),
    "A10": _Peaks(125, 62.5, 31.2),
    "RTX A6000": _Peaks(154.8, 77.4, 38.7),
    # NVIDIA L4, L40 and L40S data sheets
    "L4": _Peaks(121, 60, 30.3),
    "L40": _Peaks(181, 90.5, 90.5),
    "L40S": _Peaks(362, 183, 91.6),
    # GA102, Ada and RTX Blackwell white papers; on GeForce cards TF32 and float32 have half of bfloat16's rate
    "GeForce RTX 3090": _Peaks(71, 35.6, 35.6),
    "GeForce RTX 3090 Ti": _Peaks(80, 40, 40),
    "GeForce RTX 4080": _Peaks(97.5, 48.7, 48.7),
    "GeForce RTX 4090": _Peaks(165.2, 82.6, 82.6),
    "GeForce RTX 5070": _Peaks(61.7, 30.9, 30.9),
    "GeForce RTX 5070 Ti": _Peaks(87.9, 43.9, 43.9),
    "GeForce RTX 5080": _Peaks(112.6, 56.3, 56.3),
    "GeForce RTX 5090": _Peaks(209.5, 104.8, 104.8),
    # NVIDIA H100, H200 and H20 data sheets; the GH200's GPU is the H100 SXM's
    "H100": _Peaks(989, 494, 67),
    "H100 PCIe": _Peaks(756, 378, 51),
    "H100 NVL": _Peaks(835, 417, 60),
    "H20": _Peaks(148, 74, 44),
    "H200": _Peaks(989, 494, 67),
    "H200 NVL": _Peaks(835, None, None),
    "GH200": _Peaks(989, 494, 67),
    # NVIDIA HGX B200 data sheet, whose editions differ in TF32 and float32; NVIDIA GB200 NVL72 data sheet
    "B200": _Peaks(2250, None, None),
    "GB200": _Peaks(2500, 1250, 80),
}
# Words that make another card of a name, or a part of one (MIG), unless the row has them. 64 GB: A100 and H100 chips that
# were made for one computer each, with other peaks.
_VARIANTS = frozenset({"TI", "SUPER", "LAPTOP", "MOBILE", "MAX", "D", "MIG", "64GB"})
# Names of jax's matmul precision that keep float32's products in float32; the others may be made in TF32 on a GPU.
_FULL_PRECISIONS = frozenset({"highest", "float32", "F32_F32_F32"})


def flops_per_token(config: FamilyConfig, sequence_length: int) -> int:
    """Operations of one token's forward and backward pass: 6 N + 6 L C T, as llm.c counts them. N includes the padded
    vocabulary and the positions; attention is causal (nanoGPT counts 12 L C T)."""
    return 6 * config.layout.num_parameters + 6 * config.num_layers * config.channels * sequence_length


def peak_flops(device_kind: str, dtype: str, precision: str) -> float | None:
    """The peak in FLOP/s of a device's products of `dtype`, 'float32' or 'bfloat16'; None where it is not known.

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
        tera: float | None = peaks.half
    else:
        tera = peaks.float32 if precision in _FULL_PRECISIONS else peaks.default
    return None if tera is None else tera * 1e12
