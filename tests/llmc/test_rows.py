"""Any number of ranks reads its parts from the files of any other, and no more than these."""

from __future__ import annotations

import builtins

import numpy as np
import pytest

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.llmc.loader import LoaderState
from gpt2_jax.llmc.model_file import read_model_rows, write_model_file
from gpt2_jax.llmc.rounding import rounded_to_nearest
from gpt2_jax.llmc.state_file import ProcessState, TrainingState, read_state_files, read_state_rows, write_state_files
from tests.conftest import TINY


@pytest.fixture(scope="module")
def buffers():
    return np.random.default_rng(5).normal(size=(3, TINY.layout.num_parameters)).astype(np.float32)


@pytest.mark.parametrize(("saved", "zero"), [(1, False), (2, False), (2, True), (4, True), (8, True)])
@pytest.mark.parametrize("wanted", [1, 2, 4, 16])
def test_parts_of_a_state(tmp_path, buffers, saved, zero, wanted):
    paths = [tmp_path / f"state_{rank}.bin" for rank in range(saved)]
    processes = tuple(ProcessState(LoaderState(rank, 0)) for rank in range(saved))
    write_state_files(paths, TrainingState(7, buffers[0], buffers[1], processes, buffers[2]), TINY.layout, zero=zero)
    ranks = range(wanted // 2, wanted)
    found, whole = read_state_rows(paths, TINY.layout, ranks, wanted), read_state_files(paths, TINY.layout)
    assert (found.step, found.processes) == (7, whole.processes)
    for name in ("m", "v", "master"):
        expected = TINY.layout.rows(getattr(whole, name), wanted)[wanted // 2 :]
        np.testing.assert_array_equal(getattr(found, name), expected, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parts_of_a_model(tmp_path, buffers, dtype):
    write_model_file(tmp_path / "model.bin", TINY, buffers[0], dtype)
    expected = buffers[0] if dtype == "float32" else rounded_to_nearest(buffers[0])
    found = read_model_rows(tmp_path / "model.bin", range(1, 3), 4)
    np.testing.assert_array_equal(found, TINY.layout.rows(expected, 4)[1:3])


def test_only_the_wanted_bytes_are_read(tmp_path, buffers, monkeypatch):
    """Of four ranks' files rank 0 of two reads those of two."""
    paths = [tmp_path / f"state_{rank}.bin" for rank in range(4)]
    state = TrainingState(7, buffers[0], buffers[1], (ProcessState(LoaderState(0, 0)),) * 4)
    write_state_files(paths, state, TINY.layout, zero=True)
    read, opened = {}, builtins.open

    class Counting:
        def __init__(self, path, mode):
            self.path, self.file = path, opened(path, mode)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def seek(self, place):
            self.file.seek(place)

        def readinto(self, target):
            read[self.path] = read.get(self.path, 0) + target.nbytes
            return self.file.readinto(target)

    monkeypatch.setattr("gpt2_jax.llmc.rows.open", Counting, raising=False)
    read_state_rows(paths, TINY.layout, range(1), 2)
    assert read == dict.fromkeys(paths[:2], 2 * 4 * TINY.layout.num_parameters // 4)


@pytest.mark.parametrize("change", ["short", "gone", "another step", "another number"])
def test_a_mixed_or_damaged_set_is_refused(tmp_path, buffers, change):
    def write(folder, step, number):
        folder.mkdir()
        paths = [folder / f"state_{step:08d}_{rank:05d}.bin" for rank in range(number)]
        state = TrainingState(step, buffers[0], buffers[1], (ProcessState(LoaderState(0, 0)),) * number)
        write_state_files(paths, state, TINY.layout, zero=True)
        return paths

    paths = write(tmp_path / "a", 7, 2)
    if change == "short":
        paths[1].write_bytes(paths[1].read_bytes()[:-4])
    elif change == "gone":
        paths[1].unlink()
    else:
        others = write(tmp_path / "b", *((8, 2) if change == "another step" else (7, 4)))
        paths[1].write_bytes(others[1].read_bytes())
    with pytest.raises(Gpt2JaxError, match=r"state_00000007_00001.bin: expected"):
        read_state_rows(paths, TINY.layout, range(2), 2)
