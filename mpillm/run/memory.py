"""All of a rank's memory: its two budgets, what a step's rows take, and what the process itself does.

It is known before the run (`plan` prints it), and the report says what of it was used.
"""

from __future__ import annotations

import re
import resource
from pathlib import Path

import msgspec

from mpillm.engine.reply import TILE
from mpillm.model.activations import Activations
from mpillm.model.config import ModelConfig
from mpillm.partition.grid import Place, vocab_axis
from mpillm.weights.source import Source

# Measured on x86-64 with Open MPI and MPICH: 45 MiB for Python and MPI, 35 for the libraries, 10 for a heap in use.
PROCESS = 112 * 2**20
WORD = 1024  # bytes of a vocabulary's entry in the tokenizer, which rank 0 has (700 measured)
FIELD = 256  # and among a GGUF file's fields, which all have
ITEM = 2048  # of what is known of a part that is paged
LINE = 800  # of what rank 0 keeps of a line of the input, and of where its answer is (650 measured)
WRITTEN = 4096  # of an answer that is written to results.h5,
WRITING = 40 * 2**20  # and at most, whatever is written (32 MiB measured for 10^5 lines, and for 10^6)
CHUNK = 2**20  # of a file whose lines are counted
LOGITS = 3  # copies of a tile of logits: as they are, penalised, and what picks candidates from them


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one rank, at most."""

    weights: int
    kv: int
    activations: int
    process: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv + self.activations + self.process


def activations(kind: Activations, place: Place, rows: int) -> int:
    """Bytes that a step of so many rows takes on a rank, the logits and what is under way to others included."""
    config, found = kind.config, kind.nbytes(place, rows)
    if place.stage == place.stages - 1:
        found += LOGITS * 4 * TILE * len(vocab_axis(config.vocab).entries(place))
    if place.stages > 1:
        found += 2 * rows * 4 * config.hidden  # one message leaves, or comes, while the next is made
    return found


def process(source: Source, config: ModelConfig, place: Place, items: int, lines: int) -> int:
    """Bytes of Python, MPI, the libraries, the tokenizer, and what is known of the model, its `items` and the input."""
    found = PROCESS + config.vocab * (WORD if place.rank == 0 else FIELD) + ITEM * items
    if place.rank == 0:
        found += LINE * lines + min(WRITTEN * lines, WRITING)
    return found + source.loading_nbytes


def lines_in(path: Path) -> int:
    """The lines of a job's input, the last one with or without an end; 0 if it cannot be read, which others say."""
    lines, last = 0, b"\n"
    try:
        with path.open("rb", buffering=0) as file:
            for chunk in iter(lambda: file.read(CHUNK), b""):
                lines, last = lines + chunk.count(b"\n"), chunk[-1:]
    except OSError:
        return 0
    return lines + (last != b"\n")


def peak() -> int:
    """The most bytes that this process has had in memory.

    On Linux a process's own: getrusage's begin with those of the program that started it.
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
