"""README tells the truth: its flags, its file tree, its Python, its commands."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt2_jax.benchmark import swift
from gpt2_jax.benchmark.matmul import _work_of_step
from gpt2_jax.compute.metal_plugins import METAL_PLUGINS
from gpt2_jax.compute.metal_tables import table_of
from gpt2_jax.config import RunConfig, format_config
from gpt2_jax.families.gpt2 import config_from_descriptor
from gpt2_jax.llmc.token_shard import write_token_shard
from tests.conftest import REPOSITORY
from tests.test_config import FLAGS

APPLE = (REPOSITORY / "docs" / "apple.md").read_text(encoding="utf-8")
FROZEN = json.loads((REPOSITORY / "tests" / "commands" / "flags.json").read_text(encoding="utf-8"))
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
TREE = re.search(r"## Files\n\n```\n(.*?)```", README, re.DOTALL)[1]


def flags_of_script(script: str) -> set[str]:
    """The frozen flags of the command that a script is the front of."""
    command = re.search(r'run\("([\w-]+)"\)', (REPOSITORY / "scripts" / script).read_text(encoding="utf-8"))[1]
    return FLAGS if command == "train" else {"--" + name.replace("_", "-") for name in FROZEN[command]}


def test_the_first_screen_has_both_commands():
    first_screen = "\n".join(README.splitlines()[:25])
    assert "make train" in first_screen
    assert "make test" in first_screen


def test_every_flag_of_train_is_in_the_table():
    settings = README.partition("## Settings")[2].partition("## Formats")[0]
    assert [flag for flag in sorted(FLAGS) if flag not in settings] == []


def test_every_path_of_the_tree_exists():
    paths = [line.split()[0] for line in TREE.splitlines() if line[0] != " "]
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []


def test_every_module_preset_and_script_is_in_the_tree():
    for path in (REPOSITORY / "gpt2_jax").glob("*.py"):
        assert path.name in ("__init__.py", "__main__.py") or f"gpt2_jax/{path.name} " in TREE
    for folder in ("llmc", "interop", "benchmark"):
        for path in (REPOSITORY / "gpt2_jax" / folder).glob("*.py"):
            assert path.name == "__init__.py" or re.search(rf"\b{path.stem}\b", TREE), path
    for path in (REPOSITORY / "configs").glob("*.toml"):
        assert f"configs/{path.name} " in TREE
    scripts = TREE.partition("\nscripts/")[2].partition("\ntests/")[0]
    for path in (REPOSITORY / "scripts").glob("*.py"):
        assert re.search(rf"\b{path.stem}\b", scripts), path


def test_the_python_runs(tmp_path: Path):
    program = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[1]
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith("(2, 192, 64)\n")
    assert (tmp_path / "model.bin").stat().st_size > 1024


def test_the_python_of_the_door_runs(tiny_english_run):
    """Over a run that takes no five minutes in place of the demo."""
    folder, config = tiny_english_run
    program = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    assert program.count('"demo"') == 1
    program = program.replace('"demo"', repr(str(config)))
    ended = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert 0.1 < float(ended.stdout.splitlines()[-1]) < 100


@pytest.fixture
def tiny_english_run(tmp_path: Path) -> tuple[Path, Path]:
    """A folder, and in it settings of a run of one step with GPT-2's vocabulary."""
    write_token_shard(tmp_path / "a_train.bin", np.arange(200))
    write_token_shard(tmp_path / "a_val.bin", np.arange(100))
    base = RunConfig()
    sizes = {"num_layers": 1, "num_heads": 1, "channels": 8, "max_sequence_length": 32}
    config = dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, **sizes),
        data=dataclasses.replace(base.data, train="a_train.bin", batch_size=1, sequence_length=16),
        evaluation=dataclasses.replace(base.evaluation, validation_batches=1, sample_every=0),
        run=dataclasses.replace(base.run, steps=1),
        compute=dataclasses.replace(base.compute, backend="cpu"),
    )
    (tmp_path / "mine.toml").write_text(format_config(config))
    return tmp_path, tmp_path / "mine.toml"


def test_every_command_names_a_script_and_flags_that_exist():
    commands = re.findall(r"python scripts/(\w+\.py)([^`\n]*)", README)
    assert len(commands) > 8
    for script, arguments in commands:
        for flag in re.findall(r"--[a-z-]+", arguments):
            assert flag in flags_of_script(script), (script, flag)


def test_the_guide_for_macs_has_every_plugin_as_the_code_has_it():
    rows = [line.split(" | ") for line in APPLE.splitlines() if line.startswith("| ") and "pip install" in line]
    assert [row[0].split()[1] for row in rows] == [plugin.name for plugin in METAL_PLUGINS]
    for row, plugin in zip(rows, METAL_PLUGINS, strict=True):
        assert f"`{plugin.platform}`" == row[1]
        assert row[2] == ".".join(map(str, plugin.oldest_macos)).removesuffix(".0")


def test_the_guide_for_macs_names_commands_that_exist():
    for script, arguments in re.findall(r"python scripts/(\w+\.py)([^`\n#]*)", APPLE):
        for flag in re.findall(r"--[a-z-]+", arguments):
            assert flag in flags_of_script(script), (script, flag)
    for flag in re.findall(r"`(--[a-z-]+)", APPLE):
        assert flag in FLAGS


def test_the_guide_for_macs_has_the_published_figures_as_the_bench_prints_them():
    work = _work_of_step(config_from_descriptor(swift.MODEL), swift.TOKENS)
    assert "\n".join(swift.ladder([], work)) in APPLE


def test_the_guide_for_macs_names_every_plugins_table_with_its_version():
    for plugin in METAL_PLUGINS:
        table = table_of(plugin.name)["plugin"]
        assert re.search(
            rf"^\| {table} \| `gpt2_jax/assets/{plugin.name.replace('-', '_')}_operations.toml`", APPLE, re.MULTILINE
        ), table
