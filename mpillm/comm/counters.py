"""What each kind of message has cost this rank so far."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field


@dataclass
class Count:
    """One kind of message on one rank."""

    messages: int = 0  # sent: the sum over ranks is what the network has carried
    bytes_sent: int = 0
    bytes_received: int = 0
    seconds: float = 0.0  # waited

    def sent(self, messages: int, nbytes: int) -> None:
        self.messages += messages
        self.bytes_sent += messages * nbytes


@dataclass
class MessageCounters:
    """All kinds; a rank's report has them as `as_dict()`."""

    all_reduce: Count = field(default_factory=Count)  # between the shards of a stage
    pipe: Count = field(default_factory=Count)  # activations, from stage to stage
    step: Count = field(default_factory=Count)  # what to compute, from a replica's leader to its other ranks
    reply: Count = field(default_factory=Count)  # candidates for the next token, to the leader
    requests: Count = field(default_factory=Count)  # lines and answers, between rank 0 and the other leaders

    def as_dict(self) -> dict[str, dict[str, int | float]]:
        return asdict(self)
