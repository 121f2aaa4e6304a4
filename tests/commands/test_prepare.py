"""prepare_data as a command: memory, names, what it says, and what is left when it is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from gpt2_jax.commands import prepare
from gpt2_jax.data.kjv import kjv_chapters
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc.loader import TokenLoader
from gpt2_jax.llmc.token_shard import open_token_shard

MEGABYTE = 2**20
# Prints how far the process's peak of resident memory rose from the first source to the second. Linux counts a process's
# peak from that of the process which started it, so a small one stands in between.
START = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]], check=True)"
MEASURE = """
import resource, sys
from gpt2_jax.commands import prepare
peaks = []
for source in sys.argv[2:]:
    prepare.main(["--source", source, "--output-dir", sys.argv[1]])
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
print(peaks[1] - peaks[0])
"""


def test_memory_does_not_grow_with_the_text(tmp_path):
    """Of 24 MB less than half may be there at once; 17 bytes a byte of text were, and would be 400 MB here."""
    text = "\n\n".join(kjv_chapters())
    assert len(text) > 4_000_000
    (tmp_path / "small.txt").write_text(text[: 2 * MEGABYTE], encoding="utf-8")
    (tmp_path / "large.txt").write_text(text * 6, encoding="utf-8")
    command = [sys.executable, "-c", START, MEASURE, tmp_path / "out", tmp_path / "small.txt", tmp_path / "large.txt"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert int(output.splitlines()[-1]) < 12 * MEGABYTE
    assert open_token_shard(tmp_path / "out" / "large_train.bin").size > 5_000_000


def test_a_source_that_is_not_there_brings_the_nearest_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my book.txt").write_text("In the beginning")
    for typed, meant in (("tinyshakespear", "tinyshakespeare"), ("mybook.txt", "'my book.txt'"), ("zzz", "kjv")):
        with pytest.raises(Gpt2JaxError, match=f"{typed}: expected a text file, found no such file") as refused:
            prepare.main(["--source", typed])
        assert refused.value.hint == f"--source {meant}"
    (tmp_path / "short.txt").write_text("In")
    with pytest.raises(Gpt2JaxError) as refused:
        prepare.main(["--source", "short.txt"])
    assert "kjv" not in str(refused.value)


def test_nanogpts_file_is_named_by_its_folder(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "openwebtext"
    folder.mkdir()
    for name in ("train", "val"):
        np.arange(30, dtype="<u2").tofile(folder / f"{name}.bin")
    prepare.main(["--source", str(folder), "--source-format", "nanogpt", "--output-dir", str(tmp_path / "out")])
    assert f"taking over the tokens of {folder}/train.bin and {folder}/val.bin ..." in capsys.readouterr().out
    monkeypatch.chdir(folder)
    prepare.main(["--source", "train.bin", "--source-format", "nanogpt", "--output-dir", str(tmp_path / "out")])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["openwebtext_train.bin", "openwebtext_val.bin"]
    assert capsys.readouterr().out.splitlines() == [
        "taking over the tokens of train.bin and val.bin ...",
        f"{tmp_path}/out/openwebtext_train.bin: 30 tokens",
        f"{tmp_path}/out/openwebtext_val.bin: 30 tokens",
    ]


def test_a_run_that_is_cut_is_announced(tmp_path, capsys):
    (tmp_path / "wide.txt").write_text("word " * 100 + " " * 20_000 + "word", encoding="utf-8")
    prepare.main(["--source", str(tmp_path / "wide.txt"), "--output-dir", str(tmp_path)])
    said = capsys.readouterr().out
    assert f"note: {tmp_path}/wide.txt: 1 run of more than 16,384 characters of one kind" in said
    assert said.isascii()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_killed_leaves_the_old_shards(tmp_path, number):
    source, out = tmp_path / "mine.txt", tmp_path / "out"
    source.write_text("old text " * 100, encoding="utf-8")
    command = [sys.executable, "scripts/prepare_data.py", "--source", source, "--output-dir", out]
    subprocess.run(command, check=True, capture_output=True)
    old = {path.name: path.read_bytes() for path in out.iterdir()}
    assert sorted(old) == ["mine_train.bin", "mine_val.bin"]
    source.write_text("new text " * 10_000_000, encoding="utf-8")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not any(path.stat().st_size > 100_000 for path in out.glob(".mine.partial/train_000001.bin")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate()
    assert process.returncode != 0
    # What a run reads is what was there; a half-written file has a name that no pattern finds.
    assert [TokenLoader(str(out / f"mine_{split}*.bin"), 1, 8, vocab_size=50257).paths for split in ("train", "val")] == [
        [str(out / "mine_train.bin")],
        [str(out / "mine_val.bin")],
    ]
    assert {name: (out / name).read_bytes() for name in old} == old
    # The next one removes what is left.
    source.write_text("new text " * 100, encoding="utf-8")
    subprocess.run(command, check=True, capture_output=True)
    assert {path.name for path in out.iterdir()} == {*old}
