"""Packed files that others use, or take away, while a run pages from them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from mpillm.errors import ModelError
from mpillm.model.opening import config_of, open_source
from mpillm.partition.grid import Place
from mpillm.weights.page import Page
from mpillm.weights.paging.cache import WeightCache, minimum_budget
from mpillm.weights.paging.loaders import Kind
from mpillm.weights.source import rank_plans
from tests.tools.packing import packed

ALONE = Place(0, 1, 1)
LOADERS = pytest.mark.parametrize("loader", ["mmap", "read"])


@contextmanager
def paging(
    model: Path, loader: Kind, everything: bool = False, place: Place = ALONE
) -> Iterator[WeightCache[Page]]:
    """A cache with the least budget, through which everything passes in every round, or one that holds `everything`."""
    with closing(open_source(model)) as source:
        config = config_of(source)
        pages = rank_plans(config, place, source)
        budget = None if everything else minimum_budget(pages)
        cache = WeightCache(pages, source.open_loader(loader, 1, pages, streamed=not everything), budget)
        with closing(cache):
            yield cache


def content(cache: WeightCache[Page], page: int) -> bytes:
    with cache.use(page) as layer:
        return layer.buffer.tobytes()


@LOADERS
def test_two_jobs_page_from_one_file(tmp_path: Path, loader: Kind) -> None:
    """Each gives pages back that the other one needs; neither sees anything of that."""
    packed("llama3", tmp_path / "p")
    with paging(tmp_path / "p", loader) as first, paging(tmp_path / "p", loader) as second:
        count = len(first.pages)
        alone = [content(first, page) for page in range(count)]
        for turn in range(2 * count):
            here, there = turn % count, (turn + count // 2) % count
            assert (content(first, here), content(second, there)) == (alone[here], alone[there])


@LOADERS
def test_a_file_that_vanishes_is_read_to_the_end(tmp_path: Path, loader: Kind) -> None:
    """Who has it open keeps it, as with any file; the next run says what is missing."""
    packed("llama3", tmp_path / "p")
    with paging(tmp_path / "p", loader) as cache:
        before = [content(cache, page) for page in range(len(cache.pages))]
        (tmp_path / "p" / "layer-00001.safetensors").unlink()
        assert [content(cache, page) for page in range(len(cache.pages))] == before
    with pytest.raises(ModelError, match=r"names layer-00001\.safetensors, which is missing"):
        open_source(tmp_path / "p")


def test_a_disk_that_fails_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of reading fail, as they do where a sector is lost."""
    packed("llama3", tmp_path / "p")
    with paging(tmp_path / "p", "read") as cache:
        content(cache, 0)

        def lost(*_: object) -> int:
            raise OSError(5, os.strerror(5))

        monkeypatch.setattr(os, "preadv", lost)
        with pytest.raises(ModelError, match=r"\.safetensors cannot be read any more: Input/output error"):
            [content(cache, page) for page in [*range(len(cache.pages))] * 2]
