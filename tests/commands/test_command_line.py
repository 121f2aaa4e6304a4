"""A run's command line: what decides the defaults is seen in every form in which the parser understands it."""

from __future__ import annotations

import dataclasses
import os

import pytest

import gpt2_jax
from gpt2_jax.commands import train
from gpt2_jax.commands.command_line import parse_command_line
from gpt2_jax.config import find_config, format_config
from gpt2_jax.errors import Gpt2JaxError
from tests.conftest import CPU, REPOSITORY

LLMC = "-e d12 -i a.bin -j b.bin -b 8"


@pytest.mark.parametrize(
    "words", [["--llmc", LLMC], [f"--llmc={LLMC}"], ["--steps", "3", f"--llmc={LLMC}"], [f"--llmc={LLMC}", "--steps=3"]]
)
def test_llmcs_command_line_is_translated_in_every_form(words, capsys):
    config, name, *_ = parse_command_line(words, "")
    assert (config.model.init, config.data.train, config.data.batch_size, name) == ("d12", "a.bin", 8, "d12")
    assert config.run.steps == (3 if len(words) > 1 and words != ["--llmc", LLMC] else 0)
    assert capsys.readouterr().out.startswith(f"# train_gpt2cu {LLMC}\n# is here: ")


def test_of_two_command_lines_of_llmcs_the_last_counts():
    config, *_ = parse_command_line([f"--llmc={LLMC}", "--steps", "3", "--llmc", "-e d24"], "")
    assert (config.model.init, config.run.steps) == ("d24", 3)


@pytest.mark.parametrize("words", [["--llmc", ""], ["--llmc="]])
def test_an_empty_command_line_of_llmcs_is_its_defaults_and_swallows_no_flag(words):
    config, *_ = parse_command_line([*words, "--steps", "3"], "")
    assert (config.data.train, config.run.steps) == ("dev/data/tinyshakespeare/tiny_shakespeare_train.bin", 3)


def test_llmc_as_the_last_word_is_refused():
    with pytest.raises(Gpt2JaxError) as refused:
        parse_command_line(["--steps", "3", "--llmc"], "")
    assert refused.value.problem == "--llmc: expected llm.c's command line in quotes, found no value"
    assert refused.value.hint.startswith('--llmc "-i ')


@pytest.mark.parametrize(
    ("words", "named"),
    [(["--config"], "--config"), (["--resume", "--out-dir"], "--out-dir"), (["--resume=yes", "--out-dir", "x"], "yes")],
)
def test_a_missing_value_and_one_too_many_are_refused(words, named, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_command_line(words, "")
    assert ended.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--config", "demo"], ["--config=demo"], ["--config", str(REPOSITORY / "configs" / "demo.toml")]]
)
def test_a_preset_goes_by_its_name_and_by_its_path(words):
    config, name, *_ = parse_command_line(words, "")
    assert (config.model.num_layers, config.run.steps, name) == (4, 500, "demo")


def test_every_preset_is_found_by_name():
    for path in (REPOSITORY / "configs").glob("*.toml"):
        assert find_config(path.stem) == path


def test_a_file_without_a_suffix_is_a_path_and_a_folder_hides_no_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("[run]\nsteps = 7\n")
    (tmp_path / "demo").mkdir()
    assert parse_command_line(["--config", "mine"], "")[0].run.steps == 7
    assert parse_command_line(["--config", "demo"], "")[0].run.steps == 500


def test_a_wheel_has_its_presets_inside(tmp_path, monkeypatch):
    (tmp_path / "gpt2_jax" / "configs").mkdir(parents=True)
    preset = tmp_path / "gpt2_jax" / "configs" / "inside.toml"
    preset.touch()
    monkeypatch.setattr(gpt2_jax, "__path__", [str(tmp_path / "gpt2_jax")])
    assert find_config("inside") == preset
    with pytest.raises(Gpt2JaxError, match="expected a TOML file or one of inside, found 'demo'"):
        find_config("demo")


@pytest.mark.parametrize(("name", "hint"), [("dem0", "demo"), ("gpt2_124M", "gpt2_124m"), ("x" * 300, "demo")])
def test_an_unknown_preset_is_refused_with_the_known_ones(name, hint):
    known = ", ".join(sorted(path.stem for path in (REPOSITORY / "configs").glob("*.toml")))
    with pytest.raises(Gpt2JaxError) as refused:
        parse_command_line(["--config", name], "")
    assert refused.value.problem == f"--config: expected a TOML file or one of {known}, found {name!r}"
    assert refused.value.hint == f"--config {hint}"


def test_a_mistyped_path_of_settings_brings_the_file_that_was_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my configs").mkdir()
    (tmp_path / "my configs" / "small.toml").touch()
    for path, hint in (("my config/smal.toml", "--config 'my configs/small.toml'"), ("elsewhere/x.toml", "--config demo   (")):
        with pytest.raises(Gpt2JaxError, match="found no such file") as refused:
            parse_command_line(["--config", path], "")
        assert refused.value.hint.startswith(hint)


