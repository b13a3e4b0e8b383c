"""Counters add up and come out as plain data."""

from __future__ import annotations

import json

from mpillm.comm.counters import MessageCounters


def test_counters() -> None:
    counters = MessageCounters()
    counters.all_reduce.sent(3, 34)
    counters.all_reduce.sent(1, 66)
    counters.reply.bytes_received += 5
    plain = json.loads(json.dumps(counters.as_dict()))
    assert plain["all_reduce"] == {"messages": 4, "bytes_sent": 168, "bytes_received": 0, "seconds": 0.0}
    assert plain["reply"]["bytes_received"] == 5
    assert set(plain) == {"all_reduce", "pipe", "step", "reply", "requests"}
