"""Settings from defaults, TOML and the command line; every wrong one is refused with a way out."""

from __future__ import annotations

import dataclasses
import os
import shlex
import typing

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gpt2_jax.commands import prepare
from gpt2_jax.commands.command_line import parse as parse_arguments
from gpt2_jax.commands.command_line import parse_command_line
from gpt2_jax.compute.metal_plugins import METAL_PLUGINS
from gpt2_jax.config import (
    ComputeSettings,
    ModelSettings,
    RunConfig,
    format_config,
    load_config,
    saved_config_path,
)
from gpt2_jax.data.published import PUBLISHED_SHARDS
from gpt2_jax.data.sources import DATASETS
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import config_from_descriptor
from gpt2_jax.llmc.loader import TokenLoader
from gpt2_jax.models.weights import model_config_from_settings
from gpt2_jax.ops.matmul import IMPLEMENTATIONS
from tests.conftest import REPOSITORY, change

# Every flag of train.py. A change here is a change of the public interface: README, presets and users' scripts.
FLAGS = {
    *("--config", "--llmc", "--print-config"),
    *("--init", "--num-layers", "--num-heads", "--channels", "--max-sequence-length", "--vocab-size"),
    *("--train", "--validation", "--batch-size", "--sequence-length", "--total-batch-size", "--shuffle", "--no-shuffle"),
    "--overfit-one-batch",
    *("--learning-rate", "--schedule", "--warmup-steps", "--final-learning-rate-fraction", "--weight-decay"),
    *("--beta1", "--beta2", "--epsilon", "--gradient-clip", "--dropout", "--freeze", "--patience"),
    *("--skip-loss-z", "--skip-gradient-z", "--nonfinite", "--master-weights", "--no-master-weights", "--hellaswag"),
    *("--validate-every", "--validation-batches", "--sample-every", "--sample-tokens", "--prompt"),
    *("--dry-run", "--strict", "--devices", "--zero"),
    *("--coordinator", "--processes", "--process-id", "--hosts", "--distributed"),
    *("--steps", "--seed", "--out-dir", "--resume", "--checkpoint-every", "--keep-checkpoints", "--major-checkpoint-every"),
    *("--max-minutes", "--checkpoint-minutes", "--keep-best", "--verbose", "--track", "--profile"),
    *("--backend", "--metal-plugin", "--dtype", "--matmul", "--matmul-precision", "--recompute", "--deterministic"),
}


def parse(*arguments):
    return parse_command_line([str(argument) for argument in arguments], "Train.")


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_the_flags_are_frozen(capsys):
    with pytest.raises(SystemExit) as exit:
        parse("--help")
    assert exit.value.code == 0
    words = capsys.readouterr().out.replace(",", " ").split()
    assert {word for word in words if word.startswith("--") and len(word) > 2} - {"--help"} >= FLAGS
    settings = {
        "--" + f.name.replace("_", "-") for s in dataclasses.fields(RunConfig) for f in dataclasses.fields(s.default_factory)
    }
    assert settings | {"--config", "--llmc", "--print-config", "--no-shuffle", "--no-master-weights"} == FLAGS


def test_command_line_over_file_over_defaults(tmp_path):
    path = write(tmp_path / "mine.toml", "[run]\nsteps = 7\n[optimizer]\nlearning_rate = 1\nschedule = 'wsd'\n")
    config, name, only_print, *_ = parse("--config", path, "--steps", "9", "--print-config")
    assert (config.run.steps, config.optimizer.learning_rate, config.optimizer.schedule) == (9, 1.0, "wsd")
    assert config.data.batch_size == RunConfig().data.batch_size
    assert (name, only_print) == ("mine", True)


def test_printed_settings_load_back(tmp_path):
    config, *_ = parse("--init", 'odd "name".bin', "--no-shuffle", "--learning-rate", "1e-9", "--steps", "3")
    assert load_config(write(tmp_path / "printed.toml", format_config(config))) == config


def test_the_choices_of_matmul_are_the_implementations():
    """The settings are read before jax may be imported, so they name the choices a second time."""
    choices = typing.get_args(typing.get_type_hints(ComputeSettings)["matmul"])
    assert choices[0] == "auto"
    assert set(choices[1:]) == set(IMPLEMENTATIONS)


