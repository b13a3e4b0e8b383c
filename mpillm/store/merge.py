"""`mpillm merge`: the output directories of a job's parts become one, in bounded memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from mpillm.batch.work import hashed_id
from mpillm.errors import JobError
from mpillm.store import report
from mpillm.store.directory import Directory, make
from mpillm.store.hdf5 import GrowingDataset, existing_file, new_file
from mpillm.store.merge_results import _chunks, merge_results
from mpillm.store.output import JOURNAL, LOCK, refuse_no_directory
from mpillm.store.readable import printable
from mpillm.store.results import HDF5, JSONL, TIMINGS
from mpillm.store.watching import outputs_in

FILES = (JSONL, HDF5, TIMINGS, report.JSON)


@dataclass(frozen=True)
class Merged:
    """The files and numbers of a merge."""

    parts: int
    requests: int
    errors: int
    renamed: bool  # whether every custom_id got its part's name in front


class _Id(msgspec.Struct):
    custom_id: str


class _Response(msgspec.Struct):
    status_code: int
    request_id: str
    body: dict[str, msgspec.Raw]


class _PartLine(msgspec.Struct):
    id: str
    custom_id: str
    response: _Response
    error: msgspec.Raw


def merge(parts: Sequence[Path], output: Path) -> Merged:
    """Merge the output directories `parts`, or those inside one directory, in their order.

    results.jsonl and results.h5 hold the requests of all parts; `requests/part` in results.h5 tells whose a request
    is, and the attribute `parts` has their names. report.json has the sums over all parts. Where two parts have the
    same custom_id, every custom_id becomes PART/custom_id.

    Raises
    ------
    JobError
        If a part is not finished or is itself merged, if two parts were run with different jobs or models, or if
        `output` is the output of a run.
    """
    parts = _parts(parts)
    names = _names(parts)
    metadata = _metadata(parts)
    make(output)
    with Directory(output) as directory:
        if JOURNAL in directory.names():
            raise JobError(f"{output} is the output of a run; give another directory for the merged results.")
        renamed = not _all_different(parts)
        ids = names if renamed else [""] * len(parts)
        with directory.replacing(JSONL) as file:
            counts = []
            for part, name in zip(parts, ids, strict=True):
                count = 0
                for line in _lines(part):
                    file.write(_renamed(line, name) if name else line)
                    file.write(b"\n")
                    count += 1
                counts.append(count)
        merge_results(directory, parts, names, ids, counts, metadata)
        _merge_timings(directory, parts)
        made = _merge_reports(parts, ids)
        report.write(directory, made)
    return Merged(len(parts), sum(counts), made.requests.errors, renamed)


def _parts(given: Sequence[Path]) -> list[Path]:
    """Return the directories to merge: those given, or those in the only one given if it is not a run's."""
    found = list(given)
    if len(given) == 1 and given[0].is_dir() and not (given[0] / JOURNAL).exists():
        found = outputs_in(given[0])
        if not found:
            raise JobError(f"{given[0]} contains no output directory of a run.")
    for part in found:
        refuse_no_directory(part)
        missing = [name for name in FILES if not (part / name).is_file()]
        if missing:
            raise JobError(
                f"{part} has no {missing[0]}: "
                + (
                    "that part is not finished, run its command again."
                    if (part / JOURNAL).exists() or (part / LOCK).exists()
                    else "it is not the output directory of a run."
                )
            )
    if len({part.resolve() for part in found}) < len(found):
        twice = next(part for part in given if [other.resolve() for other in given].count(part.resolve()) > 1)
        raise JobError(f"The part {twice} is given twice; leave one out.")
    return found


def _names(parts: Sequence[Path]) -> list[str]:
    """Return a name for each part: its directory's, or its path where two directories have the same name."""
    names = [printable(part.resolve().name) for part in parts]
    return names if len(set(names)) == len(names) else [printable(str(part)) for part in parts]


def _metadata(parts: Sequence[Path]) -> dict[str, Any]:
    """Return the attributes that results.h5 has in all parts; JobError names the first that differs."""
    first: dict[str, Any] = {}
    for part in parts:
        with existing_file(part / HDF5) as h5:
            attributes = dict(h5.attrs)
        if "parts" in attributes:
            raise JobError(f"{part} was made by mpillm merge; give the parts that it was made of.")
        first = first or attributes
        for key in sorted(first.keys() | attributes.keys()):
            if first.get(key) != attributes.get(key):
                raise JobError(
                    f"{parts[0]} and {part} are not parts of the same job: their {key} differs "
                    f"({_shown(first.get(key))} and {_shown(attributes.get(key))})."
                )
    return first


def _shown(value: Any) -> str:
    text = printable(str(value))
    return text if len(text) <= 300 else f"{text[:300]}..."


