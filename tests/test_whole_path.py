"""The whole path, as a new user walks it: a wheel in an environment of its own, an empty folder, and every command of the
README's section, in its order. Only the numbers of steps are smaller."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

import pytest

from gpt2_jax.data.kjv import kjv_chapters
from gpt2_jax.llmc.checkpoint_set import complete_steps
from gpt2_jax.llmc.model_file import read_model_file
from gpt2_jax.report.log import RunLog
from gpt2_jax.training.run_record import read_run_record
from tests.conftest import REPOSITORY
from tests.test_readme import README

BLOCK = re.search(r"## The whole path\n.*?```\n(.*?)```", README, re.DOTALL)[1].replace("\\\n", " ")
COMMANDS = [shlex.split(line.partition("  #")[0]) for line in BLOCK.splitlines()]
FEWER = ["--validate-every", "4", "--validation-batches", "2", "--sample-every", "8", "--batch-size", "2"]


def is_of_this_tree(wheel: Path) -> bool:
    """Whether a wheel has the package's Python as it is here."""
    with zipfile.ZipFile(wheel) as archive:
        inside = {
            name: archive.read(name) for name in archive.namelist() if re.fullmatch(r"gpt2_jax/(?!lib/).*\.(py|html)", name)
        }
    package = REPOSITORY / "gpt2_jax"
    here = {
        str(path.relative_to(REPOSITORY)): path.read_bytes() for end in ("py", "html") for path in package.rglob(f"*.{end}")
    }
    return inside == here


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """That of `make wheel`, if it is of this tree; else one without the custom calls, which is made in seconds."""
    for path in REPOSITORY.glob("dist/*.whl"):
        if is_of_this_tree(path):
            return path
    pytest.importorskip("scikit_build_core", reason="no wheel: neither make wheel nor scikit-build-core has been here")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    without_library = ["cmake.define.CMAKE_CXX_COMPILER=NOTFOUND", f"build-dir={folder / 'build'}"]
    command += [f"--config-settings={setting}" for setting in without_library]
    subprocess.run([*command, str(REPOSITORY)], check=True, timeout=300)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> dict[str, str]:
    """Of a shell in which the wheel is installed, and of this project nothing else; its dependencies are those of the tests."""
    root = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root)], check=True, timeout=120)
    python = root / "bin" / "python"
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        str(wheel),
    ]
    subprocess.run(install, check=True, timeout=300)
    found = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True
    )
    # As plain folders: the editable installation of the checkout, which a .pth file there announces, is not seen.
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    Path(found.stdout.strip(), "dependencies.pth").write_text("\n".join(others) + "\n", encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    path = f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "PATH": path, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


def with_few_steps(words: list[str], steps: int) -> list[str]:
    if "--steps" in words:
        at = words.index("--steps")
        words = words[:at] + words[at + 2 :]
    return [*words, "--steps", str(steps), *([] if "--resume" in words else FEWER)]


def served(words: list[str], folder: Path, environment: dict[str, str]) -> dict:
    """What the server of a command answers to one request; it is then ended as by Ctrl-C."""
    command = [*words, "--port", "0"]
    with subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            lines = iter(process.stderr.readline, "")
            url = next(found[1] for line in lines if (found := re.search(r"at (http://127\.0\.0\.1:\d+) ", line)))
            body = json.dumps({"prompt": "In the beginning", "max_tokens": 8, "seed": 1}).encode()
            request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=120) as answer:
                found = json.load(answer)
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    return found


def test_every_command_of_the_readme_in_an_empty_folder(environment, tmp_path):
    (tmp_path / "my_book.txt").write_text("\n".join(kjv_chapters()[:60]), encoding="utf-8")
    outputs, answer, trained = {}, {}, 0
    for words in COMMANDS:
        if words[1] == "serve":
            answer = served(words, tmp_path, environment)
            continue
        if words[1] == "train":
            trained += 1
            words = with_few_steps(words, 12 if "--resume" in words else 8)
        ended = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert ended.returncode == 0, f"{shlex.join(words)}\n{ended.stdout}\n{ended.stderr}"
        outputs[words[1]] = ended.stdout

    book, tuned = tmp_path / "runs" / "book", tmp_path / "runs" / "tuned"
    page = (book / "report.html").read_text(encoding="utf-8")
    assert all(each in page for each in ("book", "And the LORD said", "learning_rate"))
    assert (book / "report.png").read_bytes().startswith(b"\x89PNG")
    assert outputs["generate"].startswith("In the beginning")
    assert len(outputs["generate"]) > len("In the beginning\n")
    assert 0 < json.loads(outputs["evaluate"])["text"]["loss"] < 8
    assert complete_steps(book) == [8]
    assert (tmp_path / "book.bin").read_bytes() == (book / "model_00000008.bin").read_bytes()

    assert trained == 3
    assert complete_steps(tuned)[-1] == 12
    assert [record["step"] for record in RunLog(tuned / "log.jsonl").records("train")] == list(range(1, 13))
    settings = read_run_record(tuned / "run_00000012.json").settings["optimizer"]
    config, before = read_model_file(tmp_path / "book.bin")
    _, after = read_model_file(tuned / "model_00000012.bin")
    frozen = set(settings["freeze"].split(","))
    for name, tensor in config.layout.views(before).items():
        assert (tensor == config.layout.views(after)[name]).all() == (name in frozen), name

    assert answer["model"] == "tuned"
    assert answer["usage"]["completion_tokens"] > 0
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("all but this is done: transformers is not installed, which loads the Hugging Face folder")
    program = (
        "import transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained('book-hf')\n"
        "ids = transformers.AutoTokenizer.from_pretrained('book-hf')('In the beginning').input_ids\n"
        "print(model.num_parameters(), len(ids))\n"
    )
    loaded = subprocess.run(
        ["python", "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert loaded.returncode == 0, loaded.stderr
    parameters, tokens = map(int, loaded.stdout.split())
    assert parameters == config.layout.num_true_parameters
    assert 3 <= tokens < len("In the beginning")
