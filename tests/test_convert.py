"""Models from one format to another: there and back again to the bit, and what others make of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.resources import files

import ml_dtypes
import numpy as np
import pytest

from gpt2_jax.commands import convert as command
from gpt2_jax.convert import convert, differing_tensor, kind_of_target
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.interop.huggingface import read_huggingface_folder
from gpt2_jax.llmc.model_file import read_model_file, write_model_file
from gpt2_jax.models.initialize import initialize_parameters
from tests.conftest import REPOSITORY, TINY
from tests.interop.folders import state_dict, write_folder

DTYPES = ["float32", "bfloat16"]


@pytest.fixture(params=DTYPES)
def model_file(request, tmp_path, tiny_params):
    path = tmp_path / f"{request.param}.bin"
    write_model_file(path, TINY, tiny_params, request.param)
    return path


def to(source, target, **options):
    """Convert by the names alone; the target."""
    convert(str(source), str(target), kind_of_target(str(target)), say=lambda text: None, **options)
    return target


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_llmc_to_hugging_face_and_back_is_the_same_file(model_file, tmp_path, shard_bytes):
    folder = to(model_file, tmp_path / "folder", shard_bytes=shard_bytes)
    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    assert (weights == ["model.safetensors"]) == (shard_bytes > 20_000)
    assert all(path.stat().st_size < shard_bytes + 20_000 for path in folder.glob("*.safetensors"))
    assert to(folder, tmp_path / "back.bin").read_bytes() == model_file.read_bytes()
    again = to(tmp_path / "back.bin", tmp_path / "again", shard_bytes=shard_bytes)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {p.name: p.read_bytes() for p in again.iterdir()}


@pytest.mark.torch
def test_by_nanogpt_and_back_is_the_same_file(model_file, tmp_path):
    import torch

    checkpoint = to(model_file, tmp_path / "out" / "ckpt.pt")
    assert to(checkpoint, tmp_path / "back.bin").read_bytes() == model_file.read_bytes()
    folder = to(checkpoint, tmp_path / "folder")
    assert to(folder, tmp_path / "other.pt").stat().st_size == checkpoint.stat().st_size
    assert to(tmp_path / "other.pt", tmp_path / "back2.bin").read_bytes() == model_file.read_bytes()
    content = torch.load(checkpoint, weights_only=True)
    assert content["model"]["lm_head.weight"].data_ptr() == content["model"]["transformer.wte.weight"].data_ptr()
    assert content["model"]["transformer.h.1.attn.c_attn.weight"].shape == (3 * TINY.channels, TINY.channels)
    assert content["model_args"] == {
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 32,
        "block_size": 16,
        "bias": True,
        "vocab_size": 203,
        "dropout": 0.0,
    }
    # Only what belongs to it is stored: the size is the weights' and some names.
    assert checkpoint.stat().st_size < model_file.stat().st_size + 30_000


def test_weights_are_rounded_where_that_is_asked_for(tmp_path, tiny_params):
    write_model_file(tmp_path / "a.bin", TINY, tiny_params)
    folder = to(tmp_path / "a.bin", tmp_path / "folder", dtype="bfloat16")
    expected = tiny_params.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(read_huggingface_folder(folder)[1], expected)
    write_model_file(tmp_path / "b.bin", TINY, tiny_params, "bfloat16")
    assert to(tmp_path / "a.bin", tmp_path / "c.bin", dtype="bfloat16").read_bytes() == (tmp_path / "b.bin").read_bytes()
    widened = to(tmp_path / "b.bin", tmp_path / "d.bin", dtype="float32")
    np.testing.assert_array_equal(read_model_file(widened)[1], expected)


def test_float16_becomes_float32(tmp_path, tiny_params):
    source = write_folder(tmp_path / "source", TINY, state_dict(TINY, tiny_params, dtype="float16"))
    path = to(source, tmp_path / "a.bin")
    np.testing.assert_array_equal(read_model_file(path)[1], tiny_params.astype(np.float16).astype(np.float32))
    assert differing_tensor(str(source), str(path), "float32") is None


def test_the_comparison_finds_one_bit(tmp_path, tiny_params):
    """Also in the last tensor, and in its sign of zero."""
    write_model_file(tmp_path / "a.bin", TINY, tiny_params)
    for place, name in ((0, "wte.weight"), (-1, "ln_f.bias"), (TINY.layout["fcw"].stop - 1, "h.1.mlp.c_fc.weight")):
        changed = tiny_params.copy()
        changed[place] = -0.0 if place == -1 else np.nextafter(changed[place], np.float32(9))
        write_model_file(tmp_path / "b.bin", TINY, changed)
        found = differing_tensor(str(tmp_path / "a.bin"), str(tmp_path / "b.bin"), "float32")
        assert found == name, (place, changed[place], tiny_params[place])
    assert differing_tensor(str(tmp_path / "a.bin"), str(tmp_path / "a.bin"), "float32") is None


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A small model with GPT-2's vocabulary as a folder, and its file."""
    base = tmp_path_factory.mktemp("whole")
    config = GPT2Config(max_sequence_length=64, vocab_size=50257, num_layers=2, num_heads=2, channels=16)
    write_model_file(base / "small.bin", config, initialize_parameters(config))
    return base / "small.bin", to(base / "small.bin", base / "small")


