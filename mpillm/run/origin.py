"""The properties with which a run began and on which its results depend; it keeps them when ranks are lost."""

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
from mpillm.text import Tokenizer
from mpillm.weights.identity import FileIdentity, Watch


@dataclass(frozen=True)
class Origin:
    """The properties of a run on which its results depend; they are kept when ranks are lost."""

    config: ModelConfig
    replicas: Replicas
    kv_tokens: int  # the tokens of the longest request that the KV cache held; longer ones were refused
    watch: Watch | None  # the watch over this rank's model files; None on a rank that was spare
    model: dict[str, FileIdentity]  # the identities of rank 0's files
    wire: Wire  # the wire between the shards of a stage
    speed: Speed | None  # the measured speed of this rank, if known
    tokenizer: Tokenizer | None = None  # this rank's, if it has loaded it; two would take twice the memory
    slower: float = 1.0  # the factor by which it has become slower, relative to the fastest rank

    @property
    def layout(self) -> UsedLayout:
        """The layout in the form of the journal."""
        return UsedLayout(self.replicas[0].stages, self.replicas[0].shards, self.wire)

    @property
    def speed_now(self) -> Speed | None:
        """The present speed of this rank, if known."""
        return None if self.speed is None else self.speed.shared_by(self.slower)

    def laid_out(self, world: World, wire: WireSection) -> Replicas:
        """Return the replicas on the remaining ranks, or on some of them."""
        return replicas.choose_fewer(
            self.config,
            world.size,
            self.replicas,
            same_shards=self.wire != "f32",
            same_stages=wire.between_stages != "f32",
            ranks_per_host=world.nodes.ranks_per_host,
        )
