"""llm.c's own command line (train_gpt2cu), translated into the flags of scripts/train.py."""

from __future__ import annotations

import glob
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc.model_file import read_model_dtype
from gpt2_jax.names import nearest

_PROGRAM = "train_gpt2cu"
_HELLASWAG = "dev/data/hellaswag/hellaswag_val.bin"  # where llm.c looks for it
_DEFAULTS = {
    "-i": "dev/data/tinyshakespeare/tiny_shakespeare_train.bin",
    "-j": "dev/data/tinyshakespeare/tiny_shakespeare_val.bin",
    "-e": "gpt2_124M_bf16.bin",
    "-g": "64",
    "-r": "1",
}
# Flags whose value is taken over as it is.
_TEXTS = {"-i": "--train", "-j": "--validation", "-e": "--init", "-k": "--schedule"}
_INTEGERS = {
    "-n": "--checkpoint-every",
    "-nk": "--keep-checkpoints",
    "-nm": "--major-checkpoint-every",
    "-b": "--batch-size",
    "-t": "--sequence-length",
    "-u": "--warmup-steps",
    "-v": "--validate-every",
    "-m": "--validation-batches",
    "-s": "--sample-every",
}
_NUMBERS = {
    "-l": "--learning-rate",
    "-q": "--final-learning-rate-fraction",
    "-c": "--weight-decay",
    "-sl": "--skip-loss-z",
    "-sg": "--skip-gradient-z",
}
_RECOMPUTE = ("none", "gelu", "layernorm")
# Flags that change no result, and why.
_WITHOUT_EFFECT = {
    "-lg": "no telemetry is printed",
    "-ge": "the compiler decides what it fuses",
}
_OF_PROCESSES = ("-pn", "-pr", "-pg", "-pi", "-ps", "-pf")
_PORT = 12345  # at which llm.c's process 0 listens


class Translation(NamedTuple):
    arguments: list[str]  # for scripts/train.py
    remarks: list[str]  # on what has no effect here, or another one


def translate(command_line: str) -> Translation:
    """The arguments that give llm.c's run of this command line, with or without the program's name in front.

    Raises Gpt2JaxError, naming the flag, for a flag that llm.c does not have, for a value that llm.c would misread, and
    for processes that find one another by a file.
    """
    given = _pairs(command_line)
    values = _DEFAULTS | given
    arguments: list[str] = []
    remarks: list[str] = []
    if "-i" in given and "-j" not in given:
        remarks.append(f"without -j llm.c validates on {values.pop('-j')}; here on the shards beside -i")
    for flag, value in values.items():
        if flag in _TEXTS:
            arguments += [_TEXTS[flag], value]
        elif flag in _INTEGERS:
            arguments += [_INTEGERS[flag], str(_integer(flag, value))]
        elif flag in _NUMBERS:
            arguments += [_NUMBERS[flag], str(_number(flag, value))]
        elif flag in _WITHOUT_EFFECT:
            remarks.append(f"{flag} {value} has no effect: {_WITHOUT_EFFECT[flag]}")
        elif flag not in _OF_PROCESSES:
            more, remark = _SPECIAL[flag](value)
            arguments += more
            remarks += [f"{flag} {value}: {remark}"] if remark else []
    dtype = _dtype(values["-e"])
    arguments += ["--dtype", dtype]
    if given.get("-f") == "0" and dtype == "float32":
        arguments += ["--matmul-precision", "highest"]
    arguments += _folder(given)
    arguments += _processes(given, remarks)
    if "-o" not in given:
        remarks.append("without -o llm.c keeps nothing; here the run has a folder, with the last step's checkpoint")
    elif _integer("-n", given.get("-n", "0")) == 0:
        remarks.append("without -n llm.c writes no checkpoint; here the last step has one")
    return Translation(arguments, remarks)


def _pairs(command_line: str) -> dict[str, str]:
    """Flags and their values. As in llm.c the last value counts where a flag is given twice."""
    try:
        words = shlex.split(command_line)
    except ValueError as error:
        raise Gpt2JaxError(f"--llmc: expected a command line, found {command_line!r}: {error}") from None
    if words and Path(words[0]).name == _PROGRAM:
        words = words[1:]
    known = [*_TEXTS, *_INTEGERS, *_NUMBERS, *_WITHOUT_EFFECT, *_OF_PROCESSES, *_SPECIAL]
    for flag in words[::2]:
        if flag not in known:
            instead = " or ".join(nearest(flag, known, count=3)) or f"one of {' '.join(sorted(known))}"
            raise Gpt2JaxError(f"--llmc: expected flags of {_PROGRAM}, found {flag!r}", instead)
    if len(words) % 2:
        raise Gpt2JaxError(f"--llmc: expected a value after {words[-1]}, found none")
    # Their values are numbers and paths. In quotes no shell expands `~`.
    return dict(zip(words[::2], map(os.path.expanduser, words[1::2]), strict=True))