def test_the_choices_of_metal_plugin_are_the_plugins():
    choices = typing.get_args(typing.get_type_hints(ComputeSettings)["metal_plugin"])
    assert choices == ("auto", *(plugin.name for plugin in METAL_PLUGINS))


@pytest.mark.parametrize("preset", sorted((REPOSITORY / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_presets_are_valid(preset):
    config, name, *_ = parse("--config", preset)
    assert name == preset.stem
    assert model_config_from_settings(config.model) is not None


COMMON = "-v 250 -t 1024 -d 524288 -r 0 -z 1 -c 0.1 -u 700 -q 0.0 -g 144"
# The flags of llm.c's scripts/run_*.sh, -o, -y, -h and the data apart.
RECIPES = {
    "gpt2_124m": "-e d12 -b 64 -l 0.0006 -s 20000 -n 5000 -x 18865",
    "gpt2_350m": "-e d24 -b 64 -l 0.0003 -s 100000 -n 2000 -x 60000",
    "gpt2_774m": "-e d36 -b 32 -l 0.00025 -s 300000 -n 4000 -x 286102",
    "gpt2_1558m": "-e d48 -b 16 -l 0.0006 -s 300000 -n 2000 -x 32000 -d 1048576 -q 0.1 -g 384 -ge 1 -k cosine",
    "gpt3_125m": "-e gpt3:c768 -b 32 -t 2048 -l 0.0006 -q 0.1 -s 20000 -n 10000 -nk 5 -nm 50000 -ge 1 -sl 7 -sg 7 -x 572204",
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_llmcs(recipe):
    preset = load_config(REPOSITORY / "configs" / f"{recipe}.toml")
    files = f"-i {preset.data.train} -j {preset.data.validation}"
    translated, *_ = parse("--llmc", f"{COMMON} {RECIPES[recipe]} {files}")
    assert preset == translated


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[run]\nstep = 3", r"run.*'step'; did you mean 'steps'\?"),
        ("[rum]\nsteps = 3", r"'rum'; did you mean 'run'\?"),
        ("steps = 3", r"expected only the tables .*found 'steps'"),
        ("[run]\nsteps = 'many'", r"run.steps: expected int, found 'many'"),
        ("[run]\nsteps = 1.5", r"run.steps: expected int, found 1.5"),
        ("[run]\nsteps = true", r"run.steps: expected int, found True"),
        ("[data]\nshuffle = 1", r"data.shuffle: expected bool, found 1"),
        (
            "[optimizer]\nschedule = 'cosin'",
            r"expected one of cosine, linear, constant, wsd, found 'cosin'; did you mean 'cosine'\?",
        ),
        ("[compute]\nmetal_plugin = 'jaxmps'", r"found 'jaxmps'; did you mean 'jax-mps'\?"),
        ("[model]\nnum_layers = 'six'", r"model.num_layers: expected int"),
        ("[run\n", r"expected TOML, found"),
    ],
)
def test_wrong_files_are_refused(tmp_path, text, message):
    path = write(tmp_path / "wrong.toml", text)
    with pytest.raises(Gpt2JaxError, match=message):
        parse("--config", path)


@pytest.mark.parametrize("folder", ["missing", "x" * 300])
def test_resuming_what_has_no_settings_takes_the_command_lines(tmp_path, folder):
    config, *_ = parse("--resume", "--out-dir", tmp_path / folder, "--steps", 7)
    assert config.run.steps == 7


def test_a_missing_file_or_a_folder_is_refused(tmp_path):
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(Gpt2JaxError, match="expected a TOML file"):
            parse("--config", path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "--batch-size: expected at least 1, found 0"),
        (["--steps", "-1"], "--steps: expected at least 0"),
        (["--total-batch-size", "5000"], r"multiple of .* = 4096.*\n.*--total-batch-size 4096"),
        (["--total-batch-size", "9000"], "--total-batch-size 8192"),
        (["--learning-rate", "nan"], "--learning-rate: expected a finite number"),
        (["--weight-decay", "-1"], "--weight-decay"),
        (["--skip-loss-z", "-1"], "--skip-loss-z: expected a finite number"),
        (["--keep-checkpoints", "-1"], "--keep-checkpoints: expected at least 0"),
        (["--validation-batches", "0"], "--validate-every 0"),
        (["--resume"], "--resume: expected the run's folder"),
        (["--max-minutes", "inf"], "--max-minutes: expected a finite number"),
        (["--checkpoint-minutes", "-1"], "--checkpoint-minutes: expected a finite number of at least 0"),
        (["--keep-best", "--validate-every", "0"], "--keep-best: expected a run that validates"),
        (["--patience", "3", "--validate-every", "0"], "--patience: expected a run that validates"),
        (["--dropout", "1"], "--dropout: expected a number below 1, found 1.0"),
        (["--dropout", "-0.1"], "--dropout: expected a finite number of at least 0, found -0.1"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(Gpt2JaxError, match=message):
        parse(*arguments)


@pytest.mark.parametrize("arguments", [["--stepz", "3"], ["--steps", "three"], ["--schedule", "cosin"], ["--steps"]])
def test_wrong_flags_end_with_status_2_and_a_hint(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(*arguments)
    assert exit.value.code == 2
    assert "--s" in capsys.readouterr().err


def test_a_misspelt_flag_is_answered_with_the_right_one(capsys):
    with pytest.raises(SystemExit):
        parse("--batchsize", "3")
    assert "--batch-size" in capsys.readouterr().err


def test_resume_takes_the_run_folders_settings(tmp_path):
    config, *_ = parse("--steps", "3", "--batch-size", "2")
    write(saved_config_path(tmp_path), format_config(config))
    resumed, *_ = parse("--resume", "--out-dir", tmp_path, "--steps", "5")
    assert (resumed.run.steps, resumed.data.batch_size, resumed.run.resume) == (5, 2, True)


def test_accumulation_counts():
    config, *_ = parse("--batch-size", "2", "--sequence-length", "8", "--total-batch-size", "64")
    assert (config.num_micro_batches, config.tokens_per_step) == (4, 64)
    config, *_ = parse("--batch-size", "2", "--sequence-length", "8")
    assert (config.num_micro_batches, config.tokens_per_step) == (1, 16)


def test_sizes_override_a_descriptor_but_not_a_file():
    settings = ModelSettings(init="d6", channels=24, num_heads=3)
    expected = dataclasses.replace(config_from_descriptor("d6"), channels=24, num_heads=3)
    assert model_config_from_settings(settings) == expected
    assert model_config_from_settings(ModelSettings(init="model.bin")) is None
    with pytest.raises(Gpt2JaxError, match=r"--channels: expected a size only with a descriptor.*model.bin"):
        model_config_from_settings(ModelSettings(init="model.bin", channels=24))


@example('a\x7fb\x00\r"\\ \udcff\ud800')
@given(st.text(st.characters() | st.sampled_from('\x7f\x00\udcff\ud800\r"\\'), max_size=20))
def test_every_prompt_comes_back_from_the_saved_settings(tmp_path_factory, prompt):
    """Also one that is no UTF-8, or has characters that TOML wants escaped."""
    path = tmp_path_factory.mktemp("saved") / "config.toml"
    config = change(RunConfig(), evaluation={"prompt": prompt})
    path.write_bytes(format_config(config).encode("utf-8", "surrogatepass"))
    assert load_config(path) == config


@pytest.mark.parametrize("preset", sorted(path.stem for path in (REPOSITORY / "configs").glob("*.toml")))
def test_without_its_data_every_preset_names_the_command_that_brings_them(preset, tmp_path, monkeypatch):
    """And that command writes what the preset reads."""
    monkeypatch.chdir(tmp_path)
    data = load_config(REPOSITORY / "configs" / f"{preset}.toml").data
    for pattern in (data.train, data.validation):
        with pytest.raises(Gpt2JaxError) as refused:
            TokenLoader(pattern, 1, 8, vocab_size=50257)
        words = shlex.split(refused.value.hint.partition("   ")[0])
        assert words[:2] == ["python", "scripts/prepare_data.py"]
        arguments = parse_arguments(prepare.Arguments, "", words[2:])
        assert arguments.source in (*DATASETS, *PUBLISHED_SHARDS, "kjv")
        folder, name = os.path.split(pattern)
        assert folder == arguments.output_dir
        written = arguments.source.removesuffix("-shards").removesuffix("-100B") + str(arguments.vocabulary or "")
        assert name.startswith(f"{written}_")
