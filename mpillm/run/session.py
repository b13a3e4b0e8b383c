"""The session: a model that is distributed over all ranks and ready for steps."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from mpillm import kernels
from mpillm.comm.channel import Channel, Pipe
from mpillm.comm.collectives import Group
from mpillm.comm.counters import MessageCounters
from mpillm.comm.shared import shared_rows
from mpillm.comm.world import World
from mpillm.engine.draft_model import DraftModel
from mpillm.engine.engine import Engine
from mpillm.engine.limits import Limits, Totals
from mpillm.engine.speculation import Mode
from mpillm.engine.worker import Worker, follow
from mpillm.errors import ModelError, MpillmError
from mpillm.model.activations import activations_of
from mpillm.model.adapters import Adapters
from mpillm.model.cache_layout import CacheLayout, rank_layouts
from mpillm.model.decoder import Decoder
from mpillm.model.kv import KVCache
from mpillm.model.opening import config_of, open_source
from mpillm.partition import grid
from mpillm.planning.estimate import Estimate, demand_of, estimate
from mpillm.planning.input_needs import NO_INPUT, InputNeeds
from mpillm.planning.job_time import Demand
from mpillm.planning.limits import limits
from mpillm.planning.needs import needs_of
from mpillm.planning.placement import Placement
from mpillm.planning.planner import Planner
from mpillm.planning.rank_plan import ReplicaPlan
from mpillm.planning.search import by_itself
from mpillm.planning.shortage import shortage
from mpillm.planning.speed import Speed
from mpillm.planning.wire import wire_in_words
from mpillm.run import draft
from mpillm.run.arrivals import Arrivals, Ready
from mpillm.run.laying_out import LayoutChoice
from mpillm.run.origin import Origin
from mpillm.spec import Spec, tightest
from mpillm.store.records import UsedLayout
from mpillm.text import Tokenizer, load_tokenizer
from mpillm.weights.finite import check_vectors
from mpillm.weights.identity import Watch, contents, summed
from mpillm.weights.io.lost_pages import say_when_lost
from mpillm.weights.paging.weights import Weights, check_budget, streamed
from mpillm.weights.source import rank_plans

log = logging.getLogger(__name__)


class Session:
    """One rank's part of a distributed model. The constructor is collective.

    An error on any rank is raised on all. Only rank 0's replica does not wait for the others: see `getting_ready`.
    """

    def __init__(
        self,
        world: World,
        spec: Spec,
        model: Path,
        origin: Origin | None = None,
        shards_before: int | None = None,
        replicated: bool = False,
        leave_out: bool = False,
        say: Callable[[str], None] | None = None,
        find: Callable[[Path], Path] = lambda model: model,
    ) -> None:
        """Open the model and distribute it over the ranks (collective).

        `origin` is that of the run if ranks were lost. `shards_before` shards are used if the job does not set their
        number and the model can be cut so. There is one replica unless `replicated`. All ranks are used unless
        `leave_out` allows to leave out those of slow hosts, and those that have no core of their own: these are spare
        then (`World.spare`), and their session has only its `speed`. `say` tells the user at once, on rank 0, what the
        system may kill the run for. `find` says where this rank, if it has a place, has what rank 0 has at `model`.
        """
        self._say = say
        self._replicated, self._leave_out = replicated, leave_out
        self.world, self._origin, self._shards_before = world, origin, shards_before
        self._model, self._find = model, find
        self._planner: Planner | None = None  # once the model is open
        self.job, self.spec = spec, spec  # the job for all ranks, and with this rank's own values
        #: the measured speed of this rank, if known
        self.speed: Speed | None = None
        # Sentences about ranks and hosts that do not compute.
        self._left_out = [] if world.lost else list(spec.unused(world.hosts))
        with ExitStack() as unless_made:
            self._open_files = unless_made
            if leave_out and by_itself(spec):
                threads = spec.layout.threads
                self._left_out += world.nodes.surplus_in_words(threads)
                world.go_on_with(world.nodes.with_cores(threads))
            if not world.spare:
                self._lay_out()
            if not world.spare:
                self._take_place()
                with self.getting_ready():
                    self._agree_on_model()
                    self._make_worker()
            self._open_files = unless_made.pop_all()

    def _open_model(self) -> Planner:
        """Open the model's files, if they are not open yet; return the planner."""
        if self._planner is not None:
            return self._planner
        world, origin = self.world, self._origin
        path = self._find(self._model)
        say_when_lost(str(world), path)
        self.source = open_source(path, self.spec.quantize)
        self._open_files.callback(self.source.close)
        config = config_of(self.source)
        self.adapters = Adapters(self.spec.adapters, self.source, config)
        self._open_files.callback(self.adapters.close)
        self.config = replace(config, adapters=self.adapters)
        if world.rank == 0:
            check_vectors(self.source)
        self.activations = activations_of(self.source, self.config)
        before = origin.watch if origin is not None else None  # None too if this rank was spare
        self.watch = before or Watch(self.source, self.adapters.files)
        self.watch.check()
        self._planner = Planner(self.source, self.config)
        return self._planner

    def _lay_out(self) -> None:
        """Choose the layout, and the ranks that have a place in it (collective)."""
        world, origin = self.world, self._origin
        self.job = self.job.of_ranks(world.numbers)
        # Every rank looks at all of them, so that all find the same error without a message.
        self.spec = spec = [self.job.on_rank(*rank) for rank in enumerate(world.hosts)][world.rank]
        assert isinstance(spec.layout.threads, (str, int))
        self.threads = world.threads(spec.layout.threads)
        world.limit_threads(self.threads)
        self.choice = LayoutChoice(
            world,
            self.job,
            self._open_model,
            self._ask,
            self._shards_before,
            self._replicated,
            self._leave_out,
        )
        found = self.choice.first(self.threads) if origin is None else self.choice.again(origin)
        chosen, machines = found.chosen, found.machines
        self.chosen, self.needs = chosen, self.choice.asked
        self._left_out += [found.left_out] if found.left_out else []
        self.speed = machines.speeds[world.rank] if machines.speeds_known else None
        self.machines, self.replicas, self.wire = machines.of_ranks(found.ranks), chosen.replicas, chosen.wire
        #: the reason for this layout
        self.reason = "; ".join(filter(None, (chosen.reason, chosen.compared)))
        world.go_on_with(found.ranks)

    @contextmanager
    def getting_ready(self) -> Iterator[None]:
        """Run the block on all ranks. An MpillmError of rank 0's replica, which waits for no other, is raised on all.

        In the block an error of one rank of a replica is raised on all of them (`team`); their leader tells rank 0.
        """
        with self.world.unless_rank_0_fails():
            try:
                yield
            except MpillmError as error:
                if self.replica and self.place.rank == 0:
                    self.arrivals.tell(error)
                raise

    def _agree_on_model(self) -> None:
        """Open the model where it is not open yet, and check that it is that of rank 0 (collective in the replica)."""
        world, team = self.world, self.team
        with team.together():
            self._open_model()
        found = team.gather(
            (contents(self.watch.files), str(self.source.path), self.watch.state, kernels.path())
        )
        self._same_model([(each, path) for each, path, _, _ in found])
        _, _, states, paths = zip(*found, strict=True)
        self.arrivals.note(self._ranks, Ready(states, paths))
        if (
            self._say is not None
            and world.rank == 0
            and (lacking := shortage(self._plans(), self.machines, "SLURM_JOB_ID" in os.environ))
        ):
            self._say(lacking)

    def _take_place(self) -> None:
        """Set this rank's place in the layout, its team, warnings, and what rank 0 tells all ranks (collective)."""
        world, origin = self.world, self._origin
        self.replica = next(n for n, replica in enumerate(self.replicas) if world.rank in replica.ranks)
        self._ranks, self._places = self.replicas[self.replica].ranks, self.replicas[self.replica].places
        self.place = self._places[world.rank - self._ranks.start]
        #: the ranks of this replica
        self.team = world.team(self._ranks)
        #: what rank 0 knows of the other replicas
        self.arrivals = Arrivals(world, self.replicas)
        if origin is None:
            self.model, self._kv_tokens = world.on_rank_0(lambda: (self.watch.files, self._shortest()))
        else:
            self.model, self._kv_tokens = origin.model, origin.kv_tokens
        self.fingerprint = summed(self.model)
        if origin is not None and self.place.rank:  # leaders alone use a tokenizer
            self._origin = replace(origin, tokenizer=None)
        self._remarks = world.nodes.bindings if self.spec.layout.threads == "auto" else []
        self._remarks += world.nodes.clocks
        self._remarks += self._left_out
        if self.wire != "f32" and self.place.shards > 1:
            words = wire_in_words(self.wire, self.place.shards, self.chosen.wire_reason)
            self._remarks.append(f"{words[0].upper()}{words[1:]}.")

    @property
    def warnings(self) -> list[str]:
        """Warnings for the user, on rank 0."""
        return [*self._remarks, *self.arrivals.warnings]

    def _make_worker(self) -> None:
        """Create weights, KV cache, connections and the worker, within the budgets (collective in the replica)."""
        world, team, spec, ranks = self.world, self.team, self.spec, self._ranks
        self.counters, memory = MessageCounters(), spec.memory
        with team.together():
            plans = rank_plans(self.config, self.place, self.source)
            if (budget := memory.weights_bytes) is not None:
                check_budget(plans, budget)
            own = streamed(plans, budget, memory.policy)
            factors = self.adapters.load(self.place)
            self.caches = rank_layouts(self.config, self._places, memory.kv_type)
        self.streamed = team.gather(own)
        with team.together():
            self.limits = self._limits(self.replica, self.caches, self.streamed)
        self.channel = Channel(world, self.counters, ranks)
        shared = shared_rows(world, team, self.place, 4 * self.config.hidden * self.limits.max_tokens)
        stage = self.replicas[self.replica].stage_ranks[self.place.stage]
        rate, crowded = self.machines.link(stage).wire, world.nodes.crowded(stage)
        whole = self.config.whole_prompts  # rows need later ones
        group = Group(world, self.place, self.wire, self.counters, self.threads, shared, rate, crowded, whole)
        with team.together():
            cache, count = self.caches[self.place.rank], (self.limits.n_blocks, self.limits.n_states)
            self.kv = KVCache(cache, *count, memory.kv_bytes, memory.spill_folder)
            self._open_files.callback(self.kv.close)
            self.draft_model = self._open_draft_model()
        # Last, because threads begin to load the weights; a collective call after it might wait for a slow rank.
        self.weights = Weights(
            plans,
            lambda *what: self.source.open_loader(memory.loader, self.threads, *what),
            budget,
            memory.policy,
            self.config.expert_share,
        )
        self._open_files.callback(self.weights.close)
        pipe = Pipe(world, self.place, spec.wire.between_stages, self.counters, self.threads)
        decoder = Decoder(
            self.config, self.place, self.source, self.weights, self.kv, group, pipe, self.threads, factors
        )
        self.worker = Worker(decoder, self.limits.micro_batches, self.threads, world.computing)
        log.info(
            "%s %s, replica %d of %d (%s), %d threads, kernels %s, weights %.1f MiB", world, self.place, self.replica,
            len(self.replicas), self.reason, self.threads, kernels.path(), self.weights.total / 2**20,
        )  # fmt: skip

    def _plans(self) -> Iterator[ReplicaPlan]:
        """Return the plan of each replica: what its ranks will hold."""
        planner, chosen = self._open_model(), self.chosen
        return planner.replicas(self.job, chosen.replicas, self.needs, self.machines, chosen.shares)

    def estimate(self, demand: Demand | None) -> Estimate:
        """Estimate the time of `demand`, or of the input if it is None, from the machines' speeds."""
        placement = Placement(self.job, self.config, self.machines, self.replicas, list(self._plans()))
        return estimate(placement.with_wire(self.wire), demand or demand_of(self.needs))

    @property
    def continues(self) -> bool:
        """Whether the run has computed before, with another session."""
        return self._origin is not None

    @property
    def layout(self) -> UsedLayout:
        """The layout for the journal, without the number of replicas, on which answers do not depend."""
        return UsedLayout(self.place.stages, self.place.shards, self.wire)

    @property
    def origin(self) -> Origin:
        """The properties with which the run began."""
        tokenizer = self.__dict__.get("tokenizer")  # if it was loaded
        if (before := self._origin) is not None:
            return replace(before, watch=self.watch, tokenizer=tokenizer)
        return Origin(
            replace(self.config, adapters=None),  # this session has opened the adapters' files
            self.replicas,
            self._kv_tokens,
            self.watch,
            self.model,
            self.wire,
            self.speed,
            tokenizer,
        )

    def engine(self, totals: Totals | None = None, speculation: Mode | None = None) -> Engine:
        """Return a new engine, on the leader; `totals` are those of the engine that it replaces, if any.

        `speculation` overrides the job's setting.
        """
        limits = self.limits if speculation is None else replace(self.limits, speculation=speculation)
        return Engine(self.worker, self.channel, limits, self.shard_vocab, totals, self.draft_model)

    def follow(self) -> int:
        """On all ranks but 0, of a session that no loss is to survive: compute what rank 0 sends; the exit code."""
        if self.world.spare:
            self.world.stand_by()
            return 0
        return follow(self.worker, self.channel, self.watch.check)

    def _open_draft_model(self) -> DraftModel | None:
        """Open the job's draft model, if it has one, on the leader of each replica."""
        if self.place.rank:
            return None
        return draft.open_draft_model(
            self.spec,
            self.source,
            self.config,
            self.world,
            self.threads,
            self._open_files,
            self.needs,
            self.place.stages,
        )

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, if it has one."""
        known = self._origin and self._origin.tokenizer
        return known or load_tokenizer(self.source.tokenizer, self.config.vocab)

    @property
    def shard_vocab(self) -> list[int]:
        """The vocabulary rows of each shard of the last stage."""
        vocab = grid.vocab_axis(self.config.vocab)
        return [len(vocab.entries(place)) for place in self._places if place.is_last_stage]

    @property
    def kv_token_nbytes(self) -> int:
        """The bytes of one token's keys and values on the rank that holds most of them."""
        return max(layout.token_nbytes for layout in self.caches)

    def close(self) -> None:
        """Stop the read-ahead threads and close the files."""
        self._open_files.close()

    def _same_model(self, found: Sequence[tuple[tuple[int, str], str]]) -> None:
        """Raise ModelError if a rank of the replica has another model than rank 0: contents and path of each."""
        world = self.world
        first_size, first_hash = first = contents(self.model)
        for rank, (each, path) in zip(self._ranks, found, strict=True):
            if each != first:
                size, digest = each
                raise ModelError(
                    f"Rank {rank} on {world.hosts[rank]} sees another model at {path} ({size} bytes, "
                    f"hash {digest[:12]}) than rank 0 on {world.hosts[0]} ({first_size} bytes, hash "
                    f"{first_hash[:12]}); put the same files on every node."
                )

    def _ask(self) -> InputNeeds:
        """Return the needs of the input, if this is a job; on rank 0, which reads it."""
        self._open_model()
        if not self._replicated:
            return NO_INPUT
        return needs_of(self.spec, self.config, self.source, lambda: self.tokenizer)

    def _limits(self, number: int, caches: Sequence[CacheLayout], streamed: Sequence[int]) -> Limits:
        """Return the limits of a step and of the cache, which are the same on every rank of the replica `number`.

        `caches` and `streamed` are those of `limits`.
        """
        max_context, replica = self.spec.memory.context(self.config.max_position), self.replicas[number]
        specs = [self.job.on_rank(rank, self.world.hosts[rank]) for rank in replica.ranks]
        kv = [spec.memory.kv_bytes for spec in specs]
        return limits(
            tightest(specs),
            self.activations,
            replica.places,
            caches,
            max_context,
            streamed,
            kv,
            self.needs,
            self.chosen.shares[number],
        )

    def _shortest(self) -> int:
        """Return the tokens of the longest request that the KV cache of each replica holds; on rank 0."""
        return min(
            self._limits(number, plan.caches, [rank.weights_streamed for rank in plan.ranks]).max_length
            for number, plan in enumerate(self._plans())
        )
