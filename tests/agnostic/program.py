"""Run under mpiexec: the batch of `harness` in some ways that need several ranks.

    program.py OUTCOMES.json MODEL SETTINGS ...

where each SETTINGS is a JSON object with keys of `harness.run`. Rank 0 writes a digest of all values, and the totals.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpillm.comm.program import guard
from mpillm.comm.world import World
from tests.agnostic import harness


def digest(values: dict[harness.Name, harness.Values]) -> str:
    """A hash of every bit: the shortest decimals of a float stand for it alone."""
    return hashlib.blake2b(repr(sorted(values.items())).encode(), digest_size=16).hexdigest()


def main(world: World) -> int:
    target, model, *settings = sys.argv[1:]
    requests = harness.batch(harness.vocab_of(model))
    made: list[dict[str, Any]] = []
    for job in map(json.loads, settings):
        outcome = harness.run(world, harness.path_of(model), requests, **job)
        spill = outcome.session.kv.spill
        read = min(world.gather(spill.counters.read if spill else 0))
        made.append({"digest": digest(outcome.values), "totals": asdict(outcome.totals), "spill_read": read})
    if world.rank == 0:
        Path(target).write_text(json.dumps(made))
    return 0


if __name__ == "__main__":
    sys.exit(guard(main))
