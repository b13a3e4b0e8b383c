"""The bytes that each rank of a replica will hold, and the reasons why the replica cannot run."""

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
    """The place of one rank, and the maximum bytes that it will hold, by use."""

    rank: int
    replica: int
    stage: int
    shard: int
    layers: tuple[int, int]  # the first layer, and the one after the last
    weights_share: int  # all weights of the rank's layers and shard
    weights_held: int
    weights_minimum: int  # the smallest memory.weights that works on this rank
    weights_streamed: int  # weights that are read from disk for each step
    adapters: int
    draft: int  # the draft model and its cache
    kv_token: int  # for each token in the cache
    kv_state: int  # for each sequence, whatever its length
    kv_held: int  # the KV cache in memory
    kv_in_file: int  # the KV cache on disk
    activations: int  # the rows of a step
    process: int  # Python, MPI, libraries, tokenizer, unused ends of buffers

    @property
    def held(self) -> int:
        """The maximum bytes of memory of the rank."""
        held = self.weights_held + self.adapters + self.draft + self.kv_held
        return held + self.activations + self.process


@dataclass(frozen=True)
class ReplicaPlan:
    """The plan of a replica: what its ranks will hold, and their work in a step."""

    caches: list[CacheLayout]
    step: StepSize
    capacity: CacheCapacity
    max_context: int
    ranks: list[RankPlan]
    works: list[RankWork]  # of each rank

    @property
    def cached_tokens(self) -> int:
        """The tokens that the KV cache holds in sequences of `max_context` tokens; 0 if the model keeps no tokens."""
        return cached_tokens(self.capacity.blocks, self.caches[0].windows, self.max_context)


def problems(spec: Spec, replica: ReplicaPlan) -> Iterator[str]:
    """Yield a sentence for each reason why a replica cannot run."""
    minimum = max(rank.weights_minimum for rank in replica.ranks)
    if any(rank.weights_held < rank.weights_minimum for rank in replica.ranks):
        yield (
            f"memory.weights = {spec.memory.weights} is too small: some rank needs at least {enough(minimum)} "
            "for two neighbouring pages; "
            f"raise it{unit_meant(spec.memory.weights)} or use more shards."
        )
    if problem := replica.capacity.problem(spec, replica.caches):
        yield problem
