"""Find the matrices that BF12 cannot hold, or not in fewer bytes: those keep the type that they have in their files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mpillm.errors import ModelError
from mpillm.kernels.types import Misfit
from mpillm.weights.fill import fill
from mpillm.weights.formats.tensors import TensorSource
from mpillm.weights.io.reading import PORTION, REQUESTS, Bytes, new_buffer
from mpillm.weights.packed.file_plan import FilePlan
from mpillm.weights.packed.files import grouped
from mpillm.weights.packed.index import read_packed_file, tensor_of
from mpillm.weights.packed.layout import PAGE
from mpillm.weights.plan import PageTensor
from mpillm.weights.roles import Key

Groups = list[Sequence[tuple[PageTensor, Bytes]]]


def too_narrow(plans: Iterable[FilePlan]) -> set[Key]:
    """Return the matrices whose pieces would not have fewer bytes than those of their products' type."""
    coded: dict[Key, int] = {}
    plain: dict[Key, int] = {}
    for entry in _coded_entries(plans):
        coded[entry.key] = coded.get(entry.key, 0) + entry.nbytes
        plain[entry.key] = plain.get(entry.key, 0) + entry.n * entry.k * entry.type.block_bytes
    return {key for key, nbytes in coded.items() if nbytes >= plain[key]}


def kept_before(folder: Path, plans: Iterable[FilePlan]) -> set[Key]:
    """Return the matrices planned as a coded type that the files of an earlier run have as another one."""
    found: set[Key] = set()
    for plan in plans:
        path, coded = folder / plan.name, {entry.key for entry in _coded_entries([plan])}
        if not coded or not os.path.exists(path):
            continue
        with contextlib.suppress(
            ModelError, KeyError, TypeError, ValueError
        ):  # not ours: it is written again
            table = read_packed_file(folder, (plan.name, path.stat().st_size)).table
            found |= coded & {key for key, info in map(tensor_of, table) if not info.type.coded}
    return found


def misfits(source: TensorSource, plan: FilePlan, threads: int) -> set[Key]:
    """Return the matrices planned as a coded type that it cannot hold, of one file. Reads and packs all of them."""
    found: set[Key] = set()
    with ThreadPoolExecutor(threads + REQUESTS, "misfits") as pool:
        for page in plan.pages:
            tensors: dict[Key, Groups] = {}
            for group in grouped(page, new_buffer(page.nbytes, PAGE)):
                if group[0][0].type.coded:
                    tensors.setdefault(group[0][0].key, []).append(group)
            for key, groups in tensors.items():
                try:
                    fill(groups, source, pool, PORTION)
                except Misfit:
                    found.add(key)
    return found


def _coded_entries(plans: Iterable[FilePlan]) -> Iterator[PageTensor]:
    """Yield the pieces of coded types; of experts that are alike the first one's."""
    for plan in plans:
        for page in plan.pages:
            if page.expert <= 0:
                for panel in page.panels:
                    yield from (piece.entry for piece in panel.pieces if piece.entry.type.coded)
