"""bench_train.py: the systems compute the same, are counted right, and every ending is told."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
import time

import jax
import pytest

from gpt2_jax.benchmark import floor, gpu, machine, peak, train, train_report, train_rounds, train_system
from gpt2_jax.benchmark.records import recording
from gpt2_jax.benchmark.train_report import System, Workload
from gpt2_jax.benchmark.train_system import Request, Result, Turn, measure_system
from gpt2_jax.buffer import adamw as optimizer
from gpt2_jax.compute.flops import flops_per_token
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2Config, config_from_descriptor
from gpt2_jax.ops.matmul import IMPLEMENTATIONS

# A vocabulary that is its own padding, so that the peers' softmax is over the same tokens.
CONFIG = GPT2Config(max_sequence_length=16, vocab_size=256, num_layers=1, num_heads=2, channels=32)
WORK = Workload("tiny", CONFIG, batch_size=3, sequence_length=16, backend="cpu")


def request(name, dtype="float32", **changes):
    standard = Request(
        name, "auto" if name == "gpt2_jax" else "", dtype, "default", "cpu", dataclasses.asdict(CONFIG), 3, 16, 3
    )
    return dataclasses.replace(standard, **changes)


@pytest.fixture
def users_jax():
    """The peers are written as a user writes JAX, who has none of the tests' strictness."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def names(backend, quick=False):
    return list(dict.fromkeys(system.name for system in train.select_systems((), quick=quick, backend=backend)))


def test_an_apple_gpu_is_measured_beside_pytorch_on_it_and_mlx():
    assert names("metal") == ["gpt2_jax", "jax_plain", "pytorch", "mlx"]
    assert names("metal", quick=True) == ["gpt2_jax", "jax_plain", "pytorch", "mlx"]
    assert "mlx" not in names("cpu") + names("cuda")
    assert [str(system) for system in train.select_systems(["mlx:float32"], quick=False, backend="cpu")] == ["mlx:float32"]


@pytest.mark.parametrize("name", ["pytorch", "mlx"])
def test_a_peer_that_sees_no_apple_gpu_is_refused(name):
    if sys.platform == "darwin":
        pytest.skip("here is one, or may be")
    pytest.importorskip({"pytorch": "torch", "mlx": "mlx.core"}[name])
    with pytest.raises(NotImplementedError, match="sees no Apple GPU"):
        measure_system(request(name, backend="metal"))


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_systems_compute_the_same(users_jax, dtype):
    results = {name: measure_system(request(name, dtype)) for name in ("gpt2_jax", "jax_plain", "pytorch")}
    ours = results["gpt2_jax"].losses
    assert len(ours) == 5
    assert ours[-1] < ours[0] - 1e-3
    # float32: four steps of roundings; bfloat16: 2^-8 of logits that are about 0.1 large, with no bias to one side.
    tolerance = 2e-6 if dtype == "float32" else 2.0**-8 * 0.1
    for name, result in results.items():
        assert result.losses == pytest.approx(ours, abs=tolerance * ours[0]), name
        assert len(result.seconds) == 3
        assert result.peak_memory_bytes > 50_000_000
    assert results["gpt2_jax"].estimated_bytes > 4 * 4 * CONFIG.layout.num_parameters
    assert [name for name, _ in results["gpt2_jax"].plan][:2] == ["compute", "matmul"]
    assert results["gpt2_jax"].compiled_bytes > 4 * 4 * CONFIG.layout.num_parameters


@pytest.mark.torch
def test_the_peers_optimizer_is_this_projects():
    from gpt2_jax.benchmark import pytorch_model

    names = ("BETA1", "BETA2", "EPSILON", "GRADIENT_CLIP")
    assert [getattr(pytorch_model, name) for name in names] == [getattr(optimizer, name) for name in names]


@pytest.mark.torch
def test_micro_batches_are_added_up(users_jax):
    """Two of three sequences train as one of six would that has the same tokens."""
    two, one = (request("gpt2_jax", batch_size=size, micro_batches=count) for size, count in ((3, 2), (6, 1)))
    losses = measure_system(two).losses
    assert losses == pytest.approx(measure_system(one).losses, abs=2e-6 * losses[0])
    assert measure_system(dataclasses.replace(two, name="pytorch")).losses == pytest.approx(losses, abs=2e-6 * losses[0])


# As llm.c: it divides by the interval of its validations, and leaves it to the C library when its lines are written.
TRAINER = """#!{python}
import sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
assert flags["-d"] == "96", flags
for step in range(1, 1000):
    if (step - 1) % int(flags["-v"]) == 0:
        print("val loss 11.0")
    time.sleep(0.02)
    print(f"step {{step:4d}}/1000 | loss {{9 - step / 100:f}} (+nanz)| norm 1.0 (+nanz)| lr 3.00e-04 | 20.00 ms")
    {then}
"""


