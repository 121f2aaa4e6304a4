"""The XLA flag without which some versions of jaxlib compute wrong numbers on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from gpt2_jax import jax_compat

FLAG = "--xla_cpu_experimental_ynn_fusion_type"


@pytest.mark.parametrize(
    ("jaxlib", "before", "after"),
    [
        ((0, 10, 2), "", f"{FLAG}="),
        ((0, 12, 0, 1), "--xla_dump_to=x", f"--xla_dump_to=x {FLAG}="),
        ((0, 12, 0), f"{FLAG}=3", f"{FLAG}=3"),
        ((0, 9, 2), "", ""),
        ((0, 4, 34), "", ""),
        (None, "", ""),
    ],
)
def test_the_flag_is_set_just_for_the_jaxlibs_that_need_it(monkeypatch, jaxlib, before, after):
    monkeypatch.setenv("XLA_FLAGS", before)
    monkeypatch.setattr(jax_compat, "installed_version", lambda distribution: jaxlib)
    jax_compat.switch_off_ynnpack_fusions()
    assert os.environ["XLA_FLAGS"] == after


def test_importing_the_package_sets_it_before_jax_and_does_not_import_jax():
    program = "import os, sys, gpt2_jax; print('jax' in sys.modules, os.environ.get('XLA_FLAGS', ''))"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    output = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True).stdout
    needs_flag = jax_compat.installed_version("jaxlib") >= (0, 10, 2)
    assert output.strip() == ("False " + (f"{FLAG}=" if needs_flag else "")).strip()


def test_versions_are_read_as_numbers():
    assert jax_compat.installed_version("numpy") >= (1, 26)
    assert jax_compat.installed_version("no-such-distribution") is None