@pytest.mark.torch
def test_transformers_loads_model_and_tokenizer(whole):
    transformers = pytest.importorskip("transformers")
    _, folder = whole
    merges = files("gpt2_jax").joinpath("assets/gpt2_vocab.bpe").read_bytes()
    assert (folder / "merges.txt").read_bytes() == merges  # which were not read for it
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "Hello world, it's 2024\n\n  naïve 日本"
    from gpt2_jax.data.tokenizer import gpt2_tokenizer

    assert tokenizer(text).input_ids == gpt2_tokenizer().encode(text)
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("<|endoftext|>").input_ids == [50256] == [tokenizer.eos_token_id]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id == 50256
    assert model.config.n_positions == tokenizer.model_max_length == 64


@pytest.mark.torch
def test_a_vocabulary_of_its_own_goes_along(tmp_path):
    """transformers splits text as this project does, with merges that are read off the tokens."""
    transformers = pytest.importorskip("transformers")
    from gpt2_jax.data.kjv import kjv_chapters
    from gpt2_jax.data.tokenizer import own_tokenizer
    from gpt2_jax.data.vocabulary import train_vocabulary
    from gpt2_jax.llmc.tokenizer_file import write_tokenizer_file

    vocabulary = train_vocabulary(kjv_chapters()[:40], 500)
    config = GPT2Config(max_sequence_length=32, vocab_size=500, num_layers=1, num_heads=2, channels=16)
    write_model_file(tmp_path / "model.bin", config, initialize_parameters(config))
    write_tokenizer_file(tmp_path / "tokenizer.bin", vocabulary, 499)
    folder = to(tmp_path / "model.bin", tmp_path / "folder")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    mine = own_tokenizer(vocabulary, "mine")
    for text in (kjv_chapters()[50], "naïve 日本, it's\n\n 1999"):
        assert tokenizer(text).input_ids == mine.encode_ordinary(text)
    assert tokenizer.eos_token_id == 499 == transformers.AutoModelForCausalLM.from_pretrained(folder).config.eos_token_id
    # From there on it is the folder's.
    again = to(folder, tmp_path / "again")
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.torch
def test_the_command_checks_by_transformers_logits(whole, tmp_path, capsys):
    pytest.importorskip("transformers")
    source, folder = whole
    command.main([str(source), str(tmp_path / "folder")])
    said = capsys.readouterr().out
    assert "weights are the source's, in float32" in said
    assert "checked: transformers loads it, and its logits differ from this project's by " in said
    command.main([str(folder), str(tmp_path / "small.bin")])
    assert "transformers loads it" in capsys.readouterr().out
    command.main([str(source), str(tmp_path / "half"), "--dtype", "bfloat16"])
    assert "in bfloat16\nchecked: transformers loads it" in capsys.readouterr().out
    # What is there stays.
    before = (tmp_path / "small.bin").read_bytes()
    with pytest.raises(Gpt2JaxError, match=r"small\.bin: expected a new file, found that it exists"):
        command.main([str(source), str(tmp_path / "small.bin")])
    assert (tmp_path / "small.bin").read_bytes() == before
    with pytest.raises(Gpt2JaxError, match="expected a new folder"):
        command.main([str(source), str(folder)])


