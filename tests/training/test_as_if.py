"""The dry run for a Mac that is not here."""

from __future__ import annotations

import dataclasses

import pytest

from gpt2_jax import jax_compat
from gpt2_jax.config import RunConfig
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.training.as_if import print_as_if, read_machine

BASE = RunConfig()
DRY = dataclasses.replace(
    BASE,
    run=dataclasses.replace(BASE.run, dry_run=True),
    compute=dataclasses.replace(BASE.compute, backend="metal"),
)


def test_gpt2_124m_with_jax_mps_and_with_jax_metal(capsys):
    """jax-metal keeps scores and logits, so its batches are smaller."""
    batches = []
    for plugin in ("jax-mps", "jax-metal"):
        print_as_if(DRY, f"{plugin}, 16 GB")
        words = " ".join(capsys.readouterr().out.split())
        assert "of 16 GB" in words
        assert all(f"largest batch, {size} GB" in words for size in (8, 16, 24, 36))
        batches.append(int(words.partition("largest batch, 16 GB --batch-size ")[2].split()[0]))
    assert batches[0] > batches[1] > 4


@pytest.mark.parametrize("text", ["", "jax-mps", "jax-mps 16 GB", "jax-mps, 0 GB", "mlx, 16 GB", "jax-mps, 16 MB"])
def test_another_machine_is_refused(text):
    with pytest.raises(Gpt2JaxError, match="--as-if: expected one of jax-mps"):
        read_machine(text)


@pytest.mark.parametrize(
    "config", [dataclasses.replace(DRY, run=BASE.run), dataclasses.replace(DRY, compute=BASE.compute)], ids=["runs", "cpu"]
)
def test_it_is_a_dry_run_on_metal_only(config):
    with pytest.raises(Gpt2JaxError, match="--as-if: expected"):
        print_as_if(config, "jax-mps, 16 GB")


@pytest.mark.skipif(not jax_compat.serves_several_devices(), reason="this jax does not serve several devices")
def test_gpus_by_stage_and_number(capsys):
    """GPT-2 1558M: whole on each GPU it needs 16 bytes a parameter, with stage 3 on 8 a fraction."""
    config = dataclasses.replace(
        DRY,
        model=dataclasses.replace(BASE.model, init="d48"),
        data=dataclasses.replace(BASE.data, batch_size=4),
        compute=dataclasses.replace(BASE.compute, backend="cuda", dtype="bfloat16"),
    )
    print_as_if(config, "8 GPUs, 40 GB")
    lines = {line.partition("  ")[0].strip(): line for line in map(str.strip, capsys.readouterr().out.splitlines())}
    assert lines["GB on each of"].split()[4:8] == ["1", "2", "4", "8"]
    needed = {stage: [float(cell.rstrip("*")) for cell in lines[f"with --zero {stage}"].split()[3:]] for stage in range(4)}
    assert all(row[0] == needed[0][0] for row in needed.values())
    assert needed[0][0] > 16 * 1.557
    assert needed[3] == sorted(needed[3], reverse=True)
    for before, after in zip(needed.values(), list(needed.values())[1:], strict=False):
        assert all(one >= other for one, other in zip(before[1:], after[1:], strict=True))
    assert "--batch-size" in lines["largest batch, --zero 3"]
