"""The results of a bench, as structs that become JSON. Units are seconds, bytes, and rates per second."""

from __future__ import annotations

import msgspec


class Machine(msgspec.Struct, kw_only=True):
    """The upper limits of this machine, by number of threads; empty where they cannot be measured."""

    cpu: str
    cores: int
    kernels: str  # the path in use
    read: dict[int, float]  # bytes of memory that can be read
    int8: dict[int, float]  # multiplications and additions of 8-bit integers in registers


class Kernel(msgspec.Struct, kw_only=True):
    """One kernel, with `rows` rows.

    `rate` is of bytes read and written, `operations` of multiplications and additions (0: not counted).
    """

    name: str
    detail: str  # the type of weights, the sizes
    rows: int
    threads: int
    seconds: float
    rate: float
    operations: float
    read_share: float | None = None  # the part of the limit, if the limit is known
    int8_share: float | None = None
    over_scalar: float | None = None  # how many times faster than the scalar path


class Drafts(msgspec.Struct, kw_only=True):
    """Tokens that a drafter drafted, and those of them that were what was drawn."""

    drafted: int
    accepted: int


class Run(msgspec.Struct, kw_only=True):
    """The engine at work on all ranks; `peer_...` and `ratio` (above 1: we are faster) if there was a peer."""

    what: str  # prefill, decode (one sequence), batch (decode of many), startup, paging or speculation
    threads: int  # threads of each rank
    sequences: int
    tokens: int  # tokens of the prompt; for decode, those before the first decoded token
    seconds: float = 0.0  # a step; all of a prompt; a start
    rate: float = 0.0  # tokens
    weight_bytes: int = 0  # bytes of weights that rank 0 reads in a step
    kv_bytes: int = 0
    int8_operations: int = 0  # operations of rank 0 in a step, as in `Machine.int8`
    read_share: float | None = None  # the part of the memory's limit
    int8_share: float | None = None  # the part of the limit of 8-bit products
    joules: float | None = None  # a token, of the processors of rank 0's host, where it tells
    wire_bytes: float = 0.0  # sent by all ranks for each token, prompts' tokens included
    overhead: float | None = None  # the part of a step that is spent outside the kernels
    kernels: dict[str, float] = {}  # parts of a step
    # Of paging, where a "step" is a token of each sequence:
    budget: int = 0  # bytes of weights that a rank may hold
    streamed: float = 0.0  # bytes that all ranks read in a step
    waited: float = 0.0  # the part of the time in which the rank that waited most waited for weights
    disk: float | None = None  # bytes a second that the disk gives, read one after the other
    # Of that limit: (weights - budget) / disk / seconds, or of a mixture `streamed` / disk / seconds.
    disk_share: float | None = None
    ready: float = 0.0  # seconds from opening the model to the first step
    first_step: float = 0.0  # the prompts and one token, while what stays comes into memory
    memory: int = 0  # maximum resident bytes of any rank
    # Of speculation:
    text: str = ""  # what kind it is
    drafts: str = ""  # `batch.speculation`
    per_pass: float = 0.0  # tokens
    drafters: dict[str, Drafts] = {}
    gain: float | None = None  # how many times as fast as without drafts
    peer_seconds: float | None = None
    peer_rate: float | None = None
    ratio: float | None = None


class Bench(msgspec.Struct, kw_only=True):
    """Everything, with what is needed to repeat it."""

    version: str
    began: str
    command: list[str]
    ranks: int
    hosts: int
    model: str
    model_bytes: int
    stages: int
    shards: int
    machine: Machine
    kernels: list[Kernel]
    runs: list[Run]
    peer: str | None = None  # name and version