@pytest.mark.torch
def test_other_logits_are_an_error(whole, tmp_path):
    pytest.importorskip("transformers")
    from gpt2_jax.logits_check import compare_with_transformers
    from tests.conftest import CPU

    source, folder = whole
    config, params = read_model_file(source)
    params = params.copy()
    params[config.layout["fcprojw"].offset : config.layout["fcprojw"].stop] *= 1.5
    write_model_file(tmp_path / "other.bin", config, params)
    with pytest.raises(Gpt2JaxError, match=r"expected transformers' logits within 0\.0001 of this project's, found"):
        compare_with_transformers(str(tmp_path / "other.bin"), str(folder), CPU)


def test_the_tokenizer_of_the_source_goes_along(whole, tmp_path):
    _, folder = whole
    source = tmp_path / "source"
    to(folder, source)
    (source / "tokenizer.json").write_text("{}")
    (source / "run_me.py").write_text("print()")
    target = to(source, tmp_path / "target")
    assert (target / "tokenizer.json").read_text() == "{}"
    assert not (target / "run_me.py").exists()
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer_config.json")
    }


@pytest.mark.parametrize("target", ["a.bin", pytest.param("a.pt", marks=pytest.mark.torch), "folder"])
def test_a_source_that_is_damaged_leaves_nothing(tmp_path, tiny_params, target):
    folder = write_folder(tmp_path / "source", TINY, state_dict(TINY, tiny_params))
    content = (folder / "model.safetensors").read_bytes()
    hostile = json.dumps({"a": {"dtype": "F32", "shape": [2**50], "data_offsets": [0, 2**52]}}).encode()
    missing = state_dict(TINY, tiny_params)
    del missing["transformer.ln_f.bias"]
    for damaged in (content[:-5], b"", len(hostile).to_bytes(8, "little") + hostile, (2**62).to_bytes(8, "little")):
        (folder / "model.safetensors").write_bytes(damaged)
        with pytest.raises(Gpt2JaxError, match=r"model\.safetensors: expected"):
            to(folder, tmp_path / "out" / target)
        assert not (tmp_path / "out" / target).exists()
    write_folder(folder, TINY, missing)
    with pytest.raises(Gpt2JaxError, match=r"expected the tensor ln_f\.bias, found none"):
        to(folder, tmp_path / "out" / target)
    assert not (tmp_path / "out" / target).exists()


# Prints how far the process's peak of resident memory rose while a model was converted.
MEASURE = """
import resource, sys
from gpt2_jax.convert import convert, kind_of_target
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
convert(sys.argv[1], sys.argv[2], kind_of_target(sys.argv[2]))
before = peak()
convert(sys.argv[3], sys.argv[4], kind_of_target(sys.argv[4]))
print(peak() - before)
"""


def test_memory_stays_below_the_models_size(tmp_path, tiny_params):
    """A model of 110 MB; what is mapped of a file counts as well."""
    write_model_file(tmp_path / "tiny.bin", TINY, tiny_params)
    config = GPT2Config(max_sequence_length=64, vocab_size=1000, num_layers=16, num_heads=2, channels=384)
    write_model_file(tmp_path / "a.bin", config, initialize_parameters(config))
    size = (tmp_path / "a.bin").stat().st_size
    start = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]], check=True)"
    for source, target in (("a.bin", "folder"), ("folder", "b.bin")):
        names = [str(tmp_path / name) for name in ("tiny.bin", f"warm-{target}", source, target)]
        ended = subprocess.run(
            [sys.executable, "-c", start, MEASURE, *names],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            check=True,
        )
        limit = 0.2 if source == "a.bin" else 1.2
        assert int(ended.stdout.splitlines()[-1]) < limit * size, (source, target)
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
