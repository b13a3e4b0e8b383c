"""Merges the results.h5 of a job's parts, dataset by dataset."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import h5py
import msgspec
import numpy as np
from numpy.typing import NDArray

from mpillm.errors import JobError
from mpillm.store.directory import Directory
from mpillm.store.hdf5 import GrowingDataset, TextColumn, existing_file, new_file
from mpillm.store.results import HDF5, JSONL, TIMINGS, hdf5_text

CHUNK = 1 << 16  # values that are copied at once

# Datasets that hold an index into another dataset; it is increased by the lengths of the earlier parts there.
_INDEX = {"requests/choices": "choices/prompt", "choices/prompt": "prompts/offsets"}


def merge_results(
    directory: Directory,
    parts: Sequence[Path],
    names: Sequence[str],
    ids: Sequence[str],
    counts: Sequence[int],
    metadata: dict[str, Any],
) -> None:
    """Write the results.h5 of all parts, with `metadata`, to `directory`.

    `names` are those of the parts, `ids` what goes in front of their custom_ids (nothing if empty), and `counts` how
    many lines each part has. JobError if a part's results.h5 has another number of lines.
    """
    with new_file(directory, HDF5) as (h5, check), ExitStack() as stack:
        opened = [stack.enter_context(existing_file(part / HDF5)) for part in parts]
        for part, source, count in zip(parts, opened, counts, strict=True):
            if len(source["requests/line"]) != count:
                raise JobError(
                    f"{part / HDF5} and {JSONL} do not belong together; run that part's command again."
                )
        for key, value in metadata.items():
            h5.attrs[key] = value
        h5.attrs["parts"] = msgspec.json.encode(list(names)).decode()
        h5["timings"] = h5py.ExternalLink(TIMINGS, "/")
        for group in (name for name in opened[0] if name != "timings"):
            for name in opened[0][group]:
                _merge_dataset(h5.require_group(group), f"{group}/{name}", opened, ids, check)
        of_part = GrowingDataset(h5["requests"], "part", np.int32)
        for index, count in enumerate(counts):
            for start in range(0, count, CHUNK):
                of_part.add_bytes(np.full(min(CHUNK, count - start), index, np.int32).tobytes())
                check()
        of_part.flush()


def _merge_dataset(
    group: h5py.Group, path: str, sources: Sequence[h5py.File], ids: Sequence[str], check: Any
) -> None:
    """Append a dataset of all parts; offsets and indices are increased by the lengths of the earlier parts."""
    name = path.rpartition("/")[2]
    dataset = sources[0][path]
    if h5py.check_string_dtype(dataset.dtype):
        texts = TextColumn(group, name)
        for source, part in zip(sources, ids, strict=True):
            for value in itertools.chain.from_iterable(_chunks(source[path])):
                text = value.decode()
                texts.add(_renamed_text(text, part) if part and path == "requests/custom_id" else text)
            check()
        texts.flush()
        return
    # An offsets dataset has one entry more than rows: only the first part keeps its first entry.
    offsets = name == "offsets" or path == "requests/choices"
    numbers = GrowingDataset(group, name, dataset.dtype)
    base = 0
    for index, source in enumerate(sources):
        for number, chunk in enumerate(_chunks(source[path])):
            values = chunk[1:] if offsets and index and number == 0 else chunk
            numbers.add_bytes((values + base if base else values).astype(dataset.dtype).tobytes())
            check()
        if offsets:
            base += int(source[path][-1])
        elif path in _INDEX:
            base += len(source[_INDEX[path]]) - 1
    numbers.flush()


def _renamed_text(stored: str, part: str) -> str:
    """Return a custom_id as results.h5 stores it, with the part's name in front."""
    custom_id = msgspec.json.decode(stored, type=str) if stored.startswith('"') else stored
    return hdf5_text(f"{part}/{custom_id}")


def _chunks(dataset: h5py.Dataset) -> Iterator[NDArray[Any]]:
    for start in range(0, len(dataset), CHUNK):
        yield dataset[start : start + CHUNK]
