"""Loaders of an unpacked model's pages: they pack matrices for the kernels, or use them where they lie (`in_place`)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

from mpillm.weights.fill import UNDER_WAY, load
from mpillm.weights.formats.in_place import InPlaceLoader, TensorFiles, warm
from mpillm.weights.io.filesystem import can_populate, network_kind
from mpillm.weights.io.numa import spread
from mpillm.weights.io.reading import PORTION, REQUESTS, Bytes, new_buffer
from mpillm.weights.page import Page
from mpillm.weights.paging.loaders import Kind
from mpillm.weights.paging.pager import BufferLoader, Loader
from mpillm.weights.plan import ALIGNMENT, PagePlan

LOADING_NBYTES = 48 * 2**20  # bytes of buffers and of their values while rows are decoded for packing


def open_unpacked_loader(
    source: TensorFiles, kind: Kind, threads: int, pages: Sequence[PagePlan], streamed: bool
) -> Loader[Page]:
    """Return the loader of some pages of an unpacked model (see `Source.open_loader`).

    "auto" maps what stays if products can take some of it as it lies in the files: floats, for that costs nothing but
    reading them once, and quantised matrices if the page cache has them. What is streamed it reads past the page cache,
    which is faster than filling that cache and emptying it again; and what comes over a network, always.
    """
    slow_faults = network_kind(source.path) is not None
    mapped = kind != "read" and not streamed and not (slow_faults and kind == "auto") and can_populate()
    entries = [entry for page in pages for entry in page.entries] if mapped else []
    if any(map(source.in_file, entries)) or warm(source, entries):
        return InPlaceLoader(source, pages, threads, REQUESTS if pages[0].expert >= 0 else 2)
    past_cache = kind == "read" or (kind == "auto" and (streamed or slow_faults))
    return UnpackedLoader(source, threads, pages, streamed, past_cache)


class UnpackedLoader(BufferLoader[Page]):
    """Pages of an unpacked model, made kernel-ready by threads that all pages share.

    Several pages are loaded at a time: small ones each by one thread, for handing pieces over takes as long as packing
    them, unless they are read past the page cache, where the disk is to be kept busy.
    """

    def __init__(
        self,
        source: TensorFiles,
        threads: int,
        pages: Sequence[PagePlan],
        streamed: bool,
        past_cache: bool,
    ) -> None:
        if past_cache:
            source.read_past_cache()
            workers = REQUESTS
            parallel = REQUESTS if pages[0].expert >= 0 else 2
        else:
            # What stays is awaited by the first step, which has nothing else to do.
            workers = parallel = max(threads // 2, 1) if streamed else threads
        self._source = source
        self._chunk = min(UNDER_WAY // workers, PORTION)
        self._small = 0 if past_cache else 4 * self._chunk
        self._pool = ThreadPoolExecutor(workers, "weights reader")
        super().__init__(self._make, parallel)
        self._arena, self._begins = new_buffer(0, ALIGNMENT), dict[str, int]()
        self.takes_any_buffer = streamed
        if not streamed:
            # One piece of memory for all: many have a part of a huge page at their end, and small pages take long.
            sizes = [page.nbytes for page in pages]
            self._arena = new_buffer(sum(sizes), ALIGNMENT)
            spread(self._arena, threads)
            self._begins = dict(
                zip((page.name for page in pages), accumulate(sizes, initial=0), strict=False)
            )

    def allocate(self, plan: PagePlan, dropped: list[Bytes]) -> Bytes:
        if not self._begins:
            return super().allocate(plan, dropped)
        return self._arena[self._begins[plan.name] :][: plan.nbytes]

    def close(self) -> None:
        self._pool.shutdown()

    def _make(self, plan: PagePlan, buffer: Bytes) -> Page:
        pool = None if plan.nbytes <= self._small else self._pool
        return load(plan, self._source, buffer, pool, self._chunk)