def _lines(part: Path) -> Iterator[bytes]:
    with open(part / JSONL, "rb") as file:
        for line in file:
            yield line.rstrip(b"\n")


def _all_different(parts: Sequence[Path]) -> bool:
    """Return whether no custom_id occurs twice, by hashes of 8 bytes (equal hashes only make the names longer)."""
    decode = msgspec.json.Decoder(_Id).decode
    hashes = b"".join(
        blake2b(decode(line).custom_id.encode(), digest_size=8).digest()
        for line in itertools.chain.from_iterable(map(_lines, parts))
    )
    values = np.frombuffer(hashes, np.uint64)
    return len(np.unique(values)) == len(values)


def _renamed(line: bytes, part: str) -> bytes:
    """Return a line of results.jsonl whose custom_id, and the ids made from it, have the part's name in front."""
    parsed = msgspec.json.decode(line, type=_PartLine)
    before, parsed.custom_id = parsed.custom_id, f"{part}/{parsed.custom_id}"
    old, new = hashed_id(before), hashed_id(parsed.custom_id)
    parsed.id = parsed.id.replace(old, new)
    parsed.response.request_id = parsed.response.request_id.replace(old, new)
    if "id" in parsed.response.body:
        raw = bytes(parsed.response.body["id"]).replace(old.encode(), new.encode())
        parsed.response.body["id"] = msgspec.Raw(raw)
    return msgspec.json.encode(parsed)


def _merge_timings(directory: Directory, parts: Sequence[Path]) -> None:
    with new_file(directory, TIMINGS) as (h5, check), ExitStack() as stack:
        opened = [stack.enter_context(existing_file(part / TIMINGS)) for part in parts]
        for name in opened[0]:
            column = GrowingDataset(h5, name, opened[0][name].dtype)
            for chunk in itertools.chain.from_iterable(_chunks(source[name]) for source in opened):
                column.add_bytes(chunk.tobytes())
                check()
            column.flush()


def _merge_reports(parts: Sequence[Path], ids: Sequence[str]) -> report.Report:
    """Sums over all parts; seconds are from the first part's start to the last one's end."""
    made = [report.read(part) for part in parts]
    began = [datetime.fromisoformat(each.began) for each in made]
    first = min(began)
    events = sorted(
        ((start - first).total_seconds() + seconds, index, tokens, requests)
        for index, (start, each) in enumerate(zip(began, made, strict=True))
        for seconds, tokens, requests in each.timeline
    )
    latest = [(0, 0)] * len(made)  # tokens and requests of each part so far
    timeline = []
    for seconds, index, tokens, requests in events:
        latest[index] = (tokens, requests)
        timeline.append((seconds, sum(of[0] for of in latest), sum(of[1] for of in latest)))
    ends = [(start - first).total_seconds() + each.seconds for start, each in zip(began, made, strict=True)]
    ranks = itertools.chain.from_iterable(each.ranks for each in made)
    errors = (
        (f"{part}/{custom_id}" if part else custom_id, message)
        for part, each in zip(ids, made, strict=True)
        for custom_id, message in each.errors.items()
    )
    return msgspec.structs.replace(
        made[0],
        input=None,
        began=first.isoformat(),
        seconds=max(ends),
        phases={key: sum(each.phases.get(key, 0.0) for each in made) for key in made[0].phases},
        requests=_summed([each.requests for each in made]),
        tokens=_summed([each.tokens for each in made]),
        earlier=[start for each in made for start in each.earlier],
        batch=_merged_steps([each.batch for each in made]),
        planned=None,
        parts=sum(each.parts for each in made),
        ranks=[msgspec.structs.replace(rank, rank=number) for number, rank in enumerate(ranks)],
        timeline=timeline,
        errors=dict(itertools.islice(errors, report.SHOWN_ERRORS)),
        warnings=list(dict.fromkeys(itertools.chain.from_iterable(each.warnings for each in made))),
    )


def _merged_steps(steps: Sequence[report.Steps]) -> report.Steps:
    summed = {
        name: sum(getattr(each, name) for each in steps) for name in ("steps", "turns", "drafted", "accepted")
    }
    drafters: dict[str, tuple[int, int]] = {}
    for each in steps:
        for name, (drafted, accepted) in each.drafters.items():
            before = drafters.get(name, (0, 0))
            drafters[name] = before[0] + drafted, before[1] + accepted
    peak = max(each.peak_sequences for each in steps)
    return msgspec.structs.replace(steps[0], peak_sequences=peak, drafters=drafters, **summed)


def _summed(structs: Sequence[Any]) -> Any:
    fields = structs[0].__struct_fields__
    return type(structs[0])(**{name: sum(getattr(each, name) for each in structs) for name in fields})
