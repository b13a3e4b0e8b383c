"""A whole bench on all ranks: the machine, the kernels and the engine, as far as each was asked for."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from mpillm.bench import kernels, machine, packed, paging, runs, speculation, synthetic, tables
from mpillm.bench.against import LlamaCpp, Peer
from mpillm.bench.batched_bench import BatchedBench
from mpillm.bench.result import Bench, Kernel, Machine, Run
from mpillm.bench.runs import BenchOptions
from mpillm.catalogue import models
from mpillm.comm.world import World
from mpillm.errors import JobError
from mpillm.kernels import BlockType
from mpillm.model.config import ModelConfig
from mpillm.model.layers.attention import AttentionSpec
from mpillm.model.opening import config_of, open_source
from mpillm.run.progress import Progress
from mpillm.run.session import Session
from mpillm.version import __version__

ENGINE = frozenset({"prefill", "decode", "batch"})
COMPARED = ENGINE | {"startup"}  # with a peer
LLAMA_CPP = "llama.cpp"


@dataclass(frozen=True)
class BenchCommand:
    """The command line: a model by name or path, or else a synthetic one's shape and weights; what to do with it."""

    model: str
    synthetic: str | None
    weights: str | None
    against: str | None
    options: BenchOptions

    def check(self) -> None:
        """Raise JobError for an option that would change nothing, or cannot be had."""
        options, (name, _, binary) = self.options, (self.against or LLAMA_CPP).partition("=")
        for option, given, of in (
            ("--budget", options.budgets, {"paging", "speculation"}),
            ("--draft", options.draft, {"speculation"}),
            ("--against", self.against, COMPARED),
        ):
            if given and not options.what & of:
                raise JobError(
                    f"{option} is for --what {' or '.join(sorted(of))}; leave it out, or add that to --what."
                )
        if self.weights and not self.synthetic:
            raise JobError("--weights is only for --synthetic; leave it out.")
        if self.weights in packed.MADE and self.against:
            raise JobError(
                f"No other program reads {self.weights}; leave out --against, or choose --weights q8_0."
            )
        if not binary and name != LLAMA_CPP:
            raise JobError(
                f"mpillm bench cannot run against {name}; give {LLAMA_CPP}, or NAME=PATH of another program's "
                "llama-batched-bench."
            )
        if binary and "startup" in options.what:
            raise JobError(f"{name} does not report the time of a start; leave startup out of --what.")


def bench(world: World, asked: BenchCommand, progress: Progress) -> Bench | None:
    """Measure (collective); rank 0 gets the result. MpillmError says what is wrong."""
    asked.check()
    began = datetime.now(timezone.utc).isoformat(timespec="seconds")
    path = _model(world, asked, progress)
    with world.together():
        config = _config(path, asked.options)
    counts = tuple(dict.fromkeys(world.threads(count) for count in asked.options.threads or ("auto",)))
    options = replace(asked.options, threads=counts)
    limits, found = Machine(cpu="", cores=0, kernels="", read={}, int8={}), list[Kernel]()
    if world.rank == 0:
        # Paging is limited by the disk, and the limits of memory would add to the memory that is measured.
        measured_with = counts if options.what - {"paging", "speculation"} else ()
        limits = machine.measure(n * ranks for n in measured_with for ranks in {1, world.nodes.ranks_here})
        if "kernels" in options.what:
            progress.say(f"measuring the kernels {limits.kernels} ...")
            found = list(
                kernels.measure(_sizes(config, options), tuple(BlockType), counts, limits, options.repeats)
            )
    world.barrier()
    measured, layout = [], (1, 1)
    for count in counts:
        for run, layout in _engine(world, path, count, asked, options):
            if world.rank == 0:
                _compare(run, limits, world.nodes.ranks_here, layout[0])
                progress.say(tables.run_line(run))
                measured.append(run)
    if world.rank:
        return None
    return Bench(
        version=__version__,
        began=began,
        command=sys.argv,
        ranks=world.size,
        hosts=len(set(world.hosts)),
        model=str(path),
        model_bytes=sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path])),
        stages=layout[0],
        shards=layout[1],
        machine=limits,
        kernels=found,
        runs=measured,
        peer=_named(asked.against) if asked.against else None,
    )


def _model(world: World, asked: BenchCommand, progress: Progress) -> Path:
    """Return the model's path: rank 0 makes or fetches it, then the first rank of each other host that lacks it."""
    first = {world.hosts.index(host) for host in set(world.hosts)}
    for ranks in ({0}, first - {0}, set(range(world.size)) - first):
        with world.together():
            if world.rank in ranks:
                if asked.synthetic is None:
                    path = models.resolve(asked.model, progress.downloading)
                else:
                    path = _synthetic(asked.synthetic, asked)
    return path


