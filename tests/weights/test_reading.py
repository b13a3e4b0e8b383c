"""Reading past the page cache: the same bytes as a map gives, wherever they begin and end, and sentences where not."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from mpillm.errors import ModelError
from mpillm.weights.mapped import MappedFile
from mpillm.weights.reading import DirectFile, new_buffer

SIZE = 3 * 4096 + 517


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(np.random.default_rng(5).bytes(SIZE))
    return path


@pytest.mark.parametrize(("offset", "nbytes"), [
    (0, 4096), (1, 4095), (100, 5000), (4096, 8192), (0, SIZE), (SIZE - 3, 3), (3 * 4096 - 1, 518), (7, 0),
])  # fmt: skip
@pytest.mark.parametrize("has_direct", [True, False])
def test_the_bytes_of_the_file(
    offset: int, nbytes: int, has_direct: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_direct:  # as on tmpfs
        monkeypatch.setattr("mpillm.weights.reading.open_direct", lambda path: -1)
    mapped, streamed = MappedFile(path), MappedFile(path)
    streamed.read_past_cache()
    expected = path.read_bytes()[offset : offset + nbytes]
    assert mapped.read(offset, nbytes).tobytes() == streamed.read(offset, nbytes).tobytes() == expected
    assert not np.shares_memory(streamed.read(offset, nbytes), streamed.bytes)
    mapped.close()
    streamed.close()


def test_a_file_that_was_shortened(path: Path) -> None:
    file = DirectFile(path, SIZE)
    os.truncate(path, 4096)
    with pytest.raises(
        ModelError, match="was shortened or changed while it was in use; put the model's file back"
    ):
        file.read(4000, 5000)
    file.close()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read: No such file"):
        DirectFile(tmp_path / "nothing", 1)


@pytest.mark.parametrize("alignment", [64, 4096])
def test_buffers_are_aligned(alignment: int) -> None:
    for nbytes in (1, 4097):
        buffer = new_buffer(nbytes, alignment)
        assert buffer.nbytes == nbytes
        assert buffer.ctypes.data % alignment == 0