def _integer(flag: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise Gpt2JaxError(f"--llmc: expected an integer after {flag}, found {value!r} (llm.c would take it for 0)") from None


def _number(flag: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise Gpt2JaxError(f"--llmc: expected a number after {flag}, found {value!r} (llm.c would take it for 0)") from None


def _switch(flag: str, value: str) -> bool:
    if value not in ("0", "1"):
        raise Gpt2JaxError(f"--llmc: expected 0 or 1 after {flag}, found {value!r}")
    return value == "1"


_Special = Callable[[str], tuple[list[str], str]]  # value -> arguments, remark


def _total_batch(value: str) -> tuple[list[str], str]:
    tokens = _integer("-d", value)
    return ([], "") if tokens == -1 else (["--total-batch-size", str(tokens)], "")


def _steps(value: str) -> tuple[list[str], str]:
    steps = _integer("-x", value)
    if steps == 0 or steps < -1:
        raise Gpt2JaxError(f"--llmc: expected a number of steps, or -1 for one epoch, after -x, found {steps}")
    return ([], "") if steps == -1 else (["--steps", str(steps)], "")


def _sample_tokens(value: str) -> tuple[list[str], str]:
    tokens = _integer("-g", value) - 1  # llm.c counts the end-of-text token that it begins with
    return (["--sample-tokens", str(tokens)], "") if tokens > 0 else (["--sample-every", "0"], "no token is sampled")


def _hellaswag(value: str) -> tuple[list[str], str]:
    if not _switch("-h", value):
        return [], ""
    if os.path.exists(_HELLASWAG):
        return ["--hellaswag", _HELLASWAG], ""
    return [], f"{_HELLASWAG} is not there; as llm.c does, the run goes without"


def _overfit(value: str) -> tuple[list[str], str]:
    return (["--overfit-one-batch"] if _switch("-a", value) else []), ""


def _tf32(value: str) -> tuple[list[str], str]:
    _switch("-f", value)
    return [], "" if value == "0" else "TF32 is left to the device"


def _master_weights(value: str) -> tuple[list[str], str]:
    return (["--master-weights"] if _switch("-w", value) else ["--no-master-weights"]), ""


def _recompute(value: str) -> tuple[list[str], str]:
    level = _integer("-r", value)
    if not 0 <= level < len(_RECOMPUTE):
        raise Gpt2JaxError(f"--llmc: expected 0, 1 or 2 after -r, found {level}")
    return ["--recompute", _RECOMPUTE[level]], ""


def _nothing(value: str) -> tuple[list[str], str]:
    return [], ""  # said by _folder, which needs -o and -y together


def _zero(value: str) -> tuple[list[str], str]:
    stage = _integer("-z", value)
    if stage in (0, 1):
        return ["--zero", str(stage)], ""
    return ["--zero", "0"], "llm.c has no stages but 0 and 1, and takes 0"


_SPECIAL: dict[str, _Special] = {
    "-d": _total_batch,
    "-x": _steps,
    "-g": _sample_tokens,
    "-h": _hellaswag,
    "-a": _overfit,
    "-f": _tf32,
    "-w": _master_weights,
    "-r": _recompute,
    "-z": _zero,
    "-o": _nothing,
    "-y": _nothing,
}


def _dtype(init: str) -> str:
    """llm.c computes in what it was compiled for: bfloat16, unless a float32 model file says otherwise."""
    try:
        return read_model_dtype(init)
    except Gpt2JaxError:
        return "bfloat16"  # a descriptor, or a file that is the trainer's to refuse


def _folder(given: dict[str, str]) -> list[str]:
    """The flags for -o and -y: with -y 1 the run in the folder is resumed if it has a checkpoint, else a new one begins."""
    folder = given.get("-o")
    resume = _switch("-y", given.get("-y", "0"))
    if folder is None:
        if resume:
            raise Gpt2JaxError("--llmc: expected a folder to resume from, found -y 1 without -o", "-y 1 -o DIR")
        return []
    if resume and glob.glob("DONE_*", root_dir=folder):
        return ["--resume", "--out-dir", folder]
    return ["--out-dir", folder]


def _processes(given: dict[str, str], remarks: list[str]) -> list[str]:
    """The flags for llm.c's ways to start several processes: by -pi mpi (its default) mpirun says how many there are, by tcp
    -pn, -pr and -ps do, and fs cannot be had."""
    number, rank = _integer("-pn", given.get("-pn", "1")), _integer("-pr", given.get("-pr", "0"))
    method, server = given.get("-pi", "mpi"), given.get("-ps", "")
    if not 0 <= rank < number:
        raise Gpt2JaxError(f"--llmc: expected after -pr one of 0 to -pn - 1 = {number - 1}, found {rank}", "-pr 0")
    if method not in ("mpi", "tcp", "fs"):
        raise Gpt2JaxError(f"--llmc: expected mpi, tcp or fs after -pi, found {method!r}", "-pi tcp")
    if number == 1:
        names = [flag for flag in _OF_PROCESSES if flag in given and flag not in ("-pn", "-pr")]
        remarks += [f"{flag} {given[flag]} has no effect: there is one process" for flag in names]
        return []
    if method == "fs":
        raise Gpt2JaxError(
            "--llmc: expected processes that find one another by an address, found -pi fs, which does by a file that may be "
            "an earlier run's",
            f"-pi tcp -ps HOST   (HOST is where process 0 runs; here --coordinator HOST:{_PORT})",
        )
    remarks += [f"{flag} {given[flag]} has no effect: each process has one device" for flag in ("-pg",) if flag in given]
    stage = [] if "-z" in given else ["--zero", "0"]  # llm.c's default
    if method == "mpi":
        remarks.append(f"mpirun says how many processes there are, not -pn {number}")
        return ["--distributed", "mpi", *stage]
    if not server:
        raise Gpt2JaxError("--llmc: expected the address of process 0 after -ps with -pi tcp, found no -ps", "-ps HOST")
    return ["--coordinator", f"{server}:{_PORT}", "--processes", str(number), "--process-id", str(rank), *stage]
