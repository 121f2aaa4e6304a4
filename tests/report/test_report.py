"""The report of runs: what is read, what the page holds, and that a browser draws it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_jax.commands import report as command
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.report.log import RunLog
from gpt2_jax.report.page import smoothed, write_page
from gpt2_jax.report.runs import differing_settings, read_run

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
MAIN_LOG = """\
s:0 tel:11.0
s:0 trl:10.9 lr:0.000001 norm:15.34
s:1 trl:10.5 lr:0.000002 norm:12.00
s:1 eval:0.25
s:2 trl:99.0 lr:0.000002 norm:12.00
s:1 trl:10.4 lr:0.000002 norm:11.00
not a line
s:2 tel:10.2
"""


def make_run(folder, losses, *, lr=0.001, text="a sample"):
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(f'[model]\ninit = "d12"\n\n[optimizer]\nlearning_rate = {lr}\n')
    log = RunLog(folder / "log.jsonl", tokens_per_step=512)
    log.write("start", 0, commit="0123456789abcdef" * 2 + "01234567", versions={"jax": "0.10.2"}, machine={"device": "cpu"})
    log.write("validation", 0, loss=losses[0] + 0.1)
    for step, loss in enumerate(losses, start=1):
        log.write("train", step, loss=loss, lr=lr, norm=1.0, seconds=36.0, tokens_per_second=512 / 36)
    log.write("validation", len(losses), loss=losses[-1] + 0.1)
    log.write("sample", len(losses), text=text)
    return folder


def data_of(page) -> dict:
    """What a page has to draw, parsed as a browser does: up to the first end of a script."""
    return json.loads(re.search(r'id="data">(.*?)</script', page.read_text(encoding="utf-8"), re.DOTALL)[1])


def test_a_run_is_shown_by_steps_tokens_and_hours(tmp_path, capsys):
    folder = make_run(tmp_path / "runs" / "one", [3.0, 2.0, 1.0])
    command.main([str(folder)])
    assert capsys.readouterr().out == f"page:    {folder}/report.html\npicture: {folder}/report.png\n"
    (run,) = data_of(folder / "report.html")["runs"]
    train, validation = (curve for curve in run["curves"] if curve["what"] == "loss")
    assert (train["step"], train["values"]) == ([1, 2, 3], [3.0, 2.0, 1.0])
    assert train["tokens"] == [512, 1024, 1536]
    np.testing.assert_allclose(train["hours"], [0.01, 0.02, 0.03])
    assert (validation["step"], validation["tokens"], validation["dots"]) == ([0, 3], [0, 1536], True)
    assert run["results"] == ["3", "1.0000", "1.1000", "1.1000 (step 3)", None, "1,536", "0.03"]
    assert run["origins"] == [[0, "commit 0123456789ab; jax 0.10.2; device cpu"]]
    assert run["samples"] == [[3, "a sample"]]
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")


def test_several_runs_and_llmcs_log_are_laid_over_one_another(tmp_path, capsys):
    folders = [make_run(tmp_path / name / "run", [3.0, 2.0], lr=lr) for name, lr in (("a", 0.001), ("b", 0.002))]
    (tmp_path / "log124M").mkdir()
    (tmp_path / "log124M" / "main.log").write_text(MAIN_LOG)
    page = tmp_path / "compare.html"
    words = [*map(str, folders), str(tmp_path / "log124M"), "--output", str(page), "--picture", str(tmp_path / "p.svg")]
    command.main([*words, "--by", "tokens", "--smoothing", "0.5"])
    data = data_of(page)
    assert [run["name"] for run in data["runs"]] == ["run", "run (2)", "log124M"]
    assert data["settings"] == [["optimizer.learning_rate", "0.001", "0.002", None]]
    assert "not in the picture, as they have no losses by tokens: log124M" in capsys.readouterr().out
    assert ElementTree.parse(tmp_path / "p.svg").getroot().tag.endswith("svg")
    llmc = {(curve["what"], curve["event"]): curve for curve in data["runs"][2]["curves"]}
    assert llmc["loss", "train"]["step"] == [1, 2]
    assert llmc["loss", "train"]["values"] == [10.9, 10.4]  # the log went on from step 1
    assert llmc["loss", "validation"]["values"] == [11.0, 10.2]
    assert llmc["gradient norm", "train"]["values"] == [15.34, 11.0]
    assert llmc["HellaSwag accuracy", "hellaswag"]["values"] == [0.25]
    assert llmc["loss", "train"]["tokens"] is None


def test_what_stands_in_a_log_is_never_a_program(tmp_path):
    """Ends of scripts, tags and line separators in samples, names and settings."""
    evil = "</script><script>document.title='evil'</script><!--\u2028<img src=x onerror=alert(1)>"
    folder = make_run(tmp_path / "<b>run", [1.0], text=evil)
    write_page(tmp_path / "page.html", [read_run(folder)])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.lower().count("<script") == 2
    assert "<img" not in text
    assert "<b>" not in text
    assert data_of(tmp_path / "page.html")["runs"][0]["samples"] == [[1, evil]]
    assert not re.search(r"(src|href)=[\"']?(http|//)", text)  # nothing is loaded


def test_a_long_run_is_shown_by_means(tmp_path):
    folder = make_run(tmp_path / "long", list(np.linspace(9, 1, 9001)))
    write_page(tmp_path / "page.html", [read_run(folder)])
    data = data_of(tmp_path / "page.html")
    curve = data["runs"][0]["curves"][0]
    assert len(curve["values"]) == len(curve["step"]) == 3001
    np.testing.assert_allclose(np.mean(curve["values"][:3000]), np.mean(np.linspace(9, 1, 9001)[:9000]))
    assert "long: each point of loss is the mean of 3 steps" in data["notes"]


def test_smoothing_is_a_weighted_mean_of_what_came_before():
    assert smoothed([4.0, 2.0, 9.0], 0.0) == [4.0, 2.0, 9.0]
    np.testing.assert_allclose(smoothed([4.0, 2.0], 0.5), [4.0, (0.5 * 4 + 2) / 1.5])
    np.testing.assert_allclose(smoothed([3.0] * 50, 0.99), 3.0)


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("log.jsonl", b"", "found no record"),
        ("main.log", b"nothing\n" * 9, "found no record"),
        ("log.jsonl", b"\x00\xff" * 99, "found no record"),
        ("log.jsonl", b"[" * 100_000, "found no record"),
        ("main.log", b"s:99999999999999 trl:1\n", "found no record"),
    ],
)
def test_what_is_no_log_is_refused(tmp_path, name, content, found):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Gpt2JaxError, match=found):
        read_run(tmp_path)
    with pytest.raises(Gpt2JaxError, match="no such file"):
        read_run(tmp_path / "none")


@given(
    st.lists(
        st.fixed_dictionaries(
            {"event": st.sampled_from(["train", "validation", "start", "sample", "resume", 3])},
            optional={
                "step": st.one_of(st.integers(), st.floats(), st.text()),
                "loss": st.one_of(st.none(), st.floats(), st.text(), st.lists(st.integers(), max_size=2)),
                "seconds": st.one_of(st.floats(), st.integers()),
                "tokens": st.one_of(st.integers(), st.text()),
                "versions": st.one_of(st.text(), st.dictionaries(st.text(), st.text(), max_size=2)),
                "text": st.one_of(st.text(), st.integers()),
            },
        ),
        max_size=12,
    )
)
def test_any_log_is_shown_or_refused(tmp_path_factory, records):
    folder = tmp_path_factory.mktemp("any")
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, records)))
    try:
        run = read_run(folder)
    except Gpt2JaxError:
        return
    write_page(folder / "page.html", [run])
    data_of(folder / "page.html")


def test_the_same_settings_do_not_differ(tmp_path):
    runs = [read_run(make_run(tmp_path / name, [1.0])) for name in "ab"]
    assert differing_settings(runs) == {}


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (["--smoothing", "1"], "--smoothing: expected 0 or more, below 1, found 1.0"),
        (["--output", "page.txt"], "--output: expected a name that ends in .html"),
        (["--picture", "p.jpg"], "--picture: expected a name that ends in .png or .svg"),
    ],
)
def test_wrong_flags_are_refused(tmp_path, monkeypatch, flags, found):
    monkeypatch.chdir(tmp_path)
    folder = make_run(tmp_path / "run", [1.0])
    with pytest.raises(Gpt2JaxError, match=re.escape(found)):
        command.main([str(folder), *flags])
    with pytest.raises(Gpt2JaxError, match="expected at least one run"):
        command.main([])


@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed: apt-get install chromium")
def test_a_browser_draws_the_page(tmp_path):
    """Two runs, of which one's sample would change the title if it were a program."""
    evil = "</script><script>document.title='evil'</script>"
    runs = [make_run(tmp_path / name, list(np.linspace(9, 1, 300)), lr=lr, text=evil) for name, lr in (("a", 0.1), ("b", 0.2))]
    write_page(tmp_path / "page.html", [read_run(run) for run in runs], by="tokens", smoothing=0.9)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--window-size=1200,1000", "--virtual-time-budget=3000"]
    url = (tmp_path / "page.html").as_uri()
    dom = subprocess.run([*command, "--dump-dom", url], capture_output=True, text=True, timeout=120, check=True).stdout
    assert 'data-drawn="4"' in dom  # training and validation of both
    assert "<title>a, b</title>" in dom
    assert "optimizer.learning_rate</td><td>0.1</td><td>0.2</td>" in dom
    assert dom.count('class="curve"') == 4
    assert "153.6k" in dom or "150k" in dom  # the axis is in tokens
    picture = tmp_path / "page.png"
    subprocess.run([*command, f"--screenshot={picture}", url], capture_output=True, timeout=120, check=True)
    from matplotlib.image import imread

    pixels = imread(picture)[..., :3]
    for color in ((0x1F, 0x77, 0xB4), (0xD6, 0x27, 0x28)):  # of both runs
        assert (np.abs(pixels - np.array(color) / 255).max(axis=-1) < 0.02).sum() > 50
