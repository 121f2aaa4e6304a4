"""Names that do not exist bring the ones that were meant."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_jax.names import near, nearest, nearest_path


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("trian", ["train", "generate"], ["train"]),
        ("JAX_MPS", ["metaljax", "jax-mps"], ["jax-mps"]),
        ("model_500.bin", ["model_00001500.bin", "model_00000500.bin", "model_00005000.bin"], ["model_00000500.bin"]),
        ("d13", ["d6", "d12", "d36", "d130"], ["d12"]),
        ("gpt2_123M.bin", ["gpt2_345M.bin", "gpt2_124M.bin"], ["gpt2_124M.bin"]),
        ("zzz", ["train", "generate"], []),
        ("", ["train"], []),
        ("train", [], []),
    ],
)
def test_the_nearest_name(name, known, expected):
    assert nearest(name, known) == expected
    assert nearest(name, reversed(known)) == expected


@given(st.text(), st.lists(st.text()), st.integers(1, 4))
def test_the_nearest_are_known_ones_and_a_known_one_is_its_own(name, known, count):
    found = nearest(name, known, count=count)
    assert len(found) <= count
    assert set(found) <= set(known)
    assert nearest(name, [name]) == [name]


def test_every_part_of_a_path_may_be_mistyped(tmp_path, monkeypatch):
    (tmp_path / "data" / "fineweb10B").mkdir(parents=True)
    for number in (1, 2, 30):
        (tmp_path / "data" / "fineweb10B" / f"fineweb_train_{number:06d}.bin").touch()
    monkeypatch.chdir(tmp_path)
    assert str(nearest_path("dta/finweb10B/fineweb_train_3.bin")) == "data/fineweb10B/fineweb_train_000002.bin"
    assert nearest_path("data/fineweb10B/fineweb_train_000001.bin") is None
    assert nearest_path("data/nothing/alike") is None
    assert near("dat/fineweb10B/fineweb_trian_000001.bin") == (
        "; there is fineweb_train_000001.bin and fineweb_train_000002.bin and fineweb_train_000030.bin in data/fineweb10B"
    )
    assert near("dat/nothing.bin") == "; there is data"  # the folder that is missing, where no file is alike
    assert near(tmp_path / "dat") == f"; there is data in {tmp_path}"
    assert near("x" * 300) == near("a\0b") == near("") == near("/") == ""
