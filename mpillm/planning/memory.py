"""The memory of a rank: its two budgets, the rows of a step, and the process itself.

It is computed before the run (`plan` prints it), and the report says how much was used.
"""

from __future__ import annotations

import re
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from mpillm.engine import answer_index
from mpillm.engine.reply import TILE
from mpillm.engine.speculation import DRAWN_ROWS, may_draft
from mpillm.model.activations import Activations
from mpillm.model.config import ModelConfig
from mpillm.model.spill import HUGE, HUGE_PAGE
from mpillm.partition.grid import Place, vocab_axis
from mpillm.planning.input_needs import InputNeeds
from mpillm.planning.limits import CacheCapacity, StepSize
from mpillm.spec import Spec
from mpillm.text.confined import template_process_peak
from mpillm.weights.io.filesystem import network_kind
from mpillm.weights.source import Source
from mpillm.weights.text_files import text_fields, text_folder

# Measured on x86-64 with Open MPI and MPICH: 45 MiB for Python and MPI, 40 for the libraries, 14 for a heap in use.
PROCESS = 104 * 2**20
# And MPI's buffers for messages between hosts, with those for measuring (4 to 9 MiB measured with three hosts).
NETWORK = 10 * 2**20
OF_RANK_0 = 16 * 2**20  # of it: libraries for the input and the results, which other ranks do not load
RESULTS = 12 * 2**20  # of that: what comes only when results.h5 is written, at the end
# Bytes of a vocabulary's entry in the tokenizer, which rank 0 has (560 measured, 670 with a GGUF file's fields),
WORD = 768
FIELD = 256  # and among a GGUF file's fields, which all have
# Loading a small model takes so many times the bytes of its pages, because rows may become float32.
LOADING = 8
PAGE, TENSOR = 2048, 768  # of what is known of a page and of a tensor (1650 and 640 measured)
# Beside their pieces, of threads that read an unpacked model all the time (2 MiB measured).
STREAMING = 4 * 2**20
# Of a step's rows, which lie in huge pages once they are large, with a part of one at their ends.
LARGE_BUFFERS = 3


class RankMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Maximum bytes of one rank."""

    weights: int
    adapters: int = 0
    draft: int = 0  # a draft model and its cache
    kv: int
    activations: int
    process: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.adapters + self.draft + self.kv + self.activations + self.process


@dataclass(frozen=True)
class Rows:
    """What a step has at most: rows, those of them with logits, and tokens of a sequence.

    There are two `copies` of logits where masks or penalties change them.
    """

    rows: int
    outputs: int = TILE
    positions: int = 0
    copies: int = 2


def activations(kind: Activations, place: Place, step: Rows) -> int:
    """Bytes of the rows of a step on a rank, with their logits and messages under way.

    The cosines and sines of all positions are kept, with both kinds of factors of LongRoPE.
    """
    config, rows, found = kind.config, step.rows, kind.nbytes(place, step.rows)
    found += step.positions * (2 if config.short_length else 1) * kind.angles_nbytes
    if 4 * rows * config.hidden >= HUGE:
        found += LARGE_BUFFERS * HUGE_PAGE
    if place.is_last_stage:
        found += logits(config, place, step)
        found += DRAWN_ROWS * 4 * config.hidden * place.stages  # kept until all tokens of a step are drawn
    if place.stages > 1:
        found += 2 * rows * 4 * config.hidden  # one message leaves, or comes, while the next is made
    return found


def logits(config: ModelConfig, place: Place, step: Rows) -> int:
    """Bytes of a tile of logits on a rank of the last stage."""
    tile = min(step.outputs, TILE) * len(vocab_axis(config.vocab).entries(place))
    return 4 * step.copies * tile if place.is_last_stage else 0


def step_rows(
    asked: InputNeeds,
    spec: Spec,
    config: ModelConfig,
    step: StepSize,
    cache: tuple[CacheCapacity, int, Sequence[int]],
    stages: int,
    streams: bool,
) -> Rows:
    """What a step has at most, no more than the input can ask for.

    `cache` is what it can hold, the blocks that it has, and the windows of its groups; `streams`: some rank streams
    weights, and may make one step of all sequences (see `Pace`); else they are divided into as many as `stages`.
    """
    capacity, blocks, windows = cache
    running = min(
        step.sequences, asked.at_once(step.sequences * stages, step.tokens * stages) or step.sequences
    )
    drafts = may_draft(spec.batch.speculation, windows, capacity.slots, config.expert_share, running)
    drafted = answer_index.LONGEST if drafts else 0
    held = asked.fill(blocks, len(windows), step.sequences * stages, step.tokens * stages)
    return Rows(
        min(step.tokens, asked.rows(held, drafted)),
        asked.outputs(step.sequences, step.tokens, drafted, 1 if streams else stages),
        min(spec.memory.context(config.max_position), asked.rows(False, 0)),
        2 if asked.adjusts or not asked.lines else 1,
    )


def taken_later(spec: Spec, source: Source, place: Place, streams: bool) -> int:
    """Of what is planned for a rank, bytes that are taken only when what loading takes is given back.

    Nothing where the rank `streams` weights, or they are read past the page cache: those threads keep their buffers.
    Logits are not counted: weights that lie in the page cache are packed before the second step.
    """
    if place.rank or streams or spec.memory.loader == "read" or network_kind(source.path) is not None:
        return 0
    return RESULTS


def process(
    source: Source,
    config: ModelConfig,
    place: Place,
    pages: Sequence[int],
    kept: int,
    later: int,
    streams: bool,
    network: bool = False,
) -> int:
    """Bytes of Python, MPI, the libraries, the tokenizer, what is known of the model and its `pages` of so many bytes.

    Rank 0 has `kept` bytes of the input and of answers besides (see `input_memory`), and an index of finished ones.
    `later` and `streams`: see `taken_later`; `network`: the ranks of the run are on several hosts.
    """
    found = PROCESS + NETWORK * network + loaded_model(source, pages, later)
    if streams and source.loading_nbytes:
        found += STREAMING
    fields = "tokenizer.ggml.tokens" in (text_fields(source.tokenizer) or {})
    folder = text_folder(source.tokenizer)
    if place.rank == 0:
        words = fields or (folder is not None and (folder / "tokenizer.json").exists())
        return found + kept + answer_index.NBYTES + (WORD * config.vocab if words else 0)
    return found - OF_RANK_0 + (FIELD * config.vocab if fields else 0)


def loaded_model(source: Source, pages: Sequence[int], later: int = 0) -> int:
    """Bytes of what is known of a model and a rank's `pages` of so many bytes, and of what loading takes besides.

    `later`: see `taken_later`.
    """
    known = TENSOR * len(source.tensors) + PAGE * len(pages)
    return known + max(loading(source, sum(pages)) - later, 0)


def loading(source: Source, nbytes: int) -> int:
    """Bytes that loading takes besides a rank's pages of so many bytes."""
    return min(source.loading_nbytes, LOADING * nbytes)


def peak() -> int:
    """Maximum resident bytes of this process so far, with those of its process for chat templates.

    On Linux a process's own: getrusage's begin with those of the program that started it.
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    own = 1024 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return own + template_process_peak()
