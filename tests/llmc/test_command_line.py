"""llm.c's command line: every flag of train_gpt2cu is translated, has no effect and says so, or is refused by name."""

from __future__ import annotations

import pytest

from gpt2_jax.commands.command_line import parse_command_line
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc.command_line import translate
from gpt2_jax.llmc.model_file import write_model_file
from tests.conftest import TINY


def settings(llmc: str, *more: str):
    config, *_ = parse_command_line(["--llmc", llmc, *more], "Train.")
    return config


# Flag and value; the setting and what it becomes.
TRANSLATED = [
    ("-z 0", "compute.zero", 0),
    ("-i x_*.bin", "data.train", "x_*.bin"),
    ("-j y_*.bin", "data.validation", "y_*.bin"),
    ("-e d12", "model.init", "d12"),
    ("-e gpt2:d48", "model.init", "gpt2:d48"),
    ("-e gpt3:c768", "model.init", "gpt3:c768"),
    ("-o my_log", "run.out_dir", "my_log"),
    ("-n 5000", "run.checkpoint_every", 5000),
    ("-nk 5", "run.keep_checkpoints", 5),
    ("-nm 50000", "run.major_checkpoint_every", 50000),
    ("-o my_log -y 1", "run.resume", False),  # nothing is there yet
    ("-b 64", "data.batch_size", 64),
    ("-t 512", "data.sequence_length", 512),
    ("-d 524288", "data.total_batch_size", 524288),
    ("-d -1", "data.total_batch_size", 0),
    ("-x 7", "run.steps", 7),
    ("-x -1", "run.steps", 0),
    ("-k wsd", "optimizer.schedule", "wsd"),
    ("-l 0.0006", "optimizer.learning_rate", 6e-4),
    ("-u 700", "optimizer.warmup_steps", 700),
    ("-q 0.1", "optimizer.final_learning_rate_fraction", 0.1),
    ("-c 0.1", "optimizer.weight_decay", 0.1),
    ("-sl 7.0", "optimizer.skip_loss_z", 7.0),
    ("-sg 7", "optimizer.skip_gradient_z", 7.0),
    ("-v 250", "evaluation.validate_every", 250),
    ("-m -1", "evaluation.validation_batches", -1),
    ("-s 20000", "evaluation.sample_every", 20000),
    ("-g 144", "evaluation.sample_tokens", 143),
    ("-g 1", "evaluation.sample_every", 0),
    ("-h 1", "evaluation.hellaswag", ""),  # the file is not there
    ("-h 0", "evaluation.hellaswag", ""),
    ("-a 1", "data.overfit_one_batch", True),
    ("-f 1", "compute.matmul_precision", "default"),
    ("-f 0", "compute.matmul_precision", "default"),  # bfloat16 has no TF32
    ("-w 0", "optimizer.master_weights", False),
    ("-w 1", "optimizer.master_weights", True),
    ("-r 0", "compute.recompute", "none"),
    ("-r 1", "compute.recompute", "gelu"),
    ("-r 2", "compute.recompute", "layernorm"),
    ("-pn 1 -pr 0", "compute.processes", 0),
    ("-pn 8 -pr 3 -pi tcp -ps 10.0.0.1", "compute.coordinator", "10.0.0.1:12345"),
    ("-pn 8 -pr 3 -pi tcp -ps 10.0.0.1", "compute.processes", 8),
    ("-pn 8 -pr 3 -pi tcp -ps 10.0.0.1", "compute.process_id", 3),
    ("-pn 8 -pi tcp -ps 10.0.0.1", "compute.process_id", 0),
    ("-pn 8 -pi tcp -ps 10.0.0.1", "compute.zero", 0),
    ("-pn 8 -pi tcp -ps 10.0.0.1 -z 1", "compute.zero", 1),
    ("-pn 8", "compute.distributed", "mpi"),  # llm.c's default
    ("-pn 8 -pi mpi -pg 8", "compute.distributed", "mpi"),
]
WITHOUT_EFFECT = ["-lg 10", "-ge 1", "-pg 8", "-pi tcp", "-ps 10.0.0.1", "-pf /shared"]
# Of the table in llm.c's usage.
ALL_FLAGS = {
    *("-i", "-j", "-e", "-o", "-lg", "-n", "-nk", "-nm", "-y", "-b", "-t", "-d", "-x", "-k", "-l", "-u", "-q", "-c"),
    *("-sl", "-sg", "-v", "-m", "-s", "-g", "-h", "-a", "-f", "-w", "-ge", "-z", "-r"),
    *("-pn", "-pr", "-pg", "-pi", "-ps", "-pf"),
}


