"""XLA's options for NVIDIA GPUs that a compiled step is given, each with the measurement that it rests on."""

from __future__ import annotations

# name, value, what it gains: GPT-2 124M in bfloat16 on an H100, jax 0.11.2.
COMPILER_OPTIONS: tuple[tuple[str, bool | int, str], ...] = (
    ("xla_gpu_enable_triton_gemm", False, "bias, GELU and residual fuse into cuBLAS's products: -3 of 121 ms at B=64"),
    ("xla_gpu_dot_merger_threshold_mb", 0, "q, k and v stay three products, nothing is split or joined: -0.8 of 33 ms at B=16"),
)
# For --deterministic, in addition. Two runs of 30 steps with caches of their own end in the same file.
DETERMINISTIC_OPTIONS: tuple[tuple[str, bool | int, str], ...] = (
    ("xla_gpu_exclude_nondeterministic_ops", True, "no sums by atomic additions; cuDNN's other backward pass"),
    ("xla_gpu_autotune_level", 0, "cuBLAS's own choice of a kernel, not the one that was fastest this time"),
)
DETERMINISTIC_COST = "7 to 9 % slower (GPT-2 124M on an H100: 30.9 to 32.9 ms at B=16, 110.7 to 120.9 at B=64)"
