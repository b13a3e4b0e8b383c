"""Reading past the page cache: the same bytes as a map gives, wherever they begin and end, and sentences where not."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from mpillm.errors import ModelError
from mpillm.weights.io.filesystem import AROUND, cached, map_cached
from mpillm.weights.io.mapped import MappedFile
from mpillm.weights.io.reading import HUGE, DirectFile, EqualBuffers, new_buffer, used_again
from tests.weights.residency import mapped

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
        monkeypatch.setattr("mpillm.weights.io.reading.open_direct", lambda path: -1)
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


def test_a_dropped_buffer_becomes_shorter_and_as_long_again() -> None:
    """What is there stays there: its pages are not new ones, which the system would fill with zeros."""
    old = new_buffer(5 * HUGE + 5000, 4096)
    old[:] = 7
    dropped = [new_buffer(HUGE, 4096), old]
    shorter = used_again(dropped, 3 * HUGE + 1, 4096)
    assert not dropped
    assert shorter.nbytes == 3 * HUGE + 1
    assert shorter.ctypes.data == old.ctypes.data
    assert (shorter == 7).all()
    again = used_again([shorter], 5 * HUGE, 4096)
    assert (again[: 3 * HUGE + 1] == 7).all()
    assert not again[3 * HUGE + 4096 :].any(), "what was cut off went back to the system"


@pytest.mark.parametrize("sizes", [[], [100, 5000], [2 * HUGE, HUGE - 1]])
def test_a_buffer_that_is_too_short_is_not_taken(sizes: list[int]) -> None:
    dropped = [new_buffer(size, 4096) for size in sizes]
    before = list(dropped)
    new = used_again(dropped, 4 * HUGE, 4096)
    assert new.nbytes == 4 * HUGE
    assert not dropped
    assert not any(np.shares_memory(new, old) for old in before)


@pytest.mark.parametrize("nbytes", [100, HUGE])
def test_a_buffer_of_the_same_size_is_taken_as_it_is(nbytes: int) -> None:
    dropped = [new_buffer(nbytes + 1, 64), old := new_buffer(nbytes, 64)]
    assert used_again(dropped, nbytes, 64) is old
    assert not dropped


@pytest.mark.parametrize(("nbytes", "count"), [(100, 7), (HUGE + 5000, 40), (40 * HUGE, 4)])
def test_equal_buffers_lie_side_by_side_and_are_used_again(nbytes: int, count: int) -> None:
    """Then their ends are in huge pages too."""
    equal = EqualBuffers(nbytes, count)
    taken = [equal.take([]) for _ in range(count)]
    starts = [buffer.ctypes.data for buffer in taken]
    assert all(buffer.nbytes == nbytes and buffer.ctypes.data % 4096 == 0 for buffer in taken)
    assert np.diff(starts).tolist() == [-(-nbytes // 4096) * 4096] * (count - 1)
    dropped = [taken.pop(1), new_buffer(nbytes + 1, 4096)]
    again = [old.ctypes.data for old in dropped]
    used = [equal.take(dropped), equal.take(dropped)]
    assert not dropped
    assert sorted(again) == sorted(buffer.ctypes.data for buffer in used)
    assert all(buffer.nbytes == nbytes for buffer in used)
    beside = equal.take([])  # more than were foreseen
    assert not any(np.shares_memory(beside, old) for old in [*taken, *used])


def flags_of_memory(address: int) -> list[str]:
    """The flags of the mapping at an address, as in /proc/self/smaps."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if "-" in name and not name.endswith(":"):
            begin, end = (int(part, 16) for part in name.split("-"))
            inside = begin <= address < end
        elif inside and name == "VmFlags:":
            return rest
    raise AssertionError("nothing is mapped there")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no huge pages"
)
def test_equal_buffers_are_in_huge_pages_to_their_end() -> None:
    """A disk that is read past the page cache gives a third of its rate to pages of 4 KiB."""
    equal = EqualBuffers(HUGE + HUGE // 2, 3)
    for buffer in [equal.take([]) for _ in range(3)]:
        assert "hg" in flags_of_memory(buffer.ctypes.data)
        assert "hg" in flags_of_memory(buffer.ctypes.data + len(buffer) - 1)
    alone = new_buffer(HUGE + HUGE // 2, 4096)
    assert "hg" not in flags_of_memory(alone.ctypes.data + len(alone) - 1)


def test_what_the_page_cache_has_is_mapped_without_looking_at_each_page(tmp_path: Path) -> None:
    """Fewer calls and half the time of populating; a page that is gone is an answer, not a signal."""
    path, pages = tmp_path / "file", 1100  # pieces of `AROUND`: more than one call takes
    path.write_bytes(bytes(pages * AROUND))
    file, sink = MappedFile(path), os.memfd_create("sink")
    with path.open("rb") as opened:
        if not cached(opened.fileno(), 5, file.size - 5):
            pytest.skip("this file system does not say what the page cache has")
    memory = file.view(4096, file.size - 4096)
    assert mapped(memory) < 0.1
    assert map_cached(memory.ctypes.data, memory.nbytes, sink)
    assert mapped(memory) > 0.9
    os.truncate(path, AROUND)
    assert not map_cached(memory.ctypes.data, memory.nbytes, sink)
    assert not cached(sink, 0, 2**30), "beyond the end"
    os.close(sink)


def test_what_linux_maps_around_a_byte_is_given_back_with_it(tmp_path: Path) -> None:
    """Linux 6.18 maps the whole folio, which may be as large as what was written at once."""
    path, size = tmp_path / "file", 1 << 22
    with path.open("wb", buffering=0) as out:
        for _ in range(4):
            out.write(bytes(size // 4))
    file = MappedFile(path)
    everything, middle = file.view(0, size), size * 3 // 8
    assert everything[middle] == 0
    assert mapped(everything) > 0
    file.release(middle, 1)
    assert mapped(everything) == 0
