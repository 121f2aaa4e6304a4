"""A run's command line: what decides the defaults is seen in every form in which the parser understands it."""

from __future__ import annotations

import pytest

from gpt2_jax.commands.command_line import find_config, parse_command_line
from gpt2_jax.config import format_config
from gpt2_jax.errors import Gpt2JaxError
from tests.conftest import REPOSITORY

LLMC = "-e d12 -i a.bin -j b.bin -b 8"


@pytest.mark.parametrize(
    "words", [["--llmc", LLMC], [f"--llmc={LLMC}"], ["--steps", "3", f"--llmc={LLMC}"], [f"--llmc={LLMC}", "--steps=3"]]
)
def test_llmcs_command_line_is_translated_in_every_form(words, capsys):
    config, name, _ = parse_command_line(words, "")
    assert (config.model.init, config.data.train, config.data.batch_size, name) == ("d12", "a.bin", 8, "d12")
    assert config.run.steps == (3 if len(words) > 1 and words != ["--llmc", LLMC] else 0)
    assert capsys.readouterr().out.startswith(f"# train_gpt2cu {LLMC}\n# is here: ")


def test_llmcs_command_line_twice_is_refused():
    with pytest.raises(Gpt2JaxError, match="--llmc: expected it written out, and once"):
        parse_command_line([f"--llmc={LLMC}", f"--llmc={LLMC}"], "")


@pytest.mark.parametrize("flag", ["--llmc", "--config"])
def test_a_flag_without_its_value_is_refused(flag, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_command_line([flag], "")
    assert ended.value.code == 2
    assert flag in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--config", "demo"], ["--config=demo"], ["--config", str(REPOSITORY / "configs" / "demo.toml")]]
)
def test_a_preset_goes_by_its_name_and_by_its_path(words):
    config, name, _ = parse_command_line(words, "")
    assert (config.model.num_layers, config.run.steps, name) == (4, 500, "demo")


def test_every_preset_is_found_by_name():
    for path in (REPOSITORY / "configs").glob("*.toml"):
        assert find_config(path.stem) == path


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(Gpt2JaxError, match=r"expected a TOML file or one of demo, gpt2_124m.*found 'dem0'"):
        parse_command_line(["--config", "dem0"], "")


@pytest.mark.parametrize("words", [["--resume", "--out-dir", "{}"], ["--resume", "--out-dir={}"], ["--out_dir={}", "--resume"]])
def test_a_resumed_run_has_its_folders_settings_in_every_form(words, config, tmp_path):
    (tmp_path / "config.toml").write_text(format_config(config))
    found, _, _ = parse_command_line([word.format(tmp_path) for word in words], "")
    assert found.data == config.data
    assert (found.run.resume, found.run.out_dir) == (True, str(tmp_path))


@pytest.mark.parametrize("word", ["--conf=demo", "--llm=x", "--resum", "--out=x"])
def test_abbreviations_are_refused(word, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_command_line([word], "")
    assert ended.value.code == 2
