"""The measurements of a run: report.json, and the figures that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from mpillm.errors import JobError
from mpillm.store.directory import Directory
from mpillm.store.output import JOURNAL, refuse_no_directory
from mpillm.store.readable import as_json

JSON = "report.json"
SHOWN_ERRORS = 20


class Requests(msgspec.Struct, kw_only=True):
    """Lines of the input, and how they ended; `resumed` were finished by earlier runs of the same command."""

    total: int
    ok: int
    errors: int
    resumed: int = 0


class Input(msgspec.Struct, kw_only=True):
    """The input, by which its rows are found again."""

    path: str
    digest: str  # the digest of the input's lines


class Tokens(msgspec.Struct, kw_only=True):
    """The work of this start, without that of earlier starts of the same command."""

    prompt: int  # all tokens of the prompts
    generated: int
    shared: int = 0  # prompt tokens that were not computed, because another request began alike
    # Computed again, because the KV cache was full, or another replica or an earlier start had begun the answer.
    recomputed: int = 0

    @property
    def computed(self) -> int:
        """Tokens that went through the model, each once."""
        return self.prompt - self.shared + self.generated

    @property
    def passed(self) -> int:
        """Tokens that went through the model, as often as they did."""
        return self.computed + self.recomputed


class Start(msgspec.Struct, kw_only=True):
    """The work of an earlier start of the same command."""

    seconds: float  # seconds of computing
    tokens: Tokens


# What a rank does while others may wait for it.
BUSY = {"compute": "computing", "weights": "waiting for weights", "kv": "waiting for KV cache on disk"}
STANDS_OUT = 1.15  # a rank is clearly slower if its busy time is this many times the median


class Steps(msgspec.Struct, kw_only=True):
    """Limits of steps, and what the steps did."""

    max_sequences: int
    max_tokens: int
    kv_blocks: int
    steps: int
    peak_sequences: int = 0  # the maximum sequences in one step; older reports have another name for it
    streamed: int  # bytes of weights that all ranks together load for each step
    turns: int = 0  # sequences in steps that drew tokens for them, each step counted
    drafted: int = 0  # drafted tokens
    accepted: int = 0  # drafted tokens that were accepted
    drafters: dict[str, tuple[int, int]] = {}  # both, by drafter


class RankStatistics(msgspec.Struct, kw_only=True):
    """One process: its place, and its budgets and counters. Bytes and seconds."""

    rank: int
    host: str
    stage: int
    shard: int
    layers: int
    threads: int
    kernels: str
    replica: int = 0
    # Share (of all its layers), budget, peak, hits, misses, stalls, stall_seconds, loaded, ...
    weights: dict[str, float]
    # Budget, bytes, blocks; layers_in_file, read, written, stalls, stall_seconds if it spills.
    kv: dict[str, float]
    experts: dict[str, float] = {}  # a mixture's experts, which `weights` then does not count
    messages: dict[str, dict[str, float]]  # per kind: messages, bytes_sent, bytes_received, seconds waited
    memory: dict[str, int] = {}  # what was planned, at most: weights, kv, activations, process
    memory_peak: int = 0  # the peak of the process's memory, as the system counts it
    seconds: dict[str, float] = {}  # compute, wire, weights, idle, ...


class Planned(msgspec.Struct, kw_only=True):
    """Seconds of computing by the speeds of the hosts."""

    seconds: float  # seconds for all that the input asks for
    of_computed: float  # seconds for the tokens that this start computed
    limit: str  # what takes most of a step, by the plan
    bubble: float  # the part of a step in which stages wait for each other, by the plan


class Report(msgspec.Struct, kw_only=True):
    """A run that came to its end."""

    model: dict[str, Any]  # name, path, fingerprint, ...
    job: dict[str, Any]  # the whole spec
    input: Input | None = None  # None of several inputs
    began: str  # ISO 8601
    seconds: float  # seconds of this run, from start to end
    phases: dict[str, float]  # seconds of checking the input, loading, computing, writing
    requests: Requests
    tokens: Tokens
    earlier: list[Start] = []  # starts of the same command
    batch: Steps
    planned: Planned | None = None  # where the speeds of hosts are known
    stages: int  # stages of rank 0's replica
    shards: int
    replicas: int = 1
    wire: dict[str, str] = {}  # how activations went, by the key of the job's [wire]
    ranks: list[RankStatistics]
    parts: int = 1  # runs that `merge` has put together; `ranks` are those of all of them
    versions: dict[str, str]
    timeline: list[
        tuple[float, int, int]
    ] = []  # seconds, tokens generated, requests finished, since the start
    errors: dict[str, str] = {}  # custom_id: message, of the first SHOWN_ERRORS
    warnings: list[str] = []

    @property
    def computing(self) -> float:
        """The seconds that rates are counted over."""
        return self.phases.get("compute", self.seconds) or self.seconds

    def all_starts(self) -> Start:
        """Return the work of all starts of the command."""
        starts = [*self.earlier, Start(seconds=self.computing, tokens=self.tokens)]
        names = Tokens.__struct_fields__
        tokens = Tokens(**{name: sum(getattr(start.tokens, name) for start in starts) for name in names})
        return Start(seconds=sum(start.seconds for start in starts), tokens=tokens)

    def rate(self) -> float:
        """Generated tokens per second of computing."""
        return self.tokens.generated / self.computing if self.computing else 0.0

    def total_rate(self) -> float:
        """Return tokens per second of computing, prompts' and generated, without those that were shared."""
        return self.tokens.computed / self.computing if self.computing else 0.0

    def weights_per_token(self) -> float:
        """Return bytes of weights that all ranks have loaded, divided by all tokens that went through the model."""
        tokens = self.tokens.passed
        loaded = sum(of.get("loaded", 0) for rank in self.ranks for of in (rank.weights, rank.experts))
        return loaded / tokens if tokens else 0.0

    def tokens_per_turn(self) -> float:
        """Generated tokens of a sequence for each pass through the model that drew any."""
        return self.tokens.generated / self.batch.turns if self.batch.turns else 0.0

    def waited_for_weights(self) -> float:
        """Return the part of the computing time in which the rank that waited most waited for weights."""
        waited = [rank.seconds.get("weights", 0.0) for rank in self.ranks]
        # The ranks of merged parts computed for a part of the time; their mean is known.
        most = max(waited, default=0.0) if self.parts == 1 else self.parts * sum(waited) / len(waited)
        return most / self.computing if self.computing else 0.0

    def slowest(self) -> tuple[RankStatistics, str] | None:
        """Return the rank that the others wait for, and what takes most of its time; None if none is clearly slower."""
        busy = [sum(rank.seconds.get(key, 0.0) for key in BUSY) for rank in self.ranks]
        if self.parts > 1 or (at := slowest(busy)) is None:  # ranks of other parts do not wait
            return None
        rank = self.ranks[at]
        return rank, BUSY[max(BUSY, key=lambda key: rank.seconds.get(key, 0.0))]

    def bubbles(self) -> float | None:
        """Return the part of the computing time in which a stage was idle, on average; None without stages."""
        known = [rank.seconds for rank in self.ranks if rank.seconds]
        if self.stages == 1 or not known:
            return None
        at_work = sum(seconds.get(key, 0.0) for seconds in known for key in (*BUSY, "all_reduce"))
        return max(1 - at_work / (len(known) / self.parts * self.computing), 0.0)

    def expert_hits(self) -> tuple[int, int]:
        """Return the number of uses of experts that found them in memory, and of all uses, on all ranks."""
        counts = [(rank.experts["hits"], rank.experts["misses"]) for rank in self.ranks if rank.experts]
        hits = sum(hit for hit, _ in counts)
        return int(hits), int(hits + sum(missed for _, missed in counts))

    def wire_bytes(self) -> dict[str, float]:
        """Return bytes sent by all ranks, by kind of message."""
        kinds = sorted({kind for rank in self.ranks for kind in rank.messages})
        return {
            kind: sum(rank.messages.get(kind, {}).get("bytes_sent", 0) for rank in self.ranks)
            for kind in kinds
        }

    def wire_bytes_per_token(self) -> dict[str, float]:
        """Return the bytes on the wire, divided by all tokens that went through the model."""
        tokens = self.tokens.passed
        return {kind: count / tokens if tokens else 0.0 for kind, count in self.wire_bytes().items()}


