"""The programs as a user runs them: each in a process of its own, with what it prints and how it ends."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.llmc.checkpoint_set import complete_steps, newest_step
from gpt2_jax.llmc.model_file import write_model_file
from gpt2_jax.llmc.state_file import read_state_files
from gpt2_jax.llmc.tokenizer_file import read_tokenizer_file
from gpt2_jax.training.checkpoint import load_checkpoint
from tests.conftest import REPOSITORY, TINY
from tests.llmc.test_command_line import ALL_FLAGS

TINY_FLAGS = [
    *("--init", "d6", "--num-layers", "1", "--num-heads", "2", "--channels", "16", "--max-sequence-length", "16"),
    *("--vocab-size", "203", "--batch-size", "2", "--sequence-length", "16", "--validate-every", "5", "--sample-every", "0"),
]


def run(script, *arguments, cwd=REPOSITORY, status=0):
    """Run a script; its standard output and error. Other than the expected status fails with both."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "200"}
    command = [sys.executable, str(REPOSITORY / "scripts" / script), *map(str, arguments)]
    ended = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == status, f"{script} ended with {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended.stdout, ended.stderr


def test_train_resume_and_generate(tiny_shards, tmp_path):
    flags = [*TINY_FLAGS, "--train", tiny_shards[0], "--validation", tiny_shards[1]]
    output, _ = run("train.py", *flags, "--steps", 5, "--out-dir", tmp_path / "run")
    assert len(re.findall(r"^step [1-5]/5 \| loss ", output, re.MULTILINE)) == 5
    assert "cpu" in output

    output, _ = run("train.py", "--resume", "--out-dir", tmp_path / "run", "--steps", 7)
    assert [int(step) for step in re.findall(r"^step (\d)/7", output, re.MULTILINE)] == [6, 7]
    assert newest_step(tmp_path / "run") == 7

    _, error = run("train.py", *flags, "--steps", 5, "--out-dir", tmp_path / "run", status=2)
    assert "holds a run" in error
    assert "---> HINT: --resume" in error


def test_a_reader_that_stops_early_is_no_crash():
    command = [sys.executable, str(REPOSITORY / "scripts" / "generate.py"), "--help"]
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_train_runs_into_a_new_folder_by_default(tiny_shards, tmp_path):
    run("train.py", *TINY_FLAGS, "--train", tiny_shards[0], "--validation", tiny_shards[1], "--steps", 1, cwd=tmp_path)
    (folder,) = {path.resolve() for path in (tmp_path / "runs").iterdir()}
    assert (tmp_path / "runs" / "latest").resolve() == folder
    assert re.fullmatch(r"d6-\d{8}-\d{6}", folder.name)
    assert (folder / "DONE_00000001").exists()


@pytest.mark.parametrize(
    ("backend", "message"), [("cuda", "expected an NVIDIA GPU"), ("metal", "expected a Mac with Apple silicon")]
)
@pytest.mark.skipif(sys.platform != "linux" or os.path.exists("/dev/nvidia0"), reason="this machine has an accelerator")
def test_an_accelerator_that_is_not_there_is_one_clear_error(backend, message):
    output, error = run("train.py", "--backend", backend, status=2)
    assert output == ""
    assert error.startswith(f"error: backend {backend}: {message}")
    assert len(error.splitlines()) == 2
    assert "---> HINT: " in error


def test_a_missing_data_file_names_the_command_that_makes_it(tmp_path):
    _, error = run("train.py", *TINY_FLAGS, "--steps", 1, cwd=tmp_path, status=2)
    assert "data/kjv_train.bin: expected at least one token shard" in error
    assert f"---> HINT: python {REPOSITORY / 'scripts' / 'prepare_data.py'}" in error
    assert not (tmp_path / "runs").exists()


def test_print_config_prints_and_trains_nothing(tmp_path):
    output, _ = run("train.py", "--config", REPOSITORY / "configs" / "demo.toml", "--steps", 3, "--print-config", cwd=tmp_path)
    assert "steps = 3" in output
    assert "channels = 128" in output
    assert list(tmp_path.iterdir()) == []


def test_prepare_data_makes_shards_of_a_text_file(tmp_path):
    (tmp_path / "book.txt").write_text("Hello world " * 100, encoding="utf-8")
    output, _ = run("prepare_data.py", "--source", "book.txt", cwd=tmp_path)
    assert re.search(r"data/book_train.bin: \d+ tokens\ndata/book_val.bin: \d+ tokens", output)


def test_generate_continues_a_text_the_same_way_for_the_same_seed(tmp_path):
    from gpt2_jax.models.initialize import initialize_parameters

    config = GPT2Config(max_sequence_length=16, vocab_size=50257, num_layers=1, num_heads=1, channels=8)
    path = tmp_path / "model.bin"
    write_model_file(path, config, initialize_parameters(config))
    flags = [path, "--prompt", "In the beginning", "--max-tokens", "5", "--top-k", "40"]
    texts = [run("generate.py", *flags)[0] for _ in range(2)]
    assert texts[0] == texts[1]
    assert texts[0].startswith("In the beginning")
    assert len(texts[0]) > len("In the beginning\n")
    for flag, value in (
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--top-k", "-1"),
        ("--top-p", "0"),
        ("--top-p", "nan"),
        ("--min-p", "1.5"),
        ("--seed", "0"),
        ("--max-tokens", "0"),
    ):
        output, error = run("generate.py", path, flag, value, status=2)
        assert error.startswith(f"error: {flag}: expected ")
        assert f"---> HINT: {flag} " in error
        assert output == ""


