"""Packing: any model becomes a directory of kernel-ready files, layer by layer, on as many ranks as there are."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec

from mpillm.catalogue import models
from mpillm.comm.world import World
from mpillm.errors import JobError, OutputError
from mpillm.model.config import ModelConfig
from mpillm.model.opening import config_of, open_unpacked
from mpillm.spec import shown_bytes
from mpillm.store.directory import Directory, explained, make, no_directory, replacing
from mpillm.store.output import try_lock
from mpillm.store.readable import printable
from mpillm.weights.formats.tensors import TensorSource
from mpillm.weights.identity import fingerprint
from mpillm.weights.packed.file_plan import FilePlan, plan_files
from mpillm.weights.packed.files import Unfit, Writer
from mpillm.weights.packed.layout import FORMAT, INDEX, TOKENIZER, TOKENIZER_FILE, UNFINISHED, VERSION
from mpillm.weights.packed.misfits import kept_before, misfits, too_narrow
from mpillm.weights.roles import ROLES, Key
from mpillm.weights.text_files import text_fields, text_files, text_folder

PackedType = Literal["source", "q4_0", "q8_0", "w8a8", "bf16", "bf12", "f32"]
SPARE = 16 * 2**20  # bytes that stay free on the disk


class PackProgress(Protocol):
    """The messages of packing."""

    def packing(self, done: int, total: int) -> None:
        """Tell how many bytes of this rank's files are on the disk, and of how many."""

    def downloading(self, done: int, total: int) -> None:
        """Show that the model is being fetched."""


class PackResult(msgspec.Struct, frozen=True, kw_only=True):
    """The result of packing."""

    directory: Path
    files: int
    bytes: int
    kept: int  # files that an earlier run had finished
    seconds: float


def pack(world: World, source: str, target: Path, weights: PackedType, progress: PackProgress) -> PackResult:
    """Pack a model into a directory (collective). MpillmError says what is wrong; the same command continues it."""
    start = time.monotonic()
    path = world.on_rank_0(lambda: models.resolve(source, progress.downloading))
    with contextlib.ExitStack() as stack:
        with world.together():
            opened = stack.enter_context(closing(_open(path, weights)))
            config = config_of(opened)
            if config.pooled:
                raise JobError(f"{path} has a classifier, which pack does not support; run the model itself.")
            size, digest = fingerprint(opened)
            about = {
                "source": printable(path.name),
                "source_bytes": str(size),
                "source_hash": digest,
                "weights": weights,
            }
            plans = plan_files(opened, config, about)
        with world.together():
            if world.rank == 0:
                stack.enter_context(_claim(path, target, about))
        plain = set[Key]()
        with world.together(), explained(target):
            if weights == "bf12":
                plain = too_narrow(plans) | kept_before(target, plans)
        plain = plain.union(*world.gather(plain))  # hosts may not yet see all files of an earlier run
        with world.together(), explained(target):
            if plain:
                plans = _without(opened, plain, config, about)
            mine = plans[world.rank :: world.size]
            files = _Files(opened, target, mine, world.threads(), progress)
        needed = sum(world.gather(files.needed))
        with world.together(), explained(target):
            files.write(needed, lambda found: _without(opened, found, config, about))
        everywhere = world.gather((files.digests, files.kept, files.unfit))
        with world.together(), explained(target):
            if unfit := set().union(*(keys for _, _, keys in everywhere)):
                plans = _without(opened, unfit, config, about)
            if world.rank == 0:
                digests = {name: digest for found, _, _ in everywhere for name, digest in found.items()}
                finish(opened, target, plans, digests, about)
    return PackResult(
        directory=target,
        files=len(plans),
        bytes=sum(plan.nbytes for plan in plans),
        kept=sum(count for _, count, _ in everywhere),
        seconds=time.monotonic() - start,
    )


def _open(path: Path, weights: PackedType) -> TensorSource:
    """Return the source, delivering what is to be stored."""
    source = open_unpacked(path)
    matrices = [info for key, info in source.tensors.items() if ROLES[key.role].quantisable]
    if weights == "source" or {info.stored.lower() for info in matrices} == {weights}:
        return source
    source.close()
    quantised = sorted({info.stored for info in matrices if info.type.quantised})
    if quantised:
        raise JobError(
            f"{path} is quantised already ({', '.join(quantised)}), and packing cannot undo that; leave out "
            "--weights to keep the types, or pack the unquantised model."
        )
    if weights == "bf12" and all(info.stored != "BF16" for info in matrices):
        raise JobError(f"{path} has no matrices in BF16, which --weights bf12 needs; leave it out.")
    return open_unpacked(path, weights)


def _without(
    source: TensorSource, found: set[Key], config: ModelConfig, about: dict[str, str]
) -> list[FilePlan]:
    """Return the files where these matrices stay as stored, and with one of an expert all of its layer's experts."""
    places = {(key.role, key.layer) for key in found}
    source.keep_as_stored({key for key in source.tensors if (key.role, key.layer) in places})
    return plan_files(source, config, about)


