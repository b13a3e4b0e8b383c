"""Synthetic models in packed form, made as fast as the disk takes them.

One layer is made, packed, and then written once for each layer of the model: every layer has bytes of its own on the
disk, which is what paging reads.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mpillm.bench import synthetic, synthetic_shapes
from mpillm.model.opening import config_of, open_unpacked
from mpillm.tools import pack
from mpillm.weights.identity import fingerprint
from mpillm.weights.packed.file_plan import FilePlan, plan_files
from mpillm.weights.packed.files import Writer
from mpillm.weights.packed.layout import layer_file

CHUNK = 16 * 2**20
# Types that no GGUF file has, and the type that each is made of.
MADE = {"w8a8": "bf16"}


def create(shape: str, weights: str, threads: int) -> Path:
    """Return the packed directory of a shape with weights of a type, writing it first if it is not there yet.

    Of a published model, whose layers differ, it is the GGUF file.
    """
    found = synthetic_shapes.shape_named(shape, MADE.get(weights, weights))
    if not isinstance(found, synthetic_shapes.Shape):
        return synthetic.create(shape, weights)  # the model's layers are not all equal
    path = synthetic.folder() / f"{shape}.{weights}.packed"
    with synthetic.said(path):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with _beside(path) as part:
                _write(part, path, shape, found, weights, threads)
                os.replace(part, path)
    return path


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Make a temporary directory, which is removed at the end unless it was renamed."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.mkdir()
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(
    part: Path, path: Path, name: str, shape: synthetic_shapes.Shape, weights: str, threads: int
) -> None:
    one = part / "one.gguf"
    synthetic.write(one, name, replace(shape, layers=1), MADE.get(weights, weights))
    with contextlib.closing(open_unpacked(one, weights if weights in MADE else "none")) as source:
        size, digest = fingerprint(source)
        made = weights if weights in MADE else "source"
        about = {"source": path.name, "source_bytes": str(size), "source_hash": digest, "weights": made}
        whole = source.repeated(shape.layers)
        plans = plan_files(whole, config_of(whole), about)
        synthetic.require_room(path, sum(plan.nbytes for plan in plans))
        writer = Writer(whole, part, threads, lambda _: None)
        first, copies = plans[0], plans[1 : shape.layers]
        try:
            writer.write([first, *plans[shape.layers :]])
        finally:
            writer.close()
        digests = writer.digests
        for plan in copies:
            digests[plan.name] = digests[layer_file(0)]
            _copy(part, first, plan, digests[plan.name])
        pack.finish(whole, part, plans, digests, about)
    one.unlink()


def _copy(folder: Path, first: FilePlan, plan: FilePlan, digest: str) -> None:
    """Write a layer's file with the data of the first layer. It is on the disk and not in the page cache afterwards."""
    with (
        (folder / first.name).open("rb", buffering=0) as source,
        (folder / plan.name).open("xb", 0) as target,
    ):
        source.seek(len(first.head(digest)))
        target.write(plan.head(digest))
        data = memoryview(bytearray(CHUNK))
        while count := source.readinto(data):
            done = 0
            while done < count:
                done += target.write(data[done:count])
        os.fsync(target.fileno())
        os.posix_fadvise(target.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