def slowest(busy: Sequence[float]) -> int | None:
    """Return the rank with the longest busy time; None if no rank is clearly slower than the others."""
    at = max(range(len(busy)), key=busy.__getitem__, default=0)
    others = sorted([*busy[:at], *busy[at + 1 :]])
    if not others or busy[at] < STANDS_OUT * others[len(others) // 2]:
        return None
    return at


def write(directory: Directory, report: Report) -> None:
    """Write report.json."""
    with directory.replacing(JSON) as file:
        file.write(as_json(report))
        file.write(b"\n")


def read(directory: Path) -> Report:
    """Return the report of a finished run; JobError if there is none."""
    refuse_no_directory(directory)
    path = directory / JSON
    try:
        return msgspec.json.decode(path.read_bytes(), type=Report)
    except FileNotFoundError:
        if any(directory.glob(f"*/{JSON}")):
            raise JobError(
                f"There is no finished run in {directory} itself, but in directories inside it: give one of them, or "
                f"merge the parts of an array with mpillm merge {directory} --output DIR."
            ) from None
        begun = f"; mpillm status {directory} shows how far it is" if (directory / JOURNAL).exists() else ""
        raise JobError(f"There is no finished run in {directory}: it has no {JSON}{begun}.") from None
    except OSError as error:
        raise JobError(f"The report {path} cannot be read: {error.strerror}.") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise JobError(f"The report {path} is not one of this mpillm: {error}.") from None
