"""The operations of a token, and the peaks of cards that are known by any of their names."""

from __future__ import annotations

import pytest

from gpt2_jax.compute.flops import flops_per_token, peak_flops
from gpt2_jax.families.gpt2 import config_from_descriptor


def test_the_operations_of_a_token_are_llmcs():
    assert flops_per_token(config_from_descriptor("d12"), 1024) == 6 * 124_475_904 + 6 * 12 * 768 * 1024


@pytest.mark.parametrize(
    ("device_kind", "bfloat16", "tf32", "float32"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 494, 67),
        ("NVIDIA H100 SXM5", 989, 494, 67),
        ("NVIDIA H100 PCIe", 756, 378, 51),
        ("NVIDIA H100 NVL", 835, 417, 60),
        ("NVIDIA H200", 989, 494, 67),
        ("NVIDIA GH200 480GB", 989, 494, 67),
        ("NVIDIA GB200", 2500, 1250, 80),
        ("NVIDIA A100-SXM4-80GB", 312, 156, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 156, 19.5),
        ("NVIDIA A100-PCIE-40GB", 312, 156, 19.5),
        ("NVIDIA A10", 125, 62.5, 31.2),
        ("NVIDIA L4", 121, 60, 30.3),
        ("NVIDIA L40", 181, 90.5, 90.5),
        ("NVIDIA L40S", 362, 183, 91.6),
        ("NVIDIA RTX A6000", 154.8, 77.4, 38.7),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6, 82.6),
        ("NVIDIA GeForce RTX 5080", 112.6, 56.3, 56.3),
        ("NVIDIA GeForce RTX 5070 Ti", 87.9, 43.9, 43.9),
        ("NVIDIA GeForce RTX 5090", 209.5, 104.8, 104.8),
        ("NVIDIA GeForce RTX 3090", 71, 35.6, 35.6),
        ("NVIDIA GeForce RTX 3090 Ti", 80, 40, 40),
        # Cards without TF32: float32 is multiplied in float32 at any precision.
        ("Tesla V100-SXM2-16GB", 125, 15.7, 15.7),
        ("Tesla V100-PCIE-32GB", 112, 14, 14),
        ("Tesla T4", 65, 8.1, 8.1),
    ],
)
def test_the_peak_is_that_of_the_data_sheet_in_the_products_own_precision(device_kind, bfloat16, tf32, float32):
    for precision in ("default", "high"):
        assert peak_flops(device_kind, "float32", precision) == tf32 * 1e12
    assert peak_flops(device_kind, "float32", "highest") == float32 * 1e12
    for precision in ("default", "highest"):
        assert peak_flops(device_kind, "bfloat16", precision) == bfloat16 * 1e12


@pytest.mark.parametrize(
    "device_kind",
    [
        "cpu",
        "",
        "NVIDIA GeForce RTX 3080 Ti",
        # Cards whose sources disagree, or of which none was found.
        "NVIDIA A10G",
        "NVIDIA RTX 6000 Ada Generation",
        "NVIDIA GB10",
        "NVIDIA B300",
        "NVIDIA RTX PRO 6000 Blackwell Server Edition",
        # The chips of one computer each.
        "NVIDIA A100-SXM-64GB",
        "NVIDIA H100 64GB HBM2",
        "NVIDIA GeForce RTX 5090 D",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4080 SUPER",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA L400",
        "Quadro RTX 6000",
        "TPU v5 lite",
        "Apple M3",
    ],
)
def test_a_card_that_is_not_known_has_no_peak_rather_than_anothers(device_kind):
    assert peak_flops(device_kind, "float32", "default") is None


@pytest.mark.parametrize("device_kind", ["NVIDIA B200", "B200", "NVIDIA A800-SXM4-80GB", "NVIDIA H200 NVL"])
def test_a_figure_without_a_source_is_not_known(device_kind):
    assert peak_flops(device_kind, "bfloat16", "default") in (312e12, 835e12, 2250e12)
    for precision in ("default", "highest"):
        assert peak_flops(device_kind, "float32", precision) is None
