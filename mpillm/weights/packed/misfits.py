"""Which matrices BF12 cannot hold, or not in fewer bytes: found by packing them once into memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from mpillm.kernels.types import Misfit
from mpillm.weights.fill import fill
from mpillm.weights.formats.tensors import TensorSource
from mpillm.weights.io.reading import PORTION, REQUESTS, Bytes, new_buffer
from mpillm.weights.packed.file_plan import FilePlan, PackedPage
from mpillm.weights.packed.files import grouped
from mpillm.weights.packed.layout import PAGE
from mpillm.weights.plan import PageTensor
from mpillm.weights.roles import Key

Groups = list[Sequence[tuple[PageTensor, Bytes]]]


def misfits(source: TensorSource, plans: Iterable[FilePlan], threads: int) -> set[Key]:
    """The matrices planned as a coded type that should keep theirs. Reads all of them."""
    source.read_past_cache()
    found: set[Key] = set()
    memory = new_buffer(0, PAGE)
    with ThreadPoolExecutor(threads + REQUESTS, "misfits") as pool:
        for page in (page for plan in plans for page in plan.pages):
            if memory.nbytes < page.nbytes:
                memory = new_buffer(page.nbytes, PAGE)
            for key, groups in _coded(page, memory[: page.nbytes]).items():
                if _is_smaller(groups):
                    with contextlib.suppress(Misfit):
                        fill(groups, source, pool, PORTION)
                        continue
                found.add(key)
    return found


def _coded(page: PackedPage, memory: Bytes) -> dict[Key, Groups]:
    """The coded pieces of a page, by their tensors."""
    tensors: dict[Key, Groups] = {}
    for group in grouped(page, memory):
        if group[0][0].type.coded:
            tensors.setdefault(group[0][0].key, []).append(group)
    return tensors


def _is_smaller(groups: Groups) -> bool:
    """Whether the pieces have fewer bytes than those of the type that they are multiplied as."""
    entries = [entry for group in groups for entry, _ in group]
    plain = sum(entry.n * entry.k * entry.type.block_bytes for entry in entries)
    return sum(entry.nbytes for entry in entries) < plain