def test_the_starter_pack_has_llmcs_names_and_sizes(tiny_params, tiny_shards, tmp_path):
    write_model_file(tmp_path / "tiny.bin", TINY, tiny_params)
    flags = ["--init", tmp_path / "tiny.bin", "--batch-size", "2", "--sequence-length", "8", "--tokens", tiny_shards[1]]
    run("write_starter_pack.py", *flags, "--output-dir", tmp_path / "pack")
    n = TINY.layout.num_parameters
    assert {path.name: path.stat().st_size for path in (tmp_path / "pack").iterdir()} == {
        "gpt2_tiny.bin": 1024 + 4 * n,
        "gpt2_tiny_bf16.bin": 1024 + 2 * n,
        "gpt2_tiny_debug_state.bin": 1024 + 4 * (2 * 16 + 16 * TINY.vocab_size + 1 + n),
        "gpt2_tokenizer.bin": 372_108,
    }
    assert (tmp_path / "pack" / "gpt2_tiny.bin").read_bytes() == (tmp_path / "tiny.bin").read_bytes()
    assert read_tokenizer_file(tmp_path / "pack" / "gpt2_tokenizer.bin").end_of_text == 50256


@pytest.mark.torch
def test_check_gradients_prints_every_tensor_and_its_status_can_be_trusted(tiny_params, tmp_path):
    write_model_file(tmp_path / "tiny.bin", TINY, tiny_params)
    output, _ = run("check_gradients.py", "--checkpoint", tmp_path / "tiny.bin", "--sequence-length", "16")
    for tensor in TINY.layout.tensors:
        assert re.search(rf"^grad {tensor.name} .* ok$", output, re.MULTILINE)
    assert output.endswith("all within tolerance\n")

    program = (
        "import runpy, sys, gpt2_jax.ops.norm as norm; norm.LAYERNORM_EPSILON = 1e-3; "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    script = str(REPOSITORY / "scripts" / "check_gradients.py")
    command = [sys.executable, "-c", program, script, "--checkpoint", str(tmp_path / "tiny.bin"), "--matmul", "xla"]
    command += ["--sequence-length", "16"]
    ended = subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1
    assert "FAILED: loss" in ended.stdout


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_follows_pytorchs_losses(tiny_shards, tmp_path, dtype):
    """With what differs between steps: accumulation, a schedule, decay, clipping. A loss of the log that is off is found."""
    data = ["--train", tiny_shards[0], "--validation", tiny_shards[1], "--total-batch-size", 64, "--validate-every", 0]
    rates = ["--learning-rate", 1e-2, "--warmup-steps", 3, "--weight-decay", 0.5, "--gradient-clip", 0.5]
    folder = tmp_path / "run"
    run("train.py", *TINY_FLAGS, *data, *rates, "--dtype", dtype, "--steps", 8, "--out-dir", folder)
    # Roundings of a step grow in eight by some factor; bfloat16's, 2**-8, in losses of means over 64 tokens by none.
    tolerance = {"float32": 1e-5, "bfloat16": 2.0**-8}[dtype]
    words = [folder, "--tolerance", tolerance, "--plot", tmp_path / "curves.png"]
    output, _ = run("check_curve.py", *words)
    assert re.search(r"^ok: of 8 steps, step [1-8] differs most: ", output, re.MULTILINE)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")

    log = folder / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        if line["event"] == "train" and line["step"] == 5:
            line["loss"] *= 1 + 2 * tolerance
    log.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    output, _ = run("check_curve.py", *words, status=1)
    assert "FAILED: of 8 steps, step 5 differs most" in output


def test_only_a_run_has_a_curve(tmp_path):
    _, error = run("check_curve.py", tmp_path, status=2)
    assert error.startswith(f"error: {tmp_path}: expected a run with losses, found none")


def test_a_damaged_file_is_one_clear_error(tmp_path):
    path = tmp_path / "damaged.bin"
    path.write_bytes(b"\0" * 2000)
    for script, flags in (("generate.py", [path]), ("write_starter_pack.py", ["--init", path, "--output-dir", tmp_path / "x"])):
        _, error = run(script, *flags, status=2)
        assert error.startswith(f"error: {path}: expected a model file (magic 20240326), found magic 0")
        assert "---> HINT: " in error
    assert not (tmp_path / "x").exists()


def test_bench_matmul_ends_with_a_json_line_and_draws(tmp_path):
    flags = ["--implementations", "numpy", "--tokens", "8", "--rounds", "1", "--plot", tmp_path / "rates.png"]
    output, _ = run("bench_matmul.py", *flags)
    record = json.loads(output.splitlines()[-1])
    assert [(total["implementation"], total["precision"]) for total in record["totals"]] == [("numpy", "F32_F32_F32")]
    assert [(row["m"], row["k"], row["n"]) for row in record["rows"] if row["product"] == "fwd"] == [
        *((8, 768, 2304), (8, 768, 768), (8, 768, 3072), (8, 3072, 768)),
        (8, 768, 50304),
    ]
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("bench_matmul.py", ["--implementations", "gemm"], "--implementations: expected some of naive"),
        ("bench_matmul.py", ["--plot", "none/rates.png"], "--plot: expected a .png file in a folder that exists"),
        ("bench_train.py", ["--systems", "tensorflow"], "--systems: expected names of gpt2_jax"),
        ("bench_train.py", ["--model", "d13"], "model descriptor: expected one of d6"),
        ("bench_train.py", ["--sequence-length", "4096"], "--sequence-length 1 to 1024"),
        ("bench_scale.py", ["--devices", "2", "3"], "--devices: expected numbers that divide the largest of them, found 2, 3"),
    ],
)
def test_wrong_flags_of_the_benches_are_one_clear_error(script, flags, message):
    _, error = run(script, *flags, status=2)
    assert message in error


