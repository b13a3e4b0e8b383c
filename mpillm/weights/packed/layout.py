"""The layout of a packed model in its files: pure functions of the model's shape and its tensors' types.

What is paged in together (a part of a layer, or the output head) lies in panels, one behind the other: panel p is
what shard p would hold if there were as many shards as the model can be cut into (8, or a smaller power of two). So
the panels of any shard, of any number of shards, are one run of bytes. A layer's experts, which are all alike, lie one
behind the other, each in panels of its own. docs/packed.md describes it for other readers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mpillm.kernels.types import BlockType
from mpillm.partition.grid import Place
from mpillm.weights.inventory import EXPERT, HEAD, TensorSpec
from mpillm.weights.plan import PageTensor, aligned, plan_entry
from mpillm.weights.roles import Key, hf_name, hf_name_of_experts

FORMAT, VERSION = "mpillm-packed", 3
INDEX = "packed.json"
UNFINISHED = "packing.json"  # instead of the index, until all files are there
TOKENIZER = "tokenizer.gguf.json"  # a GGUF file's tokenizer.* fields
TOKENIZER_FILE = "tokenizer.t"  # the one of a model of Distributed-Llama
PAGE = 4096  # panels begin at multiples of it and are filled up to one
EMBED = "embed"


@dataclass(frozen=True)
class Piece:
    """A part of a tensor in a panel. `repeated`: the panel before has it too, so who holds both needs it once."""

    entry: PageTensor
    repeated: bool


@dataclass(frozen=True)
class Panel:
    """The part that the finest shard number `number` needs; the entries' offsets count from the panel's beginning."""

    number: int
    pieces: tuple[Piece, ...]
    nbytes: int


def panels_of(tensors: Sequence[TensorSpec], count: int, type_of: Callable[[Key], BlockType]) -> list[Panel]:
    """Return the panels in which these tensors are stored: `count` is the model's largest number of shards."""
    panels = []
    for number in range(count):
        pieces: list[Piece] = []
        offset = 0
        for tensor in tensors:
            key = tensor.key
            rows, cols, bounds = tensor.slices(Place(number, 1, count))
            border = rows.start
            if number:
                before, same_cols, _ = tensor.slices(Place(number - 1, 1, count))
                if same_cols == cols:
                    border = min(max(before.stop, rows.start), rows.stop)
            for half in (range(rows.start, border), range(border, rows.stop)):
                for part in tensor.apart(half) if half else ():
                    entry = plan_entry(key, part, cols, bounds, type_of(key), offset)
                    pieces.append(Piece(entry, part.start < border))
                    offset += aligned(entry.nbytes)
        panels.append(Panel(number, tuple(pieces), aligned(offset, PAGE)))
    return panels


def shard_extent(panels: list[Panel], place: Place) -> tuple[tuple[PageTensor, ...], int, int]:
    """Return the part of these panels that a rank takes: its entries, and the offset and size of their bytes."""
    each = len(panels) // place.shards
    first = place.shard * each
    begin = sum(panel.nbytes for panel in panels[:first])
    entries, offset = [], 0
    for panel in panels[first : first + each]:
        for piece in panel.pieces:
            if not piece.repeated or panel.number == first:
                entries.append(replace(piece.entry, offset=offset + piece.entry.offset))
        offset += panel.nbytes
    return tuple(entries), begin, offset


def panel_name(kind: str, layer: int, number: int) -> str:
    """Return the name in a safetensors file of a panel's bytes, or of all experts'."""
    if kind == EXPERT:
        return f"layers.{layer}.experts"
    return f"head.panel.{number}" if kind == HEAD else f"layers.{layer}.{kind}.panel.{number}"


def layer_file(layer: int) -> str:
    """Return the file of a layer's parts."""
    return f"layer-{layer:05d}.safetensors"


def piece_records(panels: list[Panel], kind: str, layer: int) -> Iterator[dict[str, Any]]:
    """Yield the panels' pieces for the file's metadata: all that another reader needs to find its way."""
    begin = 0
    for panel in panels:
        for piece in panel.pieces:
            entry = piece.entry
            yield {
                "tensor": hf_name(entry.key) if kind != EXPERT else hf_name_of_experts(entry.key),
                "panel": panel_name(kind, layer, panel.number),
                "offset": begin + entry.offset,
                "nbytes": entry.nbytes,
                "type": entry.type.name,
                "rows": [entry.rows.start, entry.rows.stop],
                "cols": [entry.cols.start, entry.cols.stop],
                "bounds": list(entry.bounds),
                "repeated": piece.repeated,
            }
        if kind == EXPERT:
            begin += panel.nbytes
