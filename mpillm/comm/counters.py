"""Count the messages of this rank by kind, with their bytes and times."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields

from mpillm import tracing

# What a trace and a report say that a rank waits for, by the kind of the message.
WAITED_FOR = {
    "all_reduce": "other shards",
    "pipe": "other stages",
    "step": "a step",
    "reply": "replies",
    "requests": "other replicas",
}


@dataclass
class Count:
    """The counts of one kind of message on one rank."""

    kind: str
    messages: int = 0  # sent: the sum over ranks is what the network has carried
    bytes_sent: int = 0
    bytes_received: int = 0
    seconds: float = 0.0  # waited

    def sent(self, messages: int, nbytes: int) -> None:
        """Count `messages` messages of `nbytes` bytes each."""
        self.messages += messages
        self.bytes_sent += messages * nbytes

    def waited(self, seconds: float) -> None:
        """Count time spent on waiting for messages of this kind."""
        self.seconds += seconds
        tracing.spent(f"wait for {WAITED_FOR[self.kind]}", seconds)


@dataclass
class MessageCounters:
    """The counts of all kinds; a rank's report has them as `as_dict()`."""

    all_reduce: Count = field(default_factory=lambda: Count("all_reduce"))  # between the shards of a stage
    pipe: Count = field(default_factory=lambda: Count("pipe"))  # activations, from stage to stage
    # What to compute, from a replica's leader to its other ranks.
    step: Count = field(default_factory=lambda: Count("step"))
    # Candidates for the next token, to the leader.
    reply: Count = field(default_factory=lambda: Count("reply"))
    # Lines and answers, between rank 0 and the other leaders.
    requests: Count = field(default_factory=lambda: Count("requests"))

    def as_dict(self) -> dict[str, dict[str, int | float]]:
        """Return the counts by kind and by name."""
        counts = (asdict(getattr(self, each.name)) for each in fields(self))
        return {count.pop("kind"): count for count in counts}
