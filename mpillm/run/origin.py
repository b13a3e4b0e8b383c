"""What a run began with, and must keep when ranks are lost: its results depend on it."""

from __future__ import annotations

from dataclasses import dataclass

from mpillm.comm.transfer import Wire
from mpillm.comm.world import World
from mpillm.model.config import ModelConfig
from mpillm.partition import replicas
from mpillm.partition.replicas import Replicas
from mpillm.planning.speed import Speed
from mpillm.spec import WireSection
from mpillm.store.records import UsedLayout
from mpillm.weights.identity import FileIdentity, Watch


@dataclass(frozen=True)
class Origin:
    """The properties of a run on which its results depend; they are kept when ranks are lost."""

    config: ModelConfig
    replicas: Replicas
    kv_tokens: (
        int  # of the longest request that the KV cache held: longer ones were refused; 0 on a spare rank
    )
    watch: Watch  # of this rank's files of the model
    model: dict[str, FileIdentity]  # the files as rank 0 had them
    model_state: str  # of all ranks' files
    wire: Wire  # between the shards of a stage
    speed: Speed | None  # of this rank as it was measured, if it is known
    slower: float = 1.0  # how many times as slow as that it has become, beside the fastest rank

    @property
    def layout(self) -> UsedLayout:
        """The layout as the journal notes it."""
        return UsedLayout(self.replicas[0].stages, self.replicas[0].shards, self.wire)

    @property
    def speed_now(self) -> Speed | None:
        """The speed of this rank, if it is known."""
        return None if self.speed is None else self.speed.shared_by(self.slower)

    def laid_out(self, world: World, wire: WireSection) -> Replicas:
        """The replicas for the ranks that are left, or for some of them."""
        return replicas.choose_fewer(
            self.config,
            world.size,
            self.replicas,
            same_shards=self.wire != "f32",
            same_stages=wire.between_stages != "f32",
            ranks_per_host=world.nodes.ranks_per_host,
        )