def test_a_command_line_of_llmcs_with_every_flag_trains(tiny_params, tiny_shards, tmp_path):
    write_model_file(tmp_path / "tiny.bin", TINY, tiny_params)
    files = f"-i {tiny_shards[0]} -j {tiny_shards[1]} -e {tmp_path}/tiny.bin -o {tmp_path}/log -y 1"
    numbers = "-n 2 -nk 1 -nm 4 -b 2 -t 16 -d 64 -x 6 -k linear -l 1e-3 -u 2 -q 0.1 -c 0.1 -sl 7 -sg 7 -v 3 -m 5 -s 6 -g 4"
    others = "-h 1 -a 0 -f 0 -w 1 -ge 0 -z 1 -r 2 -lg 5 -pn 1 -pr 0 -pg 1 -pi mpi -ps x -pf y"
    llmc = f"{files} {numbers} {others}"
    assert set(llmc.split()[::2]) == ALL_FLAGS
    output, _ = run("train.py", "--llmc", llmc, cwd=tmp_path)
    assert f"# is here: python {REPOSITORY / 'scripts' / 'train.py'} --train" in output
    assert len(re.findall(r"^step [1-6]/6 \| loss ", output, re.MULTILINE)) == 6
    assert complete_steps(tmp_path / "log") == [4, 6]
    lines = (tmp_path / "log" / "main.log").read_text().splitlines()
    assert [line.split(":")[1].split()[0] + line.split()[1][:4] for line in lines] == [
        *["0tel:", "0trl:", "1trl:", "2trl:", "3tel:", "3trl:", "4trl:", "5trl:", "6tel:"]
    ]
    # The same command again resumes, and finds nothing left to do.
    output, _ = run("train.py", "--llmc", llmc, cwd=tmp_path)
    assert "nothing to do" in output


def test_a_checkpoint_is_written_for_several_processes_and_merged_again(tiny_shards, tmp_path):
    flags = [*TINY_FLAGS, "--train", tiny_shards[0], "--validation", tiny_shards[1], "--total-batch-size", "128"]
    run("train.py", *flags, "--steps", 6, "--dtype", "bfloat16", "--out-dir", tmp_path / "run")
    for folder, processes, zero in (("two", 2, "--zero"), ("whole", 2, "--no-zero"), ("one", 1, "--zero")):
        source = tmp_path / ("run" if folder != "one" else "two")
        data = [] if folder != "one" else ["--train", tiny_shards[0], "--batch-size", 2, "--sequence-length", 16]
        data += ["--total-batch-size", 128]
        output, _ = run(
            *("reshard_checkpoint.py", source, "--processes", processes, "--output-dir", tmp_path / folder, zero, *data)
        )
        assert len(output.splitlines()) == processes
        assert newest_step(tmp_path / folder) == 6

    original, merged = load_checkpoint(tmp_path / "run", 6), load_checkpoint(tmp_path / "two", 6)
    for name in ("params", "m", "v"):
        np.testing.assert_array_equal(getattr(original, name), getattr(merged, name), err_msg=name)
    # Two processes read two micro-batches at a time: after 6 steps of 4 each of them stands at its sample 12.
    states = read_state_files(sorted((tmp_path / "two").glob("state_*")), original.model.layout)
    assert [process.loader.sample_index for process in states.processes] == [12, 12]
    assert states.processes[0].loader.generator.tobytes() != states.processes[1].loader.generator.tobytes()
    # Back to one process everything is as it was: no update was refused.
    for path in (tmp_path / "run").glob("*_00000006*.bin"):
        assert path.read_bytes() == (tmp_path / "one" / path.name).read_bytes()
    resumed, _ = run("train.py", "--resume", "--out-dir", tmp_path / "run", "--steps", 7)
    assert "step 7/7" in resumed

    _, error = run(
        *("reshard_checkpoint.py", tmp_path / "run", "--processes", "3", "--output-dir", tmp_path / "three"), status=2
    )
    assert "a multiple of processes x batch size x sequence length = 96 tokens, found 128" in error
