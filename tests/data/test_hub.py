"""Datasets of the hub, streamed from a server on this machine that speaks its protocol; each in a process of its own, as the
client reads its address once."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from gpt2_jax.data.hellaswag import read_hellaswag
from gpt2_jax.llmc.token_shard import open_token_shard, write_token_shard
from tests.conftest import REPOSITORY
from tests.data.test_prepare import sentences, texts_of, write_jsonl, write_parquet
from tests.hub_server import hub

pytest.importorskip("huggingface_hub")
NOBODY = "http://127.0.0.1:9"  # the port at which nobody answers


def prepare(endpoint, folder, *words, status=0, **environment):
    """Run prepare against a hub; its standard error."""
    variables = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    variables |= {"HF_TOKEN": "", "COLUMNS": "200", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment}
    command = [sys.executable, str(REPOSITORY / "scripts" / "prepare_data.py"), "--output-dir", str(folder / "out"), *words]
    ended = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert ended.returncode == status, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stderr


def shards(folder, pattern):
    return [np.asarray(open_token_shard(path)) for path in sorted((folder / "out").glob(pattern))]


def test_datasets_by_name_are_streamed(tmp_path):
    texts = sentences(90)
    stories = tmp_path / "hub" / "datasets" / "roneneldan" / "TinyStories" / "data"
    stories.mkdir(parents=True)
    write_parquet(stories / "train-00000-of-00002.parquet", texts[:50])
    write_parquet(stories / "train-00001-of-00002.parquet", texts[50:])
    write_parquet(stories / "validation-00000-of-00001.parquet", ["never"] * 9)
    with hub(tmp_path / "hub") as (endpoint, _):
        prepare(endpoint, tmp_path, "--source", "tinystories", "--validation-fraction", "0.1")
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
            "tinystories_train_000001.bin",
            "tinystories_val_000001.bin",
        ]
        assert sorted(texts_of(*shards(tmp_path, "tinystories_*.bin"))) == sorted(texts)
        # The same without a glob: the training split is meant.
        prepare(endpoint, tmp_path, "--source", "hf:roneneldan/TinyStories", "--tokens", "300")
        found = shards(tmp_path, "TinyStories_*.bin")
        assert 300 <= sum(shard.size for shard in found) < 330
        assert texts_of(np.concatenate(found)) == texts[: len(texts_of(np.concatenate(found)))]


def test_json_lines_of_a_dataset_and_what_is_not_there(tmp_path):
    folder = tmp_path / "hub" / "datasets" / "some" / "where"
    folder.mkdir(parents=True)
    write_jsonl(folder / "part.jsonl.gz", sentences(30), field="content")
    with hub(tmp_path / "hub") as (endpoint, _):
        prepare(endpoint, tmp_path, "--source", "hf:some/where", "--text-field", "content")
        assert texts_of(np.concatenate(shards(tmp_path, "where_*.bin"))) == sentences(30)
        error = prepare(endpoint, tmp_path, "--source", "hf:some/where:*.parquet", status=2)
        assert "expected files *.parquet in the dataset, found part.jsonl.gz" in error
        error = prepare(endpoint, tmp_path, "--source", "hf:no/body", status=2)
        assert "expected the dataset no/body of the Hugging Face hub, found no such name there" in error
        error = prepare(endpoint, tmp_path, "--source", "hf:../../etc", status=2)
        assert "expected hf:OWNER/NAME" in error


def test_without_a_network_the_error_says_so(tmp_path):
    for words, environment in (
        (["--source", "fineweb"], {}),
        (["--source", "edu_fineweb-shards"], {"HF_HUB_OFFLINE": "1"}),
    ):
        error = prepare(NOBODY, tmp_path, *words, status=2, **environment)
        assert "of the Hugging Face hub, found " in error
        assert ("offline mode" in error) == bool(environment)
        assert "---> HINT: " in error


def test_a_file_that_vanishes_is_an_error_and_the_next_try_has_all(tmp_path):
    folder = tmp_path / "hub" / "datasets" / "some" / "where"
    folder.mkdir(parents=True)
    for part in range(4):
        write_jsonl(folder / f"{part}.jsonl", sentences(30))
    with hub(tmp_path / "hub", fail_after=2) as (endpoint, _):
        error = prepare(endpoint, tmp_path, "--source", "hf:some/where", status=2)
        assert "expected to read on" in error
    with hub(tmp_path / "hub") as (endpoint, _):
        prepare(endpoint, tmp_path, "--source", "hf:some/where")
    assert len(texts_of(np.concatenate(shards(tmp_path, "where_*.bin")))) == 120


def test_ready_made_shards_are_downloaded_once(tmp_path):
    folder = tmp_path / "hub" / "datasets" / "karpathy" / "fineweb-edu-100B-gpt2-token-shards"
    folder.mkdir(parents=True)
    names = [f"edu_fineweb_{name}.bin" for name in ("val_000000", "train_000001", "train_000002")]
    for name in names:
        write_token_shard(folder / name, np.arange(100))
    with hub(tmp_path / "hub") as (endpoint, requests):
        prepare(endpoint, tmp_path, "--source", "edu_fineweb-shards", "--tokens", "150M")
        assert all((tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes() for name in names)
        before = sum(request.startswith("GET /datasets") for request in requests)
        prepare(endpoint, tmp_path, "--source", "edu_fineweb-shards", "--tokens", "150M")
        assert sum(request.startswith("GET /datasets") for request in requests) == before


def test_hellaswags_file_is_read_from_where_it_lies(tmp_path):
    """The one that was downloaded before is taken: no network."""
    (tmp_path / "out").mkdir()
    line = '{"ctx": "A man", "endings": ["walks", "runs", "sits", "sleeps"], "label": 2}\n'
    (tmp_path / "out" / "hellaswag_val.jsonl").write_text(line)
    prepare(NOBODY, tmp_path, "--source", "hellaswag")
    assert (tmp_path / "out" / "hellaswag_val.bin").stat().st_size > 1024
    assert len(read_hellaswag(tmp_path / "out" / "hellaswag_val.jsonl")) == 1
