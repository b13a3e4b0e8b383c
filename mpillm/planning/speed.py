"""The speeds of ranks, which are measured (`measure`), read from a file of hosts (`hosts`), or assumed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache

from mpillm.kernels import BlockType

ROWS = (1, 4, 16, 64)  # the rows of activations with which products are measured; the last may be missing
WIDTH = 2048  # the columns of the matrices with which they are measured, as in models of about 10^9 weights
SMALL, LARGE = 512 * 1024, 4 * 2**20  # bytes of the requests with which disks are measured
KINDS = ("q4_0", "q4_k", "q8_0", "w8a8", "bf16", "f32")  # the block types that stand for all

Products = Mapping[str, Sequence[float]]  # for each kind, the operations/s with each of ROWS


@dataclass(frozen=True)
class Speed:
    """The rates of a rank, and of its host's link to other hosts; `wire` is 0 if the link is not known."""

    products: Products
    memory: float  # bytes/s of reading memory
    disk: float  # bytes/s of reading the model's files
    pages: float = 0.0  # bytes/s of reading small pages of weights one by one; 0: as `disk`
    # Operations/s of attention: with one row of each sequence, and with the rows of a prompt.
    attention: tuple[float, float] = (15e9, 30e9)
    values: float = 1e9  # values/s of norms, activation functions and quantisation
    fill: float = 4e9  # bytes/s of writing to new memory
    core: float = 0.5  # the speed of plain code on one core; 1 on the core on which `step_time` was measured
    part: float = 1.0  # the part of the time for which a quota lets the rank run; the rates above include it
    latency: float = 0.0  # seconds of a message one way
    wire: float = 0.0  # bytes/s of the link

    @property
    def key(self) -> tuple[object, ...]:
        """All rates as a key for dictionaries."""
        products = tuple((kind, tuple(rates)) for kind, rates in self.products.items())
        return products, *(getattr(self, field.name) for field in fields(self) if field.name != "products")

    def shared_by(self, ranks: float) -> Speed:
        """Return the speed of each of `ranks` ranks that share this speed; each has the whole link to other hosts."""
        products = {kind: tuple(rate / ranks for rate in rates) for kind, rates in self.products.items()}
        return replace(
            self,
            products=products,
            memory=self.memory / ranks,
            disk=self.disk / ranks,
            pages=self.pages / ranks,
            attention=(self.attention[0] / ranks, self.attention[1] / ranks),
            values=self.values / ranks,
            fill=self.fill / ranks,
        )

    def slowed(self, times: float) -> Speed:
        """Return the speed of a rank that takes `times` times as long to compute and has the same link."""
        return replace(self.shared_by(times), core=self.core / times)

    def operations(self, kind: BlockType, rows: float) -> float:
        """Operations/s of products of a matrix of type `kind` with `rows` rows, interpolated between ROWS."""
        rates = self.products[stand_in(kind, tuple(self.products))]
        rows = min(max(rows, ROWS[0]), ROWS[len(rates) - 1])
        at = next(index for index in range(1, len(rates)) if rows <= ROWS[index])
        part = math.log(rows / ROWS[at - 1]) / math.log(ROWS[at] / ROWS[at - 1])
        return float(rates[at - 1] ** (1 - part) * rates[at] ** part)


@cache
def stand_in(kind: BlockType, known: tuple[str, ...]) -> str:
    """Return the known type whose speed stands for that of `kind`: quantised if `kind` is, of the nearest size."""
    name = kind.name.lower()
    if name in known:
        return name
    kinds = {other: BlockType[other.upper()] for other in known}
    return min(
        known,
        key=lambda other: (kinds[other].quantised != kind.quantised, abs(_bits(kinds[other]) - _bits(kind))),
    )


def _bits(kind: BlockType) -> float:
    return 8 * kind.block_bytes / kind.block


# The speed of a desktop with four cores, AVX2, a SATA disk and gigabit Ethernet.
ASSUMED = Speed(
    products={
        "q4_0": (70e9, 150e9, 200e9),
        "q4_k": (60e9, 130e9, 170e9),
        "q8_0": (36e9, 100e9, 150e9),
        "w8a8": (38e9, 120e9, 190e9),
        "bf16": (20e9, 45e9, 60e9),
        "f32": (10e9, 30e9, 45e9),
    },
    memory=20e9,
    disk=0.5e9,
    latency=60e-6,
    wire=1e9 / 8,
)
