"""No file, however damaged, makes a reader crash, hang or allocate much: it is read, or refused with one clear error."""

from __future__ import annotations

import codecs
import json
import os
import struct
import tempfile
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_jax.config import RunConfig, format_config, load_config
from gpt2_jax.data.chunks import CutRuns
from gpt2_jax.data.hellaswag import read_hellaswag
from gpt2_jax.data.prepare import Limits, prepare
from gpt2_jax.data.sources import open_source
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.interop.huggingface_config import read_huggingface_config
from gpt2_jax.llmc.debug_state import DebugState, read_debug_state, write_debug_state
from gpt2_jax.llmc.eval_file import MultipleChoice, read_eval_file, write_eval_file
from gpt2_jax.llmc.header import HEADER_BYTES
from gpt2_jax.llmc.loader import TokenLoader
from gpt2_jax.llmc.model_file import read_model_config, read_model_file, write_model_file
from gpt2_jax.llmc.state_file import ProcessState, TrainingState, read_state_files, write_state_files
from gpt2_jax.llmc.token_shard import open_token_shard, write_token_shard
from gpt2_jax.llmc.tokenizer_file import read_tokenizer_file, write_tokenizer_file
from gpt2_jax.report.log import RunLog
from gpt2_jax.training.run_record import Averages, RunRecord, read_run_record, write_run_record
from tests.contract.guard import no_hang

SMALL = GPT2Config(max_sequence_length=8, vocab_size=10, num_layers=1, num_heads=1, channels=8)
LAYOUT = SMALL.layout
N = LAYOUT.num_parameters
ALLOWED_BYTES = 8_000_000


def loader_of(path: str, *, shuffle: bool = False) -> TokenLoader:
    return TokenLoader(path, 2, 4, vocab_size=SMALL.vocab_size, shuffle=shuffle)


def read_all_batches(path: str) -> None:
    loader = loader_of(path)
    for _ in range(min(loader.num_batches, 100)):
        loader.next_batch()