def _synthetic(shape: str, asked: BenchCommand) -> Path:
    """Return the path of a synthetic model: packed if it is to be paged (fastest then), or if GGUF lacks its type."""
    weights = asked.weights or "q4_0"
    if "paging" in asked.options.what or weights in packed.MADE:
        return packed.create(shape, weights, os.cpu_count() or 1)
    return synthetic.create(shape, weights)


def _config(path: Path, options: BenchOptions) -> ModelConfig:
    """Return the model's configuration; JobError if its maximum length is shorter than the sequences to measure."""
    with closing(open_source(path)) as source:
        config = config_of(source)
    if options.longest > config.max_position:
        raise JobError(
            f"{path} takes {config.max_position} tokens, but sequences of {options.longest} are asked for; "
            "lower --prompt or --context."
        )
    return config


def _sizes(config: ModelConfig, options: BenchOptions) -> kernels.KernelSizes:
    attention = next(layer.mixer for layer in config.layers if isinstance(layer.mixer, AttentionSpec))
    mlps = [layer.mlp for layer in config.layers if layer.mlp]
    return kernels.KernelSizes(
        hidden=config.hidden,
        ffn=next((mlp for mlp in mlps if not mlp.count), mlps[0]).width,
        heads=attention.n_heads,
        kv_heads=attention.n_kv_heads,
        head_dim=attention.head_dim,
        vocab=config.vocab,
        context=max(kernels.KernelSizes.context, *options.contexts),
    )


def _engine(
    world: World, path: Path, threads: int, asked: BenchCommand, options: BenchOptions
) -> Iterator[tuple[Run, tuple[int, int]]]:
    """Yield every run with `threads` threads, and its layout (stages, shards); the peer has those of all ranks here."""
    what = options.what
    if not what - {"kernels"}:
        return
    spec = runs.spec_for(str(path), threads, options)
    cores = _cores(world)
    with ExitStack() as stack:
        peer: Peer | None = None
        with world.together():
            if world.rank == 0 and asked.against:
                peer = stack.enter_context(
                    closing(_peer(asked.against, path, threads * world.nodes.ranks_here, cores))
                )
        layout = (1, 1)
        if "paging" in what:
            yield from paging.measure(world, spec, path, options)
        if "speculation" in what:
            yield from speculation.measure(world, spec, path, options)
        if "startup" in what:
            yield runs.start_up(world, spec, path, options, peer), layout
        if not what & ENGINE:
            return
        gc.collect()  # see start_up
        session = stack.enter_context(closing(Session(world, spec, path)))
        layout = session.place.stages, session.place.shards
        if "prefill" in what:
            for length in options.prompts:
                yield runs.prefill(session, length, options, peer), layout
        for context in options.contexts:
            for sequences in sorted(set(options.sequences)):
                if ("decode" if sequences == 1 else "batch") in what:
                    yield runs.decode(session, sequences, context, options, peer), layout


def _peer(asked: str, path: Path, threads: int, cores: list[int]) -> Peer:
    name, _, binary = asked.partition("=")
    if binary:
        return BatchedBench(name, Path(binary), path, threads, cores)
    return LlamaCpp(path, threads, cores)


def _named(asked: str) -> str:
    """Return the name of the peer in the table."""
    name, _, binary = asked.partition("=")
    if binary:
        return f"{name}, {binary}"
    return f"{name} of llama-cpp-python {metadata.version('llama-cpp-python')}"


def _cores(world: World) -> list[int]:
    """Return the cores that the ranks of rank 0's host may use together: an mpiexec binds each to some of them."""
    own = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()
    everyone = world.gather((world.host, own))
    return sorted(frozenset().union(*(cores for host, cores in everyone if host == world.hosts[0])))


def _compare(run: Run, limits: Machine, ranks: int, stages: int) -> None:
    """The shares of the machine's limits that a run reaches; None with stages, whose steps overlap."""
    if not run.seconds or stages > 1:
        return
    read, int8 = limits.read.get(run.threads * ranks), limits.int8.get(run.threads * ranks)
    if read and run.weight_bytes:
        run.read_share = (run.weight_bytes + run.kv_bytes) * ranks / run.seconds / read
    if int8 and run.int8_operations:
        run.int8_share = run.int8_operations * ranks / run.seconds / int8
