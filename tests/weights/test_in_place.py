"""Quantised matrices that are used where they lie in a file until they are packed."""

from __future__ import annotations

import mmap
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpillm import kernels
from mpillm.model.batch import Batch
from mpillm.model.decoder import Decoder
from mpillm.model.opening import config_of, open_source
from mpillm.partition.grid import Place
from mpillm.weights import fill
from mpillm.weights.formats import in_place
from mpillm.weights.formats.in_place import InPlaceLoader
from mpillm.weights.formats.loaders import UnpackedLoader
from mpillm.weights.io import mapped
from mpillm.weights.io.filesystem import FOLIO
from mpillm.weights.io.reading import new_buffer
from mpillm.weights.page import Matrix, Page
from mpillm.weights.paging.cache import WeightCache
from mpillm.weights.plan import ALIGNMENT, PagePlan, PageTensor
from mpillm.weights.roles import Key
from mpillm.weights.source import rank_plans
from tests.tools.packing import expected, model_path, outcome
from tests.weights.build import Tiny, write_hf

NAMES = ["llama_kquants.gguf", "llama_mixed.gguf", "qwen3moe_q8_0.gguf"]


def product(matrix: Matrix) -> list[float]:
    x = np.random.default_rng(0).standard_normal((3, matrix.k)).astype(np.float32)
    out = np.empty((3, matrix.n), np.float32)
    kernels.Products(matrix)(x, [out])
    values: list[float] = out.ravel().tolist()
    return values


@pytest.mark.parametrize(("name", "shards"), [(NAMES[0], 1), (NAMES[0], 2), (NAMES[1], 1), (NAMES[2], 1)])
def test_blocks_are_used_in_place_until_they_are_packed(name: str, shards: int) -> None:
    with closing(open_source(model_path(name))) as source:
        pages = rank_plans(config_of(source), Place(0, 1, shards), source)
        common = [page for page in pages if page.expert < 0]
        model_path(name).read_bytes()  # so that the page cache has it
        with closing(source.open_loader("auto", 2, common, False)) as loader:
            assert isinstance(loader, InPlaceLoader)
            first = {plan.name: loader.load(plan, loader.allocate(plan, [])) for plan in common}
            renewed = {plan.name: page for plan, page in loader.renewed()}
            assert renewed
            assert not list(loader.renewed())
            in_blocks = 0
            for plan in common:
                for entry in plan.entries:
                    if entry.bounds and entry.type.quantised:
                        (before, *_) = first[plan.name].matrices(entry.key.role)
                        in_blocks += before.row_bytes > 0
                        assert (before.row_bytes > 0) == (source.in_place(entry) is not None)
                        if plan.name in renewed:
                            (after, *_) = renewed[plan.name].matrices(entry.key.role)
                            assert not after.row_bytes
                            assert product(before) == product(after)
            assert in_blocks
            del first, renewed


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_the_same_while_pages_are_packed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page between two steps, in place of one that the layers have used; the first step does not wait."""
    want = outcome(model_path(name), name, loader="read")
    renewed, waiting, given = InPlaceLoader.renewed, list[tuple[PagePlan, Page]](), list[str]()

    def one_by_one(loader: InPlaceLoader) -> list[tuple[PagePlan, Page]]:
        waiting.extend(renewed(loader))
        now, waiting[:1] = waiting[:1], []
        given.extend(plan.name for plan, _ in now)
        events.append("renewed")
        return now

    def forward(decoder: Decoder, batch: Batch) -> Any:
        events.append("step")
        return step(decoder, batch)

    events, step = list[str](), Decoder.forward
    monkeypatch.setattr(InPlaceLoader, "renewed", one_by_one)
    monkeypatch.setattr(Decoder, "forward", forward)
    assert outcome(model_path(name), name) == want == expected(name)
    assert len(set(given)) > 2
    assert events[:3] == ["step", "renewed", "step"]


@pytest.mark.parametrize("name", NAMES)
def test_what_lies_beside_the_file_is_made_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as rows in llama.cpp's order: made again with the packed blocks, they would be in memory twice."""
    filled, plain = list[PageTensor](), in_place.fill

    def counted(pages: Any, *given: Any) -> None:
        filled.extend(entry for page in pages for entry, _ in page)
        plain(pages, *given)

    monkeypatch.setattr(in_place, "fill", counted)
    with closing(open_source(model_path(name))) as source:
        pages = [page for page in rank_plans(config_of(source), Place(0, 1, 1), source) if page.expert < 0]
        model_path(name).read_bytes()
        loader = source.open_loader("auto", 2, pages, False)
        assert isinstance(loader, InPlaceLoader)
        with closing(WeightCache(pages, loader, sum(page.nbytes for page in pages))) as cache:
            for number in range(len(pages)):
                with cache.use(number):
                    pass
            beside = len(filled)
            cache.renew(lambda: None)
        entries = [entry for page in pages for entry in page.entries if not source.in_file(entry)]
        assert sorted(map(id, filled)) == sorted(map(id, entries))
        assert 0 < beside < len(filled)