def read_all_text(path: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prepare(open_source(path, "text"), folder, Limits(0.1), cuts=CutRuns())


READERS: dict[str, Callable[[str], object]] = {
    "model_float32": read_model_file,
    "model_bfloat16": read_model_file,
    "model_config": read_model_config,
    "debug_state": lambda path: read_debug_state(path, SMALL),
    "token_shard": lambda path: open_token_shard(path).max(),
    "tokenizer": read_tokenizer_file,
    "state_sequential": lambda path: read_state_files([path], LAYOUT),
    "state_shuffled": lambda path: read_state_files([path], LAYOUT),
    "eval": read_eval_file,
    "loader": read_all_batches,
}
every_reader = pytest.mark.parametrize("reader", READERS)
# Of text, with a file that each reads.
TEXT_READERS: dict[str, Callable[[str], object]] = {
    "run_record": read_run_record,
    "settings": load_config,
    "log": lambda path: [RunLog(path).records(event) for event in ("train", "validation")],
    "hellaswag_jsonl": read_hellaswag,
    "text": read_all_text,
    "huggingface_config": read_huggingface_config,
}
every_text_reader = pytest.mark.parametrize("reader", TEXT_READERS)
every_reader_of_either = pytest.mark.parametrize("reader", [*READERS, *TEXT_READERS])
# A log that is not there has no records.
every_reader_but_the_logs = pytest.mark.parametrize("reader", [name for name in (*READERS, *TEXT_READERS) if name != "log"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad_files")


@pytest.fixture(scope="module")
def valid(folder: Path) -> Callable[[str], bytes]:
    """For the name of a reader the content of a file that it reads."""
    random = np.random.default_rng(0)
    params = random.normal(size=N).astype(np.float32)
    params[slice(*SMALL.layout["wte"].padding_span)] = 0
    tokens = random.integers(0, SMALL.vocab_size, 41)
    shard = folder / "tokens.bin"
    write_token_shard(shard, tokens)

    def training_state(path: Path, shuffle: bool) -> None:
        process = ProcessState(loader_of(str(shard), shuffle=shuffle).state())
        write_state_files([path], TrainingState(7, params, params**2, (process,)), LAYOUT)

    x_BT, y_BT = tokens[:16].reshape(2, 8), tokens[1:17].reshape(2, 8)
    debug_state = DebugState(x_BT, y_BT, random.normal(size=(2, 8, 10)), np.float32(2), params)
    choices = [MultipleChoice(i, tokens[:3], tuple(tokens[3 + j : 5 + 2 * j + i] for j in range(4))) for i in range(3)]
    writers: dict[str, Callable[[Path], None]] = {
        "model_float32": lambda path: write_model_file(path, SMALL, params),
        "model_bfloat16": lambda path: write_model_file(path, SMALL, params, "bfloat16"),
        "model_config": lambda path: write_model_file(path, SMALL, params),
        "debug_state": lambda path: write_debug_state(path, debug_state),
        "token_shard": lambda path: write_token_shard(path, tokens),
        "tokenizer": lambda path: write_tokenizer_file(path, [bytes([i] * (i + 1)) for i in range(10)], 9),
        "state_sequential": lambda path: training_state(path, False),
        "state_shuffled": lambda path: training_state(path, True),
        "eval": lambda path: write_eval_file(path, choices),
        "loader": lambda path: write_token_shard(path, tokens),
    }
    for reader, write in writers.items():
        write(folder / f"{reader}.bin")
    return lambda reader: (folder / f"{reader}.bin").read_bytes()


@pytest.fixture(scope="module")
def valid_text(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    """For the name of a reader of text the content of a file that it reads."""
    folder = tmp_path_factory.mktemp("texts")
    windows = {"loss": np.array([1.5, np.nan], np.float32)}
    write_run_record(
        folder / "run_record", RunRecord(2, 4, "float32", "a test", windows, Averages(3, 0.5, 100.0), {"run": {"steps": 3}})
    )
    (folder / "settings").write_text(format_config(RunConfig()))
    log = RunLog(folder / "log")
    for step in range(1, 4):
        log.write("train", step, loss=float(step), lr=0.1, norm=1.0)
    question = {"ctx": "A dog", "endings": ["barks.", "sings.", "writes.", "flies."], "label": 0}
    (folder / "hellaswag_jsonl").write_text(f"{json.dumps(question)}\n" * 2)
    (folder / "text").write_text("In the beginning God created the heaven and the earth. " * 3)
    sizes = {"n_positions": 8, "vocab_size": 10, "n_layer": 1, "n_head": 1, "n_embd": 8}
    (folder / "huggingface_config").write_text(json.dumps(sizes))
    return lambda reader: (folder / reader).read_bytes()


@every_text_reader
def test_undamaged_text_is_read(reader, folder, valid_text):
    assert outcome_of_content(reader, folder, valid_text(reader)) == ""


@every_text_reader
def test_a_byte_order_mark_changes_nothing(reader, folder, valid_text):
    assert outcome_of_content(reader, folder, codecs.BOM_UTF8 + valid_text(reader)) == ""
    if reader != "log":  # which a run is not to fail for
        refusal = outcome_of_content(reader, folder, valid_text(reader).decode().encode("utf-16"))
        assert "in UTF-8, found UTF-16\n---> HINT: iconv " in refusal


@every_text_reader
@given(kept=st.integers(0, 2**32), junk=st.binary(max_size=30), removed=st.integers(0, 30))
def test_damaged_text_is_read_or_refused(reader, folder, valid_text, kept, junk, removed):
    content = valid_text(reader)
    kept %= len(content)
    outcome_of_content(reader, folder, content[:kept] + junk + content[kept + removed :])


@every_text_reader
@given(kept=st.integers(0, 2**32))
def test_text_cut_at_any_byte_is_read_or_refused(reader, folder, valid_text, kept):
    content = valid_text(reader)
    outcome_of_content(reader, folder, content[: kept % len(content)])


OTHER_TEXTS = {
    "empty": b"",
    "a number": b"5",
    "a list": b"[]",
    "null": b"null",
    "zeros": b"\0" * 1000,
    "no UTF-8": b"\xff" * 1000,
    "an open bracket": b"{",
    "brackets": b"[" * 50_000,
    "nested tables": b"a = " + b"[" * 50_000,
    "a long number": b"[run]\nsteps = " + b"1" * 5_000,
    "a long number in JSON": b'{"event": ' + b"1" * 5_000 + b"}",
    "numbers that are none": b'{"n_positions": Infinity, "vocab_size": NaN}',
    "records without their values": b'{"event": "train"}\n{"event": "train", "step": "x"}\n{"step": 3}\n',
}


@every_text_reader
@pytest.mark.parametrize("content", OTHER_TEXTS.values(), ids=OTHER_TEXTS)
def test_other_text_is_read_or_refused(reader, folder, content):
    outcome_of_content(reader, folder, content)


def outcome(reader: str, path: str) -> str:
    """The error's text, or nothing if the file was read. Anything but success and a Gpt2JaxError fails the test."""
    try:
        with no_hang():
            (READERS | TEXT_READERS)[reader](path)
    except Gpt2JaxError as error:
        text = str(error)
        assert path in text
        assert "expected" in text
        assert "found" in text
        return text
    return ""


def outcome_of_content(reader: str, folder: Path, content: bytes) -> str:
    path = folder / "damaged.bin"
    path.write_bytes(content)
    return outcome(reader, str(path))


@every_reader
def test_undamaged_file_is_read(reader, folder, valid):
    assert outcome_of_content(reader, folder, valid(reader)) == ""


@every_reader
@given(kept=st.integers(0, 2**32))
def test_file_cut_at_any_byte_is_refused(reader, folder, valid, kept):
    content = valid(reader)
    assert outcome_of_content(reader, folder, content[: kept % len(content)]) != ""


@every_reader
def test_file_cut_after_its_header_or_before_its_end_is_refused(reader, folder, valid):
    content = valid(reader)
    for size in (*range(HEADER_BYTES - 1, HEADER_BYTES + 20), *range(len(content) - 20, len(content))):
        assert outcome_of_content(reader, folder, content[:size]) != ""


@every_reader
@given(extra=st.binary(min_size=1, max_size=5000))
def test_file_with_bytes_after_its_end_is_refused(reader, folder, valid, extra):
    assert outcome_of_content(reader, folder, valid(reader) + extra) != ""


@every_reader
@pytest.mark.parametrize("content", [b"", b"\n", b"\0" * HEADER_BYTES, b"\xff" * 5000], ids=len)
def test_empty_or_uniform_file_is_refused(reader, folder, content):
    assert outcome_of_content(reader, folder, content) != ""


@every_reader
@given(content=st.binary(max_size=3000))
def test_file_of_random_bytes_is_refused(reader, folder, content):
    assert outcome_of_content(reader, folder, content) != ""


INTERESTING_WORDS = [-(2**31), -1, 0, 1, 2, 3, 4, 5, 8, 9, 2**15, 2**16, 2**30, 2**31 - 128, 2**31 - 4, 2**31 - 1]


@every_reader
@given(
    words=st.dictionaries(
        st.integers(0, 35) | st.integers(0, 255),
        st.sampled_from(INTERESTING_WORDS) | st.integers(-(2**31), 2**31 - 1),
        min_size=1,
        max_size=3,
    )
)
def test_file_with_other_header_words_is_read_or_refused_with_little_memory(reader, folder, valid, words):
    content = bytearray(valid(reader))
    for index, word in words.items():
        struct.pack_into("<i", content, 4 * index, word)
    tracemalloc.start()
    try:
        outcome_of_content(reader, folder, bytes(content))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < ALLOWED_BYTES


@every_reader
@given(seed=st.integers(0, 2**32 - 1))
def test_file_with_a_damaged_body_is_read_or_refused(reader, folder, valid, seed):
    random = np.random.default_rng(seed)
    content = bytearray(valid(reader))
    start, stop = sorted(random.integers(HEADER_BYTES, len(content), 2, endpoint=True))
    content[start:stop] = random.bytes(stop - start)
    outcome_of_content(reader, folder, bytes(content))


LOADER_PLACES = [*range(4 * 30, 4 * 34), *range(HEADER_BYTES + 8 * N, HEADER_BYTES + 8 * N + 60)]


@given(damage=st.dictionaries(st.sampled_from(LOADER_PLACES), st.integers(0, 255), min_size=1, max_size=4))
def test_damaged_loader_part_of_a_state_is_restored_or_refused(folder, valid, damage):
    """Both indices in the header; after both moments the permutations, the generator's counters and its first words."""
    content = bytearray(valid("state_shuffled"))
    for place, byte in damage.items():
        content[place] = byte
    path = folder / "damaged.bin"
    path.write_bytes(content)
    loader = loader_of(str(folder / "tokens.bin"), shuffle=True)
    with suppress(Gpt2JaxError):
        loader.restore(read_state_files([path], LAYOUT).processes[0].loader)
        for _ in range(2 * loader.num_batches):
            loader.next_batch()


@every_reader
@pytest.mark.parametrize("other", READERS)
def test_file_of_another_kind_is_refused(reader, other, folder, valid):
    if valid(other)[:4] != valid(reader)[:4]:
        assert "found magic" in outcome_of_content(reader, folder, valid(other))


@every_reader_of_either
def test_folder_is_refused(reader, tmp_path):
    assert "found a folder" in outcome(reader, str(tmp_path))


@every_reader_of_either
def test_pipe_is_refused_without_waiting(reader, tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    assert "found something that is not a regular file" in outcome(reader, str(path))


@every_reader_of_either
def test_device_is_refused(reader):
    assert "found something that is not a regular file" in outcome(reader, os.devnull)


@every_reader_of_either
def test_links_in_a_circle_are_refused(reader, tmp_path):
    path = tmp_path / "link"
    path.symlink_to(path)
    assert "Too many levels of symbolic links" in outcome(reader, str(path))


@every_reader_but_the_logs
def test_missing_file_is_refused(reader, tmp_path):
    assert "found no" in outcome(reader, str(tmp_path / "missing.bin"))


@every_reader_of_either
def test_link_to_a_missing_file_is_refused(reader, tmp_path):
    path = tmp_path / "link"
    path.symlink_to(tmp_path / "missing.bin")
    assert "found no such file" in outcome(reader, str(path))


@every_reader_but_the_logs
def test_path_through_a_file_is_refused(reader, folder, valid):
    path = folder / "eval.bin" / "inside.bin"
    assert "found" in outcome(reader, str(path))


@every_reader_but_the_logs
def test_name_that_is_too_long_is_refused(reader, tmp_path):
    assert "found" in outcome(reader, str(tmp_path / ("x" * 300)))


@every_reader_but_the_logs
def test_name_with_a_zero_byte_is_refused(reader, tmp_path):
    assert "found" in outcome(reader, str(tmp_path / "a\0b"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@every_reader_of_either
def test_file_without_read_permission_is_refused(reader, tmp_path, valid):
    path = tmp_path / "secret.bin"
    path.write_bytes(valid("eval"))
    path.chmod(0)
    assert "Permission denied" in outcome(reader, str(path))