def llmc_trainer(folder, then=""):
    path = folder / "train_gpt2cu"
    path.write_text(TRAINER.format(python=sys.executable, then=then), encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(sys.platform == "win32", reason="llm.c's trainer for NVIDIA GPUs is a program of Linux")
def test_llmcs_trainer_waits_for_its_turns(tmp_path):
    trainer = llmc_trainer(tmp_path)
    turns = iter([(0.0, Turn(3, 1e9)), (0.5, Turn(3, 1e9)), (0.0, None)])

    def await_turn(peak_bytes):
        assert peak_bytes == 0  # without nvidia-smi
        seconds, turn = next(turns)
        time.sleep(seconds)
        return turn

    asked = request(
        "llmc", "bfloat16", matmul="", backend="cuda", steps=6, micro_batches=2, model_name="d12", llmc_program=trainer
    )
    result = measure_system(asked, await_turn)
    assert len(result.seconds) == 6
    assert all(0.01 < seconds < 0.2 for seconds in result.seconds)
    # It made no steps in the half second in which it waited: one by the time that it was stopped, perhaps.
    assert result.losses == pytest.approx([9 - step / 100 for step in range(1, 10)], abs=0.011)
    ends = llmc_trainer(tmp_path, then='sys.exit("no more tokens")')
    with pytest.raises(RuntimeError, match="found at its end: no more tokens"):
        measure_system(dataclasses.replace(asked, llmc_program=ends))
    with pytest.raises(NotImplementedError, match=r"--llmc-program"):
        measure_system(dataclasses.replace(asked, llmc_program=""))
    with pytest.raises(NotImplementedError, match="in bfloat16"):
        measure_system(dataclasses.replace(asked, backend="cpu"))


def test_what_the_gpu_does_in_a_systems_turns(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '1755, 693.50, 61, 54321'\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    started = time.monotonic()
    with gpu.Watch() as watch:
        while watch.during([(started, time.monotonic())]) is None:
            time.sleep(0.01)
    assert watch.during([(started, time.monotonic())]) == gpu.Sample(1755.0, 693.5, 61.0, 54321 * 2**20)
    assert watch.during([(0.0, started - 1)]) is None
    for text in ("echo '[N/A], 1, 2, 3'", "exit 9", "echo"):
        program.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        assert gpu.look() is None
    # The GPU that CUDA shows to the systems, not the machine's first.
    program.write_text('#!/bin/sh\ncase "$*" in *--id=3*) echo 7 ;; esac\n', encoding="utf-8")
    assert gpu.used_memory() == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert gpu.used_memory() == 7 * 2**20


def interrupted(*_):
    raise KeyboardInterrupt


def test_a_record_has_all_that_repeats_it(monkeypatch, capsys, tmp_path):
    answers_by_name(monkeypatch, {"pytorch": answer("pytorch")})
    folder = tmp_path / "records" / "first"
    words = ["--systems", "pytorch:float32", "--record", "docs/records/first", "--llmc-program", "/home/janedoe/train_gpt2cu"]
    with recording(str(folder), words) as picture:
        train.bench_train(WORK, ["pytorch:float32"], plot=picture)
    shown = capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {"README.md", "figures.json", "log.txt", "steps.png"}
    assert (folder / "log.txt").read_text(encoding="utf-8").splitlines()[-1] == shown.splitlines()[-1]
    assert json.loads((folder / "figures.json").read_text(encoding="utf-8")) == json.loads(shown.splitlines()[-1])
    text = (folder / "README.md").read_text(encoding="utf-8")
    command = "gpt2-jax bench-train --systems pytorch:float32 --record docs/records/first --llmc-program train_gpt2cu"
    assert f"- command: `{command}`\n" in text
    assert "- machine: " in text
    assert f"jax {jax.__version__}" in text.partition("- libraries: ")[2].splitlines()[0]
    assert "pytorch" in text.split("```")[1]
    with pytest.raises(Gpt2JaxError, match="--record: expected to make the folder") as refused, recording(str(folder), []):
        pass
    assert refused.value.hint == f"--record {folder}-2"
    broken = tmp_path / "broken"
    monkeypatch.setattr(train, "measure_in_turn", interrupted)
    with pytest.raises(KeyboardInterrupt), recording(str(broken), []):
        train.bench_train(WORK, ["pytorch:float32"])
    assert [path.name for path in broken.iterdir()] == ["log.txt"]
    assert "48 tokens a training step" in (broken / "log.txt").read_text(encoding="utf-8")


def test_no_step_begins_without_a_turn():
    turns = iter([Turn(3, 1e9), Turn(5, 0.0), Turn(2, 1e9), None])
    result = measure_system(request("pytorch", steps=50), lambda _: next(turns))
    # The first, one before each turn, and those that are timed.
    assert (len(result.seconds), len(result.losses)) == (3 + 1 + 2, 1 + 3 + 1 + 2 + 3)
    result = measure_system(request("pytorch", steps=50), lambda _: None)
    assert len(result.seconds) == len(result.losses) == 1
    result = measure_system(request("pytorch", steps=2), lambda _: Turn(5, 1e9))
    assert (len(result.seconds), len(result.losses)) == (2, 4)


def test_a_custom_call_that_cannot_be_had_is_a_reason():
    with pytest.raises(NotImplementedError, match=r"--matmul simd.*not on cuda") as error:
        refuse_custom_calls(lambda: measure_system(request("gpt2_jax", matmul="simd")))
    assert "HINT" not in str(error.value)


def refuse_custom_calls(call):
    """Run it where there are no custom calls."""
    from gpt2_jax.compute import backend

    with pytest.MonkeyPatch.context() as patch:
        accelerator = backend.Backend("cuda", "cpu", "a test", frozenset({"custom_calls"}))
        patch.setattr(train_system, "select_backend", lambda _: accelerator)
        patch.setattr(train_system, "open_device", lambda *_: "a test")
        return call()


def test_flops_are_llmcs_and_nanogpts():
    config = config_from_descriptor("d12")
    assert config.layout.num_parameters == 124_475_904
    assert flops_per_token(config, 1024) == 6 * 124_475_904 + 6 * 12 * 768 * 1024 == 803_478_528
    assert train_report.nanogpt_flops_per_token(config, 1024) == 6 * (124_475_904 - 1024 * 768) + 12 * 12 * 768 * 1024


def select(*patterns, quick=False, backend="cpu"):
    return [str(system) for system in train.select_systems(patterns, quick=quick, backend=backend)]


def test_systems_by_default():
    peers = [f"{name}:{dtype}" for name in ("jax_plain", "pytorch", "pytorch_compiled") for dtype in ("float32", "bfloat16")]
    ours = [f"gpt2_jax:{matmul}:{dtype}" for matmul in IMPLEMENTATIONS for dtype in ("float32", "bfloat16")]
    place = ours.index("gpt2_jax:amx:bfloat16")
    ours[place:place] = ["gpt2_jax:amx:float32:high", "gpt2_jax:amx:float32:highest"]  # in three passes, and in six alone
    assert select() == ours + peers
    auto = ["gpt2_jax:auto:float32", "gpt2_jax:auto:bfloat16"]
    assert select(backend="cuda") == [
        *("gpt2_jax:auto:float32", "gpt2_jax:auto:float32:highest", "gpt2_jax:auto:bfloat16"),
        *("pytorch_best:bfloat16", "llmc:bfloat16", "jax_plain:float32", "jax_plain:bfloat16"),
        *("pytorch:float32", "pytorch:float32:highest", "pytorch:bfloat16"),
        *("pytorch_compiled:float32", "pytorch_compiled:float32:highest", "pytorch_compiled:bfloat16"),
    ]
    assert select("pytorch_tuned", backend="cuda") == ["pytorch_tuned:bfloat16"]
    assert select(quick=True) == [*auto, "jax_plain:float32", "pytorch:float32", "pytorch:bfloat16"]


def test_systems_by_name():
    assert select("pytorch") == ["pytorch:float32", "pytorch:bfloat16"]
    assert select("gpt2_jax:simd", "gpt2_jax:auto:bfloat16") == [
        "gpt2_jax:auto:bfloat16",
        "gpt2_jax:simd:float32",
        "gpt2_jax:simd:bfloat16",
    ]
    assert len(select("gpt2_jax:bfloat16")) == len(IMPLEMENTATIONS)
    assert select("high") == ["gpt2_jax:amx:float32:high"]
    assert select("jax_plain", "jax_plain:float32") == ["jax_plain:float32", "jax_plain:bfloat16"]
    for wrong in ("torch", "pytorch:simd", "pytorch:smid", "", "pytorch:"):
        with pytest.raises(Gpt2JaxError, match="--systems: expected names of gpt2_jax, ") as refused:
            select(wrong)
        assert select(*refused.value.hint.removeprefix("--systems ").split())
    with pytest.raises(Gpt2JaxError) as refused:
        select("gpt2_jax:thraded")
    assert refused.value.hint == "--systems gpt2_jax:threaded"


PEAK = {
    "gflops": 100.0,
    "of": "a test",
    "rounds": 3,
    "spread": 0.1,
    "doubtful": False,
    "totals": [{"implementation": "naive", "precision": "F32_F32_F32", "seconds": 95.0}],
    "copy": None,
    "attention": None,
    "no_attention": "a test",
    "rates": None,
}


def answers(monkeypatch, answer_of, *, steps=0):
    """Let the systems' processes answer this after so many turns; and the peak be 100 GFLOP/s. Returns what happens."""
    events = []

    class Process(train_rounds._Process):
        def __init__(self, system, work, steps_asked):
            self.system, self.work, self.turns, self.spans, self.peak_bytes = system, work, 0, [], 1000
            self.seconds = self.ready_seconds = 0.0
            self.answer, self._errors = None, io.StringIO()

        def __exit__(self, *_):
            pass

        def await_turn(self, timeout):
            events.append((self.system.name, self.turns))
            if self.turns >= steps:
                self.answer = answer_of(self.system, self.work)

        def take_turn(self, steps_of_turn, seconds, timeout):
            self.turns += 1
            self.await_turn(timeout)

    monkeypatch.setattr(train_rounds, "_Process", Process)
    monkeypatch.setattr(train, "_measure_peak", lambda *_: PEAK)
    return events


def answers_by_name(monkeypatch, by_name, **options):
    return answers(monkeypatch, lambda system, _: by_name[system.name], **options)


def answer(matmul="xla", seconds=(2.0, 1.0, 4.0), losses=(5.5, 5.4, 5.3, 5.2), **more):
    precisions = {"precision": "F32_F32_F32", "weight_gradient_precision": "F32_F32_F32"}
    result = Result(matmul, list(seconds), 12.5, 3_000_000_000, list(losses), "cpu", **{**precisions, **more})
    return dataclasses.asdict(result)


def test_the_table_and_the_json_line(monkeypatch, capsys, tmp_path):
    ours = answer("threaded", (1.0, 0.9, 1.2), estimated_bytes=2_000_000_000, compiled_bytes=2_200_000_000)
    answers_by_name(monkeypatch, {"gpt2_jax": ours, "pytorch": answer("pytorch"), "jax_plain": {"refused": "no reason"}})
    picture = tmp_path / "steps.png"
    assert train.bench_train(WORK, ["gpt2_jax:auto", "pytorch:float32", "jax_plain:float32"], plot=str(picture))
    *text, last = capsys.readouterr().out.splitlines()
    record = json.loads(last)
    assert {key: record[key] for key in ("bench", "model", "batch_size", "sequence_length")} == {
        "bench": "train",
        "model": "tiny",
        "batch_size": 3,
        "sequence_length": 16,
    }
    assert [(one["name"], one["matmul"], one["dtype"]) for one in record["systems"]] == [
        ("gpt2_jax", "threaded", "float32"),
        ("gpt2_jax", "threaded", "bfloat16"),
        ("pytorch", "pytorch", "float32"),
    ]
    flops = 48 * flops_per_token(CONFIG, 16)
    assert record["systems"][2] == {
        "name": "pytorch",
        "matmul": "pytorch",
        "dtype": "float32",
        "setting": "",
        "group": 1,
        "precision": "F32_F32_F32",
        "weight_gradient_precision": "F32_F32_F32",
        "seconds_per_step": 2.0,
        "steps": 3,
        "spread": 1.5,
        "seconds_p10_p90": [pytest.approx(1.2), pytest.approx(3.6)],
        "gpu": None,
        "tokens_per_second": 24.0,
        "gflops": pytest.approx(flops / 2.0 / 1e9),
        "peak_memory_bytes": 3_000_000_000,
        "compile_seconds": 12.5,
        "times_speed_of": {"gpt2_jax:threaded:float32": 0.5},
        "share_of_floor": None,
    }
    assert record["refused"] == [
        {"name": "jax_plain", "matmul": "", "dtype": "float32", "setting": "", "stage": "", "reason": "no reason"}
    ]
    assert record["matmul_peak_gflops"] == 100.0
    row = next(line.split() for line in text if line.startswith("gpt2_jax "))
    assert row[:6] == ["gpt2_jax", "threaded", "float32", "1.000", "30%", "48"]
    assert row[6] == "~0.50"
    assert f"{flops / 1e9 / 100.0:.1%}" in row
    assert "not jax_plain:float32: no reason" in text
    memory = "memory of gpt2_jax:threaded:float32: 2.00 GB estimated, 2.20 GB (1.10 times that) in the compiled step"
    assert any(line.startswith(memory) for line in text)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_how_float32_is_split_is_named(monkeypatch, capsys):
    x3, x6, s8 = "BF16_BF16_F32_X3", "BF16_BF16_F32_X6", "S8_S8_S32_X6"
    for precision, of_dw, named in ((x3, x3, "amx X3"), (x6, x6, "amx X6"), (s8, x3, "amx S8 dw X3")):
        precisions = {"precision": precision, "weight_gradient_precision": of_dw}
        answers_by_name(monkeypatch, {"gpt2_jax": answer("amx", **precisions)})
        train.bench_train(WORK, ["gpt2_jax:amx:float32:high"])
        *text, last = capsys.readouterr().out.splitlines()
        assert precisions.items() <= json.loads(last)["systems"][0].items()
        assert any(line.split()[: 2 + len(named.split())] == ["gpt2_jax", *named.split(), "float32"] for line in text)


def test_scaling_is_measured_from_256_to_8192_tokens(monkeypatch, capsys):
    config = dataclasses.replace(CONFIG, max_sequence_length=1024)
    asked = []

    def answer_of(system, work):
        asked.append((work.tokens, work.sequence_length, system.matmul, system.dtype))
        return answer("xla", (work.tokens / 1000 * 1.5 ** (work.tokens == 8192),) * 2, estimated_bytes=100, compiled_bytes=100)

    answers(monkeypatch, answer_of)
    train.bench_train(Workload("tiny", config, 4, 64, "cpu"), ["gpt2_jax:auto:bfloat16"], scaling=True)
    assert asked[1:] == [(tokens, 256, "auto", "bfloat16") for tokens in (256, 512, 1024, 2048, 4096, 8192)]
    *text, last = capsys.readouterr().out.splitlines()
    rows = json.loads(last)["scaling"]
    assert [row["batch_size"] * row["sequence_length"] for row in rows] == [256, 512, 1024, 2048, 4096, 8192]
    relative = [line.split()[7] for line in text if line.startswith("bfloat16")]
    assert relative == ["1.00"] * 5 + ["1.50"]


def test_of_one_step_alone_no_ratio_is_told(monkeypatch, capsys):
    answers_by_name(monkeypatch, {"gpt2_jax": answer("threaded", (1.0,)), "pytorch": answer("pytorch")})
    train.bench_train(WORK, ["gpt2_jax:auto:float32", "pytorch:float32"])
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("gpt2_jax "))
    assert row[3:8] == ["1.000", "single", "48", "one", "step"]
    assert row[10:12] == ["one", "step"]  # MFU


def test_a_busy_machine_is_told_before_and_after(monkeypatch, capsys):
    loads = iter([machine.Load(0.02, 0.1), machine.Load(1.5, 2.0)])
    monkeypatch.setattr(train, "measure_load", lambda: next(loads))
    answers_by_name(monkeypatch, {"pytorch": answer("pytorch")})
    train.bench_train(WORK, ["pytorch:float32"])
    *text, last = capsys.readouterr().out.splitlines()
    assert any(line.startswith("before: 0.02 of ") for line in text)
    assert any(line.startswith("load after:  1.50 of ") for line in text)
    assert any(line.startswith("THE MACHINE WAS BUSY WITH OTHER WORK") for line in text)
    assert json.loads(last)["load"]["after"] == {"busy_cpus": 1.5, "average": 2.0}


def test_a_system_that_fails_is_told_and_counts(monkeypatch, capsys):
    answers_by_name(monkeypatch, {"pytorch": {"failed": "RuntimeError: broken"}, "jax_plain": answer()})
    assert not train.bench_train(WORK, ["pytorch:float32", "jax_plain:float32"])
    output = capsys.readouterr().out
    assert "not pytorch:float32: it failed: RuntimeError: broken" in output
    assert len(json.loads(output.splitlines()[-1])["systems"]) == 1


def test_the_json_line_names_nobody(monkeypatch, capsys, tmp_path):
    """The reasons are the last words of processes: of Python, of libraries."""
    monkeypatch.setenv("HOME", str(tmp_path / "janedoe"))
    monkeypatch.setenv("USER", "janedoe")
    monkeypatch.setattr(machine, "processor_name", lambda: "A CPU of janedoe")
    problem = f"OSError: {tmp_path}/janedoe/lib/a.so cannot be loaded for janedoe at 10.0.0.7"
    answers_by_name(monkeypatch, {"pytorch": {"failed": problem}, "jax_plain": {"refused": problem}})
    train.bench_train(WORK, ["pytorch:float32", "jax_plain:float32"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert "janedoe" not in last
    assert [one["reason"].removeprefix("it failed: ") for one in json.loads(last)["refused"]] == [
        "OSError: <path> cannot be loaded for <user> at <address>"
    ] * 2


def test_an_implementation_that_takes_minutes_is_left_out_unless_it_is_named(monkeypatch, capsys):
    names = ("gpt2_jax", "jax_plain", "pytorch", "pytorch_compiled")
    answers_by_name(monkeypatch, {name: answer() for name in names})
    train.bench_train(WORK)
    refused = json.loads(capsys.readouterr().out.splitlines()[-1])["refused"]
    reason = "its products alone take about 95 s a step; --systems gpt2_jax:naive:float32 measures it"
    assert refused == [
        {"name": "gpt2_jax", "matmul": "naive", "dtype": "float32", "setting": "", "stage": "", "reason": reason}
    ]
    train.bench_train(WORK, ["gpt2_jax:naive:float32"])
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["systems"]) == 1


def test_a_peak_that_cannot_be_measured_is_one_clear_error(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "Traceback ...\nMemoryError\n")
    monkeypatch.setattr(train.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(Gpt2JaxError, match=r"the matrix products alone: .*MemoryError"):
        train.bench_train(WORK)


@pytest.mark.parametrize(
    ("work", "options"),
    [
        (dataclasses.replace(WORK, sequence_length=17), {}),
        (dataclasses.replace(WORK, batch_size=0), {}),
        (dataclasses.replace(WORK, micro_batches=0), {}),
        (WORK, {"steps": 0}),
        (WORK, {"plot": "no/such/folder/a.png"}),
    ],
)
def test_impossible_settings_are_refused_before_anything_runs(work, options, capsys):
    with pytest.raises(Gpt2JaxError, match="expected"):
        train.bench_train(work, **options)
    assert capsys.readouterr().out == ""


PYTORCH = System("pytorch", "", "float32")


def in_turn(*systems, work=WORK, **limits):
    return train_rounds.measure_in_turn(systems, work, 2, train_rounds.TurnLimits(**limits), lambda text: None)


@pytest.mark.torch
def test_each_system_runs_in_a_process_of_its_own(monkeypatch, tmp_path):
    """A system's answer, a refusal, a failure, and one that does not end in time."""
    plain, pytorch = in_turn(System("jax_plain", "", "float32"), PYTORCH)
    assert [one.result.matmul for one in (plain, pytorch)] == ["xla", "pytorch"]
    assert [len(one.result.seconds) for one in (plain, pytorch)] == [2, 2]
    assert [len(one.result.losses) for one in in_turn(PYTORCH, seconds=0.0)] == [1]
    assert in_turn(PYTORCH, deadline=0.0)[0].reason == "no time was left for it"
    soon = machine.seconds_running() + 0.2
    monkeypatch.setattr(train_rounds, "_ENDING", 0.1)
    assert "had not ended after 0 seconds" in in_turn(PYTORCH, deadline=soon)[0].reason
    monkeypatch.undo()
    (failed,) = in_turn(System("jax_plain", "", "float32"), work=dataclasses.replace(WORK, backend="quantum"))
    assert failed.failed
    assert "KeyError: 'quantum'" in failed.reason
    (tmp_path / "torch.py").write_text("raise ImportError", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path) + os.pathsep + os.environ.get("PYTHONPATH", ""))
    (missing,) = in_turn(PYTORCH)
    assert (missing.failed, missing.reason) == (False, "PyTorch is not installed: pip install -e '.[test]'")


@pytest.mark.parametrize(
    ("backend", "free", "events"),
    [
        ("cpu", 2001, [("jax_plain", 0), ("pytorch", 0), ("jax_plain", 1), ("pytorch", 1), ("jax_plain", 2), ("pytorch", 2)]),
        ("cpu", 2000, [("jax_plain", 0), ("jax_plain", 1), ("jax_plain", 2), ("pytorch", 0), ("pytorch", 1), ("pytorch", 2)]),
        ("cuda", 9999, [("jax_plain", 0), ("jax_plain", 1), ("jax_plain", 2), ("pytorch", 0), ("pytorch", 1), ("pytorch", 2)]),
    ],
)
def test_steps_are_taken_in_turn_where_memory_holds_all_systems(monkeypatch, backend, free, events):
    found = answers_by_name(monkeypatch, {"jax_plain": answer(), "pytorch": answer()}, steps=2)
    monkeypatch.setattr(train_rounds, "free_memory", lambda: free)
    in_turn(System("jax_plain", "", "float32"), PYTORCH, work=dataclasses.replace(WORK, backend=backend))
    assert found == events


def test_a_system_without_memory_beside_the_others_is_measured_after_them(monkeypatch, capsys):
    monkeypatch.setattr(train_rounds, "free_memory", lambda: 9999)
    tries = []

    def answer_of(system, work):
        tries.append(system.name)
        if system.name == "pytorch" and tries.count("pytorch") == 1:
            return {"failed": "OutOfMemoryError: CUDA out of memory.", "no_memory": True}
        return answer()

    answers(monkeypatch, answer_of)
    said = []
    systems = [System("jax_plain", "", "float32"), PYTORCH]
    # The first has not ended when the second asks for memory.
    ready = train_rounds._Process.get_ready
    monkeypatch.setattr(
        train_rounds._Process, "get_ready", lambda self, timeout: self.system is PYTORCH and ready(self, timeout)
    )
    measured = train_rounds.measure_in_turn(systems, WORK, 2, train_rounds.TurnLimits(), said.append)
    assert [(one.system.name, one.group, one.failed) for one in measured] == [("jax_plain", 1, False), ("pytorch", 2, False)]
    assert "pytorch:float32: not enough memory beside the others" in said
    # Alone, it is a failure.
    tries.clear()
    (alone,) = train_rounds.measure_in_turn([PYTORCH], WORK, 2, train_rounds.TurnLimits(), said.append)
    assert (alone.failed, said[-1]) == (True, "pytorch:float32, its last words:")


FLOOR = {"gflops": 718e3, "copy": 3020.0, "attention": 16.7e-3 / 12}  # of an H100


def test_the_floor_is_the_sum_of_what_must_be_done():
    """Against what was measured of the parts on an H100: products 67 ms, classifier 4.4, GELU 4.8, norms 1.7 and 3.2 to 4."""
    config = config_from_descriptor("d12")
    rates = floor.Rates(1e9 * FLOOR["gflops"], 1e9 * FLOOR["copy"], FLOOR["attention"])
    parts = floor.floor_seconds(config, 64, 1024, 1, rates)
    near = {"products": 67.7, "attention": 16.7, "classifier": 4.4, "GELU backward": 4.8, "norms forward": 1.7}
    near |= {"norms backward": 3.3, "bias gradients": 1.2, "AdamW, norm": 1.3}
    assert {name: 1000 * parts[name] for name in near} == pytest.approx(near, abs=0.06)
    assert 101e-3 < sum(parts.values()) < 103e-3
    eight = floor.floor_seconds(config, 64, 1024, 8, rates)
    assert eight["products"] == pytest.approx(8 * parts["products"])
    assert eight["AdamW, norm"] == parts["AdamW, norm"]
    assert set(eight) - set(parts) == {"gradients added up"}


def test_the_report_of_a_gpu(capsys):
    """The floor, the shares of it, and how many times the others' speed: of the same precision, those not in turn marked."""
    work = Workload("d12", config_from_descriptor("d12"), 64, 1024, "cuda")
    sample = gpu.Sample(1700.0, 690.0, 60.0, 0.0)

    def measured(name, dtype, seconds, setting="", group=1):
        matmul = "auto" if name == "gpt2_jax" else ""
        result = Result(**answer("xla", (seconds, seconds)))
        return train_report.Measured(System(name, matmul, dtype, setting), result, gpu=sample, group=group)

    systems = [
        measured("gpt2_jax", "bfloat16", 0.110),
        measured("gpt2_jax", "float32", 0.300),
        measured("gpt2_jax", "float32", 0.900, "highest"),
        measured("pytorch_best", "bfloat16", 0.1254),
        measured("pytorch", "bfloat16", 0.220, group=2),
        measured("pytorch", "float32", 0.330),
        measured("pytorch", "float32", 0.990, "highest"),
    ]
    peaks = PEAK | FLOOR
    lines = train_report.table(systems, [], work, peaks).splitlines()
    (of_floor,) = (line for line in lines if line.startswith("floor in bfloat16: 101.6 ms, 645,"))
    assert "products 67.67, attention 16.70" in of_floor
    first = "gpt2_jax:xla:bfloat16: 110.00 ms (p10 110.00, p90 110.00) at 1700 MHz, 690 W, 60 degrees Celsius, 92.3% of"
    assert any(line.startswith(first) for line in lines)
    speeds = "gpt2_jax:xla:bfloat16, tokens a second: 1.140 x pytorch_best:bfloat16, 2.000 x pytorch:bfloat16 (not in turn)"
    assert speeds in lines
    assert "gpt2_jax:xla:float32:highest, tokens a second: 1.100 x pytorch:float32:highest" in lines
    rows = {tuple(line.split()[:4]): line for line in lines if line.startswith(("gpt2_jax ", "pytorch "))}
    # The ratio of times is to PyTorch in the same precision.
    assert "0.91" in rows["gpt2_jax", "xla", "float32", "0.300"]
    assert "0.91" in rows["gpt2_jax", "xla", "float32", "highest"]
    line = train_report.record(systems, [], work, peaks, {}, {})
    assert [one["setting"] for one in line["systems"]] == ["", "", "highest", "", "", "", "highest"]
    assert line["systems"][0]["share_of_floor"] == pytest.approx(0.1016 / 0.110, abs=1e-3)
    assert line["systems"][1]["share_of_floor"] is None
    without = train_report.table(systems, [], work, peaks | {"attention": None, "no_attention": "no cuDNN"})
    assert "floor: not known, as attention alone was not measured: no cuDNN" in without


def test_the_floor_on_a_cpu_is_made_of_the_rates_of_this_run():
    """As counted by hand for GPT-2 124M, 4 x 64 tokens: 189.8 GFLOP of products, 1.1 of attention, 3.49 GB of AdamW."""
    work = Workload("d12", config_from_descriptor("d12"), 4, 64, "cpu")
    peaks = PEAK | {"rates": {"F32_F32_F32": 200.0, "BF16_BF16_F32": 400.0, "memory": 50.0}}

    def measured(dtype, precision):
        result = Result(**answer("threaded", (2.0, 2.0), precision=precision))
        return train_report.Measured(System("gpt2_jax", "auto", dtype), result)

    systems = [measured("float32", "F32_F32_F32"), measured("bfloat16", "BF16_BF16_F32"), measured("float32", "S8_S8_S32_X6")]
    lines = train_report.table(systems, [], work, peaks).splitlines()
    (wide,) = (line for line in lines if line.startswith("floor in float32: "))
    assert wide.endswith("(products 949.00, attention 5.28, AdamW 69.71)")
    assert any(line.startswith("floor in bfloat16: 546.9 ms, 468 tok/s") for line in lines)
    assert "gpt2_jax:threaded:float32: 51.2% of the floor's speed" in lines
    assert any(line.startswith("peak of this CPU: 200 in F32_F32_F32, 400 in BF16_BF16_F32 GFLOP/s") for line in lines)
    line = train_report.record(systems, [], work, peaks, {}, {})
    # Float32 that is split into bytes has another floor.
    assert [one["share_of_floor"] for one in line["systems"]] == [
        pytest.approx(0.512, abs=1e-3),
        pytest.approx(0.273, abs=1e-3),
        None,
    ]
    assert line["floor_seconds"]["bfloat16"]["products"] == pytest.approx(0.4745, abs=1e-4)


def test_what_the_floor_is_made_of_can_be_measured(users_jax):
    products = peak._chained_products()
    a = jax.numpy.ones((64, 64), jax.numpy.bfloat16)
    text = products.lower(a, a).compile().as_text()
    # No copy between the products, which a loop would make.
    assert text.count(" dot(") + text.count("custom-call(") + text.count("fusion(") >= peak._PRODUCTS_OF_CALL
    assert "while(" not in text
    model = dataclasses.asdict(CONFIG)
    found = peak._attention(peak.Request("cuda", model, 48, [], 1, 1.0, batch_size=3, sequence_length=16))
    assert found["attention"] is None  # there is no cuDNN on the CPU
    assert found["no_attention"]


def test_free_memory_of_a_mac():
    text = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               10000.
Pages active:                            400000.
Pages inactive:                          300000.
Pages speculative:                         5000.
"""
    assert machine.free_of_vm_stat(text) == 16384 * 310000
    assert machine.free_of_vm_stat("vm_stat: not found") is None


def test_free_memory_is_the_machines_or_the_containers_if_that_is_less(tmp_path):
    assert machine.free_memory(tmp_path) is None
    for name, text in {
        "proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n",
        "sys/fs/cgroup/memory.max": "max\n",
        "sys/fs/cgroup/memory.current": "4000000\n",
        "sys/fs/cgroup/memory.stat": "anon 5\ninactive_file 500000\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert machine.free_memory(tmp_path) == 8000 * 1024
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("6000000\n", encoding="utf-8")
    assert machine.free_memory(tmp_path) == 2_500_000


def test_the_peak_is_the_best_of_the_steps_products():
    found = peak.measure_peak(peak.Request("cpu", dataclasses.asdict(CONFIG), 48, ["xla", "numpy"], 1, None))
    best = max(found["totals"], key=lambda total: total["gflops"])
    assert found["gflops"] == best["gflops"] > 0
    assert found["of"] == f"{best['implementation']} {best['precision']}"
    assert (found["rounds"], found["spread"], found["doubtful"]) == (1, None, False)
    assert found["rates"] is None or min(found["rates"].values()) > 0
    assert len(peak._square_product_seconds(64, 40, 3)) == 3


def test_of_a_doubtful_peak_no_utilization_is_told(monkeypatch, capsys):
    answers_by_name(monkeypatch, {"pytorch": answer("pytorch")})
    monkeypatch.setattr(train, "_measure_peak", lambda *_: PEAK | {"rounds": 1, "spread": None, "doubtful": True})
    train.bench_train(WORK, ["pytorch:float32"])
    text = capsys.readouterr().out
    row = next(line.split() for line in text.splitlines() if line.startswith("pytorch "))
    assert row[9:11] == ["one", "round"]
    assert "in 1 round(s), which differ by single" in text