def test_threads_that_pack_a_page_leave_nothing_of_it_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that reads the end of its piece maps what another one has released: all is released behind the last one."""
    with closing(open_source(model_path(NAMES[0]))) as source, ThreadPoolExecutor(2) as pool:
        released = list[tuple[Key, Any]]()
        monkeypatch.setattr(source, "release", lambda key, rows=None: released.append((key, rows)))
        plan = next(page for page in rank_plans(config_of(source), Place(0, 1, 1), source) if page.entries)
        fill.load(plan, source, new_buffer(plan.nbytes, ALIGNMENT), pool, 4096)
        whole = {(entry.key, None) for entry in plan.entries}
        assert len(whole) > 2
        assert whole == set(released[-len(whole) :])


def test_what_the_page_cache_lacks_is_packed_while_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_place, "cached", lambda *_: False)
    with closing(open_source(model_path(NAMES[0]))) as source:
        pages = rank_plans(config_of(source), Place(0, 1, 1), source)
        with closing(source.open_loader("auto", 2, pages, False)) as loader:
            assert isinstance(loader, UnpackedLoader)


def test_floats_that_the_page_cache_lacks_are_read_as_huge_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole folios of long runs, and only of what is in this process's part; the bytes are the file's."""
    model = Tiny(hidden=512, intermediate=4096, n_layers=4)
    path, advised = write_hf(tmp_path, model.weights(), model.config(), "BF16"), list[tuple[int, int]]()
    real = mapped.madvise

    def madvise(address: int, nbytes: int, advice: int) -> None:
        if advice == mmap.MADV_HUGEPAGE:
            advised.append((address, nbytes))
        real(address, nbytes, advice)

    monkeypatch.setattr(mapped, "madvise", madvise)
    monkeypatch.setattr(mapped, "reads_huge", lambda: True)
    for there in (False, True):
        monkeypatch.setattr(in_place, "cached", lambda *_, there=there: there)
        with closing(open_source(path)) as source:
            pages = [
                page for page in rank_plans(config_of(source), Place(1, 2, 1), source) if page.layer >= 0
            ]
            with closing(source.open_loader("auto", 2, pages, False)) as loader:
                assert isinstance(loader, InPlaceLoader)
                loaded = [loader.load(plan, loader.allocate(plan, [])) for plan in pages]
                for page in loaded:
                    for entry in page.plan.entries:
                        if source.in_place(entry):
                            (matrix,) = page.matrices(entry.key.role)
                            assert matrix.data.tobytes() == source.read(entry.key).tobytes()
                (file,) = loader._maps
                size = file.size
                del loaded, page, matrix
    assert advised
    half = 2 * 3 * 4096 * 512 * 2
    assert 0.5 * half < sum(nbytes for _, nbytes in advised) < 1.1 * half < 0.7 * size
    assert all(nbytes % FOLIO == 0 for _, nbytes in advised)
