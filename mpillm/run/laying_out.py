"""Finds the layout of a run: it uses all ranks of the world, unless the run is faster without some of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

from mpillm import kernels, version
from mpillm.comm import probe
from mpillm.comm.probe import LinkTiming
from mpillm.comm.world import World
from mpillm.errors import IMPOSSIBLE, JobError, LayoutError
from mpillm.planning import hosts, measure, pace
from mpillm.planning.estimate import TYPICAL, demand_of, estimate, rank_seconds
from mpillm.planning.input_needs import NO_INPUT, InputNeeds
from mpillm.planning.layout import Layouts
from mpillm.planning.layout_plans import Chosen
from mpillm.planning.machines import Machines
from mpillm.planning.placement import Placement
from mpillm.planning.planner import Planner
from mpillm.planning.replica_steps import ReplicaSteps, replica_steps
from mpillm.planning.search import for_run, shards_may_save
from mpillm.planning.speed import Speed
from mpillm.planning.wire import shards_cross_hosts, with_wire
from mpillm.run import speed_notes
from mpillm.run.origin import Origin
from mpillm.spec import Spec
from mpillm.words import count_of

# The seconds of a job from which on hosts are measured: briefly (a tenth of a second), for the shares of replicas
# alone, and thoroughly: that takes up to two seconds where a host is slow.
SHORT, MEASURED, LONG = 1.0, 3.0, 120.0
# Seconds that a brief measurement takes on a core of pace 1, and how many times as much it must be able to save: the
# times of short jobs are mostly assumed, and often too long. Links are timed first, which takes less.
MEASURING, SAVES = 0.06, 4.0
# After a brief measurement, other hosts are used if they make the run faster by this factor: plans may be off by 15 %,
# and rank 0's host alone is the safe choice.
WORTH = 1.15


@dataclass(frozen=True)
class LaidOut:
    """A layout on some ranks of the world, and the machines of all of them."""

    chosen: Chosen
    machines: Machines
    ranks: Sequence[int]  # the ranks that have a place in it
    seconds: float = 0.0  # the planned seconds of the job, if known
    left_out: str = ""  # a sentence about the hosts whose ranks have no place, if any


class LayoutChoice:
    """Chooses the layout of a job's model on the ranks of a world; `first` and `again` are collective."""

    def __init__(
        self,
        world: World,
        spec: Spec,
        open_model: Callable[[], Planner],
        ask: Callable[[], InputNeeds],
        shards: int | None,
        replicated: bool,
        leave_out: bool,
    ) -> None:
        """`open_model` opens the model on this rank at the first call, and `ask` says on rank 0 what the input needs.

        `shards` is that of `Layouts`; there is one replica unless `replicated`, on all ranks unless `leave_out`.
        """
        self._world, self._spec, self._open_model, self._ask = world, spec, open_model, ask
        self._shards, self._replicated, self._leave_out = shards, replicated, leave_out
        #: what the input asks for; known once a layout is
        self.asked = NO_INPUT
        nodes = world.nodes
        several = spec.layout.hosts == "auto" and len(nodes.ranks_per_host) > 1
        # What is seen at once of ranks on several hosts, if no file says more: paces, and how they share cores.
        self._paces = nodes.paces if several else []
        asked = [cast(int | str, spec.on_rank(*rank).layout.threads) for rank in enumerate(world.hosts)]
        self._loads = nodes.loads(asked) if several else []
        self._links, self._links_effort = list[LinkTiming](), 0.0

    def first(self, threads: int) -> LaidOut:
        """Return the layout of a new run; measures the machines with `threads` threads if that may change it."""
        world, spec = self._world, self._spec
        if not self._replicated and spec.layout.replicas not in ("auto", 1):
            raise JobError(
                f"layout.replicas = {spec.layout.replicas} works only with `mpillm run`; start one server "
                "for each replica."
            )
        self._prepare()
        machines = self._at_first(threads)
        worth = WORTH if spec.layout.hosts == "auto" else 1.0
        found = world.on_rank_0(partial(self._search, spec, machines, worth))
        if machines.glimpsed and found.seconds > SHORT and self._worth_measuring(found):
            # With the links alone, it is often clear that one host is the best choice.
            machines = replace(self._with_links(machines, measure.QUICKLY), linked=True)
            found = world.on_rank_0(partial(self._search, spec, machines, worth))
        if self._worth_measuring(found):
            for effort, least in ((measure.QUICKLY, SHORT), (1.0, LONG))[machines.measured :]:
                if found.seconds > least:
                    machines = self._measured(threads, effort)
                    worth = 1.0 if effort == 1.0 else WORTH
                    found = world.on_rank_0(partial(self._search, spec, machines, worth))
        return found

    def again(self, origin: Origin) -> LaidOut:
        """Return the layout of a run that continues with other ranks or speeds; uses the ranks' speeds if known."""
        world, spec = self._world, with_wire(self._spec, origin.wire)
        speeds, machines = world.gather(origin.speed_now), self._machines()
        self._prepare()
        # One that was in reserve for want of a core replaces one on its host.
        here = {
            host: speed for host, speed in zip(world.nodes.numbers, speeds, strict=True) if speed is not None
        }
        known = [
            speed or here[host]
            for host, speed in zip(world.nodes.numbers, speeds, strict=True)
            if host in here
        ]
        if len(known) == world.size:
            machines = replace(machines, speeds=known, measured=True)

        def search() -> LaidOut:
            if machines.speeds and spec.wire.between_stages == "f32":
                with suppress(LayoutError):
                    return self._search(spec, machines)
            replicas = origin.laid_out(world, spec.wire)
            return LaidOut(Chosen(replicas, "ranks were lost"), machines, range(replicas[-1].ranks.stop))

        found = world.on_rank_0(search)
        return replace(found, chosen=replace(found.chosen, wire=origin.wire, wire_reason="as the run began"))

    def _prepare(self) -> None:
        """Open the model and read the input on rank 0; other ranks open the model meanwhile (collective).

        Not where they share cores with other hosts: they would delay rank 0, and may be left out. Rank 0 waits for none
        of them, and an error of theirs counts only if they have a place in the layout.
        """
        world, several = self._world, len(self._world.nodes.ranks_per_host) > 1
        if world.rank and not (self._leave_out and several and world.nodes.crowded([world.rank])):
            with suppress(*IMPOSSIBLE):
                self._open_model()
        self.asked = world.on_rank_0(self._ask)

    def _at_first(self, threads: int) -> Machines:
        """Return the machines, with what is known of their speeds before any is measured now."""
        world, file = self._world, self._spec.layout.hosts
        if file != "auto":
            known = world.on_rank_0(lambda: hosts.read(Path(file), world.started).of_ranks(world.numbers))
            return replace(self._machines(), speeds=known.speeds, measured=known.measured)
        if not (self._paces and self._leave_out):
            return self._machines()
        if (noted := self._noted(threads, 0.0)) is not None:
            return noted
        speeds = list(pace.by_pace(self._paces, world.nodes.ranks_per_host))
        return replace(self._machines(), speeds=speeds, glimpsed=True)

    def _measured(self, threads: int, effort: float) -> Machines:
        """Return the machines with their speeds, from notes of an earlier run on the same hosts or measured now."""
        world = self._world
        if (noted := self._noted(threads, effort)) is not None:
            return noted
        budget = self._spec.on_rank(world.rank, world.host).memory.weights_bytes
        with world.together():
            source = self._open_model().source
        speeds = measure.speeds(world, source, threads, effort, budget)
        machines = self._with_links(replace(self._machines(), speeds=speeds, measured=True), effort)
        if world.rank == 0:
            speed_notes.keep(self._places(threads), effort, machines.speeds, self._paces)
        return machines

    def _with_links(self, machines: Machines, effort: float) -> Machines:
        """Return the machines with their links, timed unless they were with as great an effort (collective)."""
        if effort > self._links_effort:
            self._links, self._links_effort = probe.links(self._world, effort), effort
        return replace(machines, speeds=measure.linked(self._world, machines.speeds, self._links))

    def _noted(self, threads: int, effort: float) -> Machines | None:
        """Return the machines with speeds that were measured with such an effort by a run before, if they are kept."""

        def find() -> Sequence[Speed] | None:
            return speed_notes.find(self._places(threads), effort, self._paces)

        speeds = self._world.on_rank_0(find)
        return None if speeds is None else replace(self._machines(), speeds=speeds, measured=True)

    def _places(self, threads: int) -> list[str]:
        """Return the facts for which measured speeds hold: each rank's host, the model and the program."""
        places = [f"{place}, {count_of(threads, 'thread')}" for place in self._world.nodes.places]
        return [*places, str(self._open_model().source.path.absolute()), kernels.path(), version.__version__]

    def _machines(self) -> Machines:
        """Return the machines of all ranks, without their speeds."""
        nodes = self._world.nodes
        return Machines(nodes.ranks_per_host, nodes.free, self._world.hosts, loads=self._loads)

    # The methods below are for rank 0 only.

    def rank_seconds(self, machines: Machines, chosen: Chosen) -> list[float]:
        """Return `estimate.rank_seconds` of a layout's replicas on these machines."""
        return rank_seconds(self._placement(machines, chosen), demand_of(self.asked))

    def replica_steps(self, machines: Machines, chosen: Chosen) -> list[ReplicaSteps]:
        """Return `replica_steps` of a layout's replicas on these machines."""
        return replica_steps(self._placement(machines, chosen), demand_of(self.asked) or TYPICAL)

    def gain(self, machines: Machines, chosen: Chosen) -> float:
        """Return the time of the job with `chosen` divided by its time with the best layout on these machines."""
        placement = self._placement(machines, chosen)
        now = estimate(placement, demand_of(self.asked))
        with suppress(LayoutError):
            return now.seconds / self._search(placement.spec, machines).seconds
        return 1.0

    def _placement(self, machines: Machines, chosen: Chosen) -> Placement:
        planner = self._open_model()
        plans = planner.replicas(self._spec, chosen.replicas, self.asked, machines, chosen.shares)
        placement = Placement(self._spec, planner.config, machines, chosen.replicas, list(plans))
        return placement.with_wire(chosen.wire)

    def _layouts(self, spec: Spec) -> Layouts:
        count = spec.layout.replicas if self._replicated else 1
        return Layouts(spec, self._open_model(), count, self.asked.lines or None, self._shards, self.asked)

    def _search(self, spec: Spec, machines: Machines, worth: float = 1.0) -> LaidOut:
        """Search the layout of a job on these machines; `worth` is that of `search`.

        If ranks were lost, and the job's own layout does not fit those that are left, it is an automatic one.
        """
        if self._world.lost:
            with suppress(LayoutError):
                return self._searched(spec, machines, worth)
            spec = spec.with_automatic_layout()
        return self._searched(spec, machines, worth)

    def _searched(self, spec: Spec, machines: Machines, worth: float) -> LaidOut:
        layouts = self._layouts(spec)
        found, without, said = (
            for_run(layouts, machines, worth) if self._leave_out else (layouts.choose(machines), [], "")
        )
        ranks = [rank for rank, host in enumerate(machines.host_of_rank) if host not in without]
        return LaidOut(found.chosen, machines, ranks, found.time.seconds, said)

    def _worth_measuring(self, found: LaidOut) -> bool:
        """Return whether speeds can change the layout or the wire, or, in a long job, the shares of replicas."""
        spec, given, replicas = self._spec, self._spec.layout, found.chosen.replicas
        if given.hosts != "auto" or len(found.machines.ranks_per_host) == 1:
            return False
        used = found.machines.of_ranks(found.ranks)
        if spec.wire.activations == "auto" and shards_cross_hosts(used, replicas):
            return True
        if not self._leave_out or "auto" not in (given.replicas, given.stages, given.shards):
            return False
        if any(replica.stages > 1 for replica in replicas):
            return True
        least = SAVES * MEASURING / min(self._paces, default=1.0)
        if len(used.ranks_per_host) == 1 and found.machines.glimpsed:
            return found.seconds > least and self._world.on_rank_0(
                lambda: shards_may_save(self._layouts(spec), found.machines) > least
            )
        return found.seconds > max(MEASURED, least)
