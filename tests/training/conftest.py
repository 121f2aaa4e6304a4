"""What tests of whole runs and of the loop share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gpt2_jax.llmc.eval_file import MultipleChoice, write_eval_file


@pytest.fixture
def hellaswag(tmp_path: Path) -> str:
    """The path of eleven questions of 2 to 6 tokens, for TINY."""
    random = np.random.default_rng(3)
    sizes = random.integers(1, 4, (11, 5))
    parts = [[random.integers(0, 203, size).astype(np.uint16) for size in row] for row in sizes]
    write_eval_file(tmp_path / "hellaswag.bin", [MultipleChoice(i % 4, row[0], tuple(row[1:])) for i, row in enumerate(parts)])
    return str(tmp_path / "hellaswag.bin")