@pytest.mark.parametrize("with_link", [True, False])
def test_resuming_without_a_folder_names_the_run_that_was_started_last(tmp_path, monkeypatch, with_link):
    monkeypatch.chdir(tmp_path)
    hints = []
    for age, name in ((0, None), (2, "older"), (1, "my run")):
        if name is not None:
            (tmp_path / "runs" / name).mkdir(parents=True)
            (tmp_path / "runs" / name / "config.toml").touch()
            os.utime(tmp_path / "runs" / name / "config.toml", (1000 - age, 1000 - age))
            if with_link:
                (tmp_path / "runs" / "latest").unlink(missing_ok=True)
                (tmp_path / "runs" / "latest").symlink_to(name)
        with pytest.raises(Gpt2JaxError, match="found no --out-dir") as refused:
            parse_command_line(["--resume"], "")
        hints.append(refused.value.hint)
    assert hints == [f"--resume --out-dir {folder}" for folder in ("runs/NAME", "runs/older", "'runs/my run'")]


def test_an_empty_config_is_refused():
    with pytest.raises(Gpt2JaxError, match="expected a TOML file with settings, found a folder"):
        parse_command_line(["--config=", "--steps", "3"], "")


@pytest.mark.parametrize("words", [["--resume", "--out-dir", "{}"], ["--resume", "--out-dir={}"], ["--out_dir={}", "--resume"]])
def test_a_resumed_run_has_its_folders_settings_in_every_form(words, config, tmp_path):
    (tmp_path / "config.toml").write_text(format_config(config))
    found, *_ = parse_command_line([word.format(tmp_path) for word in words], "")
    assert found.data == config.data
    assert (found.run.resume, found.run.out_dir) == (True, str(tmp_path))


@pytest.mark.parametrize("word", ["--conf=demo", "--llm=x", "--resum", "--out=x"])
def test_abbreviations_are_refused(word, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_command_line([word], "")
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("words", "validation"),
    [
        (["--config", "demo"], "data/kjv_val.bin"),
        (["--config", "demo", "--train", "mine.bin"], ""),
        (["--config", "demo", "--train=mine.bin"], ""),
        (["--config", "demo", "--train", "mine.bin", "--validation", "data/kjv_val.bin"], "data/kjv_val.bin"),
        (["--train", "mine.bin"], ""),
        (["--llmc", "-i mine.bin"], ""),
        (["--llmc", "-i mine.bin -j x.bin"], "x.bin"),
        (["--llmc", "-i mine.bin -j x.bin", "--train", "other.bin"], "x.bin"),
    ],
)
def test_a_presets_validation_data_are_of_its_own_training_data(words, validation, capsys):
    assert parse_command_line(words, "").settings.data.validation == validation


@pytest.mark.parametrize("words", [[], ["--steps", "3"], ["--backend", "cpu"], ["--lr=1", "--dry-run"], ["--prompt", "train"]])
def test_a_command_line_that_says_nothing_of_model_and_data(words):
    assert not parse_command_line(words, "").names_a_run


@pytest.mark.parametrize(
    "words",
    [
        ["--init", "d12"],
        ["--init=d12"],
        ["--batch_size", "4"],
        ["--no-shuffle"],
        ["--num-layers", "2"],
        ["--config", "demo"],
        ["--llmc", LLMC],
        ["--train", "data/kjv_train.bin"],
    ],
)
def test_a_command_line_that_names_a_run(words, capsys):
    assert parse_command_line(words, "").names_a_run


@pytest.mark.parametrize(
    ("words", "section", "name", "value"),
    [
        (["--lr", "0.1"], "optimizer", "learning_rate", 0.1),
        (["--max-iters", "7"], "run", "steps", 7),
        (["--max_iters=7"], "run", "steps", 7),
        (["--device", "cpu"], "compute", "backend", "cpu"),
        (["--device=mps"], "compute", "backend", "mps"),
    ],
)
def test_the_flags_of_nanogpt(words, section, name, value):
    assert getattr(getattr(parse_command_line(words, "").settings, section), name) == value


@pytest.mark.parametrize(
    ("words", "accelerator", "config"),
    [
        ([], False, ["--config", "demo"]),
        (["--steps", "3", "--backend", "cpu"], False, ["--config", "demo", "--steps", "3", "--backend", "cpu"]),
        (["--init", "d12"], False, ["--init", "d12"]),
        ([], True, []),
    ],
)
def test_without_a_word_of_model_and_data_a_cpu_trains_the_demo(words, accelerator, config, monkeypatch, capsys):
    chosen = dataclasses.replace(CPU, platform="cuda") if accelerator else CPU
    monkeypatch.setattr(train, "select_backend", lambda *_, **__: chosen)
    train.main([*words, "--print-config"])
    shown = capsys.readouterr().out
    assert shown.endswith(format_config(parse_command_line(config, "").settings) + "\n")
    assert ("--config demo" in shown) == (config[:1] == ["--config"])
    assert all(line.startswith("#") for line in shown.partition("[model]")[0].splitlines())
