"""What each rank of a replica will hold, in bytes, and what would keep the replica from running."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from mpillm.model.cache_layout import CacheLayout
from mpillm.planning.limits import CacheCapacity, StepSize, cached_tokens
from mpillm.planning.step_time import RankWork
from mpillm.spec import Spec, unit_meant
from mpillm.words import enough


class RankPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank will hold, in bytes."""

    rank: int
    replica: int
    stage: int
    shard: int
    layers: tuple[int, int]  # first, and the one behind the last
    weights_share: int  # all that it is responsible for
    weights_held: int  # at most
    weights_minimum: int  # the smallest memory.weights that works here
    weights_streamed: int  # read anew for every step
    adapters: int  # all of them
    draft: int  # a draft model and its cache, at most
    kv_token: int  # for each token in the cache
    kv_state: int  # for each sequence, however long
    kv_held: int  # at most
    kv_in_file: int  # on disk, at most
    activations: int  # of a step's rows, at most
    process: int  # Python, MPI, libraries, tokenizer, ends of buffers, at most

    @property
    def held(self) -> int:
        """The sum of all."""
        held = self.weights_held + self.adapters + self.draft + self.kv_held
        return held + self.activations + self.process


@dataclass(frozen=True)
class ReplicaPlan:
    """What the ranks of a replica will hold."""

    caches: list[CacheLayout]
    step: StepSize
    capacity: CacheCapacity
    max_context: int
    ranks: list[RankPlan]
    works: list[RankWork]  # of each rank

    @property
    def cached_tokens(self) -> int:
        """Tokens that the KV cache holds in sequences of `max_context` tokens; 0 if the model keeps none."""
        return cached_tokens(self.capacity.blocks, self.caches[0].windows, self.max_context)


def problems(spec: Spec, replica: ReplicaPlan) -> Iterator[str]:
    """A sentence for each thing that keeps a replica from running."""
    minimum = max(rank.weights_minimum for rank in replica.ranks)
    if any(rank.weights_held < rank.weights_minimum for rank in replica.ranks):
        yield (
            f"memory.weights = {spec.memory.weights} is too small: some rank needs at least {enough(minimum)} "
            "for two neighbouring pages; "
            f"raise it{unit_meant(spec.memory.weights)} or use more shards."
        )
    if problem := replica.capacity.problem(spec, replica.caches):
        yield problem
