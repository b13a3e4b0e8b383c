"""The planned memory of a rank: its two budgets, the rows of a step, and the process itself.

`plan` prints it before a run. The report compares it with the memory that was used.
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

# Measured on x86-64 with Open MPI and MPICH, for the leader of a replica: 45 MiB for Python and MPI, 40 for the
# libraries, 22 for a heap in use.
PROCESS = 108 * 2**20
# Additional bytes if ranks are on several hosts: MPI's buffers and those for measuring (4 to 9 MiB with three hosts).
NETWORK = 10 * 2**20
OF_LEADER = 16 * 2**20  # the part of PROCESS for libraries that leaders alone load, for the input and results
RESULTS = 12 * 2**20  # the part of OF_LEADER that is used only when results.h5 is written, at the end
# Bytes of lines and answers that leaders of other replicas keep; one machine takes 2 MiB more than another.
KEPT_BY_LEADERS = 4 * 2**20
# Bytes of each entry of the vocabulary: in the tokenizer, which rank 0 has (560 measured, 670 with the fields of a GGUF
# file); and in the fields of a GGUF file, which all ranks have.
WORD, FIELD = 768, 256
# Loading a small model takes up to LOADING times the bytes of its pages, because rows may become float32.
LOADING = 8
PAGE, TENSOR = 2048, 768  # bytes for the description of a page and of a tensor (1650 and 640 measured)
# Bytes of the threads that stream an unpacked model, besides the pieces that they read (2 MiB measured).
STREAMING = 4 * 2**20
# The number of buffers for the rows of a step. Large ones consist of huge pages, of which each may waste one.
LARGE_BUFFERS = 3


class RankMemory(msgspec.Struct, frozen=True, kw_only=True):
    """The maximum bytes of one rank, by use."""

    weights: int
    adapters: int = 0
    draft: int = 0  # the draft model and its cache
    kv: int
    activations: int
    process: int

    @property
    def total(self) -> int:
        """The sum of all."""
        return self.weights + self.adapters + self.draft + self.kv + self.activations + self.process


@dataclass(frozen=True)
class Rows:
    """The maxima of a step: its rows, rows with logits (`outputs`), and positions of a sequence.

    There are two `copies` of logits if masks or penalties change them.
    """

    rows: int
    outputs: int = TILE
    positions: int = 0
    copies: int = 2


def activations(kind: Activations, place: Place, step: Rows) -> int:
    """Return the bytes of the rows of a step on a rank, with their logits and the messages under way.

    The cosines and sines of all positions count too, for both kinds of factors of LongRoPE.
    """
    config, rows, found = kind.config, step.rows, kind.nbytes(place, step.rows)
    found += step.positions * (2 if config.short_length else 1) * kind.angles_nbytes
    if 4 * rows * config.hidden >= HUGE:
        found += LARGE_BUFFERS * HUGE_PAGE
    if place.is_last_stage:
        found += logits(config, place, step)
        found += DRAWN_ROWS * 4 * config.hidden * place.stages  # kept until all tokens of a step are drawn
    if place.stages > 1:
        found += 2 * rows * 4 * config.hidden  # one message is under way while the next is made
    return found


def logits(config: ModelConfig, place: Place, step: Rows) -> int:
    """Return the bytes of a tile of logits; 0 on ranks of other stages than the last."""
    tile = min(step.outputs, TILE) * len(vocab_axis(config.vocab).entries(place))
    return 4 * step.copies * tile if place.is_last_stage else 0


def step_rows(
    asked: InputNeeds,
    spec: Spec,
    config: ModelConfig,
    step: StepSize,
    cache: CacheCapacity,
    windows: Sequence[int],
    stages: int,
    streams: bool,
) -> Rows:
    """Return the maxima of a step, which are no more than the input can ask for.

    `cache` is the used capacity of the KV cache, and `windows` are those of its groups. If some rank `streams` weights,
    one step may have all sequences (see `Pace`); else they are divided into `stages` steps.
    """
    running = min(
        step.sequences, asked.at_once(step.sequences * stages, step.tokens * stages) or step.sequences
    )
    drafts = may_draft(spec.batch.speculation, windows, cache.slots, config.expert_share, running)
    drafted = answer_index.LONGEST if drafts else 0
    held = asked.fill(cache.blocks, len(windows), step.sequences * stages, step.tokens * stages)
    return Rows(
        min(step.tokens, asked.rows(held, drafted)),
        asked.outputs(step.sequences, step.tokens, drafted, 1 if streams else stages),
        min(spec.memory.context(config.max_position), asked.rows(False, 0)),
        2 if asked.adjusts or not asked.lines else 1,
    )


def taken_later(spec: Spec, source: Source, place: Place, streams: bool) -> int:
    """Return the planned bytes of a rank that are used only after the memory for loading was released.

    0 if the rank `streams` weights or reads them without the page cache, because its threads then keep their
    buffers. Logits do not count, because weights in the page cache are packed only before the second step.
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
    """Return the bytes of Python, MPI, libraries, tokenizer, and the descriptions of the model and the rank's pages.

    `pages` has the bytes of each page. The leader of each replica keeps `kept` bytes of the input and the answers
    (rank 0: see `input_memory`; the others: `KEPT_BY_LEADERS`), and an index of finished answers. `later` and
    `streams`: see `taken_later`; `network`: ranks are on several hosts.
    """
    found = PROCESS + NETWORK * network + loaded_model(source, pages, later)
    if streams and source.loading_nbytes:
        found += STREAMING
    fields = "tokenizer.ggml.tokens" in (text_fields(source.tokenizer) or {})
    folder = text_folder(source.tokenizer)
    if place.rank == 0:
        words = fields or (folder is not None and (folder / "tokenizer.json").exists())
        return found + kept + answer_index.NBYTES + (WORD * config.vocab if words else 0)
    return found - OF_LEADER + (FIELD * config.vocab if fields else 0)


def loaded_model(source: Source, pages: Sequence[int], later: int = 0) -> int:
    """Return the bytes of the descriptions of a model and of a rank's pages, and those for loading the pages.

    `pages` has the bytes of each page; `later`: see `taken_later`.
    """
    known = TENSOR * len(source.tensors) + PAGE * len(pages)
    return known + max(loading(source, sum(pages)) - later, 0)


def loading(source: Source, nbytes: int) -> int:
    """Return the bytes that loading `nbytes` bytes of pages takes besides them."""
    return min(source.loading_nbytes, LOADING * nbytes)


def peak() -> int:
    """Return the maximum resident bytes of this process so far, and of its process for chat templates.

    On Linux they come from /proc, because getrusage starts with those of the program that started the process.
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    own = 1024 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return own + template_process_peak()