@contextlib.contextmanager
def _claim(source: Path, target: Path, about: dict[str, str]) -> Iterator[None]:
    """The right to write to the target; OutputError if it holds what is not ours, or another model."""
    if what := no_directory(target):
        raise OutputError(f"{target} is {what}; give a directory to pack to.")
    here, there = (Path(os.path.realpath(path)) for path in (target, source))
    if here == there or there in here.parents:
        raise OutputError(
            f"{target} is inside the model {source}, which is never changed; pack to another directory."
        )
    with explained(target):
        target.mkdir(parents=True, exist_ok=True)
        with Directory(target) as directory:
            names = directory.names()
        mark = next((name for name in (INDEX, UNFINISHED) if name in names), None)
        if mark is None and names:
            raise OutputError(
                f"{target} holds {min(names)!r} and no packed model; give a new or an empty directory."
            )
        if mark is not None and _about(target / mark) != about:
            raise OutputError(
                f"{target} has another model, or this one packed otherwise; give a new or an empty directory."
            )
        if mark is None:
            _write_json(target / UNFINISHED, {"format": FORMAT, "version": VERSION, **about})
        descriptor = os.open(target / (mark or UNFINISHED), os.O_RDONLY | os.O_CLOEXEC)
        try:
            if not try_lock(descriptor, target):
                raise OutputError(f"Another process is packing to {target}; wait for its end.")
            yield
        finally:
            os.close(descriptor)


def _about(path: Path) -> dict[str, str] | None:
    """Return the source of a packed directory; None if it cannot be read."""
    try:
        values = json.loads(path.read_bytes())
        if (values.pop("format"), values.pop("version")) != (FORMAT, VERSION):
            return None
        values.pop("files", None)
        found: dict[str, str] = values
        return found
    except (OSError, ValueError, KeyError, AttributeError, RecursionError):
        return None


class _Files:
    """The files of this rank: those that an earlier run has finished are kept, the others are to be written."""

    def __init__(
        self, source: TensorSource, target: Path, plans: list[FilePlan], threads: int, progress: PackProgress
    ) -> None:
        self._source, self._target, self._threads, self._progress = source, target, threads, progress
        self._done, self._total = 0, sum(plan.nbytes for plan in plans)
        self._writer = Writer(source, target, threads, self._count)
        self._missing = [plan for plan in plans if not self._writer.keep(plan)]
        self.kept, self.needed = len(plans) - len(self._missing), sum(plan.nbytes for plan in self._missing)
        self.unfit: set[Key] = set()
        self.digests = self._writer.digests

    def write(self, needed: int, without: Callable[[set[Key]], list[FilePlan]]) -> None:
        """Write the files, if there is room for those of all ranks. `without` plans with fewer coded matrices."""
        self._require(needed)
        try:
            while self._missing:
                try:
                    self._writer.write(self._missing)
                    break
                except Unfit as error:
                    self._plan_anew(error.plan, without)
        finally:
            self._writer.close()

    def _plan_anew(self, unfit: FilePlan, without: Callable[[set[Key]], list[FilePlan]]) -> None:
        found = misfits(self._source, unfit, self._threads)
        self.unfit |= found
        plans = {plan.name: plan for plan in without(found)}
        rest = self._missing[self._missing.index(unfit) :]
        self._missing = [plans[plan.name] for plan in rest]
        self._total += sum(plan.nbytes for plan in self._missing) - sum(plan.nbytes for plan in rest)
        self._require(sum(plan.nbytes for plan in self._missing))

    def _require(self, needed: int) -> None:
        free = shutil.disk_usage(self._target).free
        if needed and needed + SPARE > free:
            raise OutputError(
                f"{self._target} needs {shown_bytes(needed + SPARE)} more, but its disk has "
                f"{shown_bytes(free)} free; free some space."
            )

    def _count(self, count: int) -> None:
        self._done += count
        self._progress.packing(self._done, self._total)


def finish(
    source: TensorSource, target: Path, plans: list[FilePlan], digests: dict[str, str], about: dict[str, str]
) -> None:
    """Carry configuration and tokenizer along; the index comes last, and says that all is there."""
    folder, fields = text_folder(source.tokenizer), text_fields(source.tokenizer)
    if folder is not None:
        for path in text_files(folder):
            copy = target / path.relative_to(folder)
            make(copy.parent)
            _copy(path, copy)
    else:
        _write_json(target / "config.json", source.config)
        for path in text_files(source.tokenizer):
            _copy(path, target / TOKENIZER_FILE)
        if fields is not None:
            _write_json(target / TOKENIZER, fields)
    files = [{"name": plan.name, "bytes": plan.nbytes, "sha256": digests[plan.name]} for plan in plans]
    _write_json(target / INDEX, {"format": FORMAT, "version": VERSION, **about, "files": files})
    with contextlib.suppress(FileNotFoundError):
        (target / UNFINISHED).unlink()


def _copy(source: Path, path: Path) -> None:
    with source.open("rb") as whole, replacing(path) as file:
        shutil.copyfileobj(whole, file)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with replacing(path) as file:
        file.write(json.dumps(value, indent=1).encode())
