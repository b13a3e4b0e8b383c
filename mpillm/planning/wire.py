"""Choose the wire between shards if the job leaves it open: f32, which is exact, unless the network makes it slow.

Sums of exact parts are the same for any number of shards (`partition.grid`). Between ranks of one host f32 costs
nothing, because copying it through memory is no slower than rounding to Q8_0. Between hosts f32 takes 3.8 times as many
bytes.
"""

from __future__ import annotations

import msgspec

from mpillm.comm.transfer import Wire
from mpillm.partition.replicas import Replicas
from mpillm.planning.machines import Machines
from mpillm.spec import Spec


def with_wire(spec: Spec, wire: Wire) -> Spec:
    """Return the job with `wire.activations` set to `wire`."""
    return msgspec.structs.replace(spec, wire=msgspec.structs.replace(spec.wire, activations=wire))


def shards_cross_hosts(machines: Machines, replicas: Replicas) -> bool:
    """Return whether the shards of some stage are on several hosts."""
    hosts = machines.host_of_rank
    return any(
        len({hosts[rank] for rank in ranks}) > 1 for replica in replicas for ranks in replica.stage_ranks
    )


def wire_in_words(wire: Wire, shards: int, reason: str) -> str:
    """Return the wire, its effect on the answers, and the reason for it, in words."""
    if wire == "f32":
        return f"shards send f32, so answers do not depend on their number ({reason})"
    return f"shards send Q8_0, so the last digits of answers depend on their number, {shards} ({reason})"