@pytest.mark.parametrize(("llmc", "name", "value"), TRANSLATED, ids=[row[0] for row in TRANSLATED])
def test_flag_becomes_a_setting(llmc, name, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section, _, key = name.partition(".")
    assert getattr(getattr(settings(llmc), section), key) == value


@pytest.mark.parametrize("llmc", WITHOUT_EFFECT)
def test_flag_without_effect_is_accepted_with_a_line(llmc):
    found, plain = translate(llmc), translate("")
    assert found.arguments == plain.arguments
    (remark,) = set(found.remarks) - set(plain.remarks)
    assert remark.startswith(f"{llmc} has no effect: ")


def test_every_flag_is_in_one_of_the_tests():
    tested = {word for llmc in [*(row[0] for row in TRANSLATED), *WITHOUT_EFFECT] for word in llmc.split()[::2]}
    assert tested == ALL_FLAGS


def test_without_a_flag_llmcs_defaults_hold():
    config = settings("")
    assert config.data.train == "dev/data/tinyshakespeare/tiny_shakespeare_train.bin"
    assert config.data.validation == "dev/data/tinyshakespeare/tiny_shakespeare_val.bin"
    assert config.model.init == "gpt2_124M_bf16.bin"
    assert (config.data.batch_size, config.data.sequence_length, config.data.total_batch_size) == (4, 1024, 0)
    assert (config.optimizer.learning_rate, config.optimizer.final_learning_rate_fraction) == (3e-4, 1.0)
    assert (config.optimizer.weight_decay, config.optimizer.warmup_steps, config.optimizer.schedule) == (0.0, 0, "cosine")
    assert (config.evaluation.validate_every, config.evaluation.validation_batches) == (20, 20)
    assert (config.evaluation.sample_every, config.evaluation.sample_tokens) == (20, 63)
    assert (config.compute.dtype, config.compute.recompute) == ("bfloat16", "gelu")


def test_a_flag_that_llmc_has_not_brings_the_nearest():
    for line, hint in (("-i a -jj b", "-j"), ("-batch 4", "one of -a -b ")):
        with pytest.raises(Gpt2JaxError) as raised:
            translate(line)
        assert raised.value.hint.startswith(hint)


@pytest.mark.parametrize(
    ("llmc", "message"),
    [
        ("-pn 8 -pi fs -pf /shared", "found -pi fs, which does by a file that may be an earlier run's"),
        ("-pn 8 -pi tcp", "found no -ps"),
        ("-pn 2 -pi ucx", "expected mpi, tcp or fs after -pi, found 'ucx'"),
        ("-pn 0", "expected after -pr one of 0 to -pn - 1 = -1, found 0"),
        ("-pr 1", "found 1"),
        ("-x 0", "after -x, found 0"),
        ("-b six", "expected an integer after -b, found 'six'"),
        ("-l fast", "expected a number after -l, found 'fast'"),
        ("-w 2", "expected 0 or 1 after -w, found '2'"),
        ("-r 3", "expected 0, 1 or 2 after -r, found 3"),
        ("-bb 4", "expected flags of train_gpt2cu, found '-bb'"),
        ("--batch 4", "found '--batch'"),
        ("mpirun -np 8", "found 'mpirun'"),
        ("-b", "expected a value after -b"),
        ("-i 'x", "expected a command line"),
        ("-y 1", "found -y 1 without -o"),
    ],
)
def test_what_cannot_be_had_or_would_be_misread_is_refused_by_name(llmc, message):
    with pytest.raises(Gpt2JaxError) as raised:
        translate(llmc)
    assert message in str(raised.value)


def test_a_float32_model_file_means_a_float32_build(tmp_path, tiny_params):
    for dtype in ("float32", "bfloat16"):
        path = tmp_path / f"{dtype}.bin"
        write_model_file(path, TINY, tiny_params, dtype)
        config = settings(f"-e {path} -f 0")
        assert config.compute.dtype == dtype
        assert config.compute.matmul_precision == ("highest" if dtype == "float32" else "default")


def test_resume_takes_what_is_there(tmp_path):
    (tmp_path / "DONE_00000005").touch()
    assert settings(f"-o {tmp_path} -y 1").run.resume
    assert not settings(f"-o {tmp_path} -y 0").run.resume
    assert not settings(f"-o {'x' * 300} -y 1").run.resume


def test_hellaswag_is_where_llmc_looks_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert any("hellaswag_val.bin is not there" in remark for remark in translate("-h 1").remarks)
    folder = tmp_path / "dev" / "data" / "hellaswag"
    folder.mkdir(parents=True)
    (folder / "hellaswag_val.bin").touch()
    assert settings("-h 1").evaluation.hellaswag == "dev/data/hellaswag/hellaswag_val.bin"


def test_the_translation_is_printed_as_comments_and_other_flags_go_over_it(capsys):
    config = settings("./train_gpt2cu -i 'my data_*.bin' -b 8 -b 64 -lg 10", "--batch-size", "2", "--dtype", "float32")
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("# ") for line in lines)
    assert lines[1].startswith("# is here: python scripts/train.py --train 'my data_*.bin' ")
    assert " --batch-size 64 " in lines[1]
    assert "# -lg 10 has no effect: no telemetry is printed" in lines
    assert (config.data.batch_size, config.compute.dtype) == (2, "float32")


def test_numbers_are_taken_as_they_are():
    config = settings("-l 0.00025 -q 0.0 -sl 0.0")
    assert (config.optimizer.learning_rate, config.optimizer.skip_loss_z) == (0.00025, 0.0)


@pytest.mark.parametrize(("stage", "expected"), [("0", "0"), ("1", "1"), ("3", "0")])
def test_the_zero_stage_is_llmcs(stage, expected):
    """llm.c has 0 and 1, and takes 0 for others."""
    found = translate(f"-z {stage}")
    assert found.arguments[found.arguments.index("--zero") + 1] == expected
    assert bool([remark for remark in found.remarks if "-z" in remark]) == (stage == "3")
