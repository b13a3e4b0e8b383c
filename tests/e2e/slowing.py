"""Program for test_slow_ranks.py: `slowing.py RANK ARGUMENTS...` is mpillm with a rank that becomes slow.

From its 20th step on the rank takes 30 ms longer for each of its layers. Ranks are compared every half second, and any
time that is saved is worth a new layout. No rank keeps what it held before that.
"""

from __future__ import annotations

import os
import sys
import time
import weakref
from typing import Any

from mpillm.cli import main, progress
from mpillm.comm.world import World

STEPS, LAYER = 20, 0.03


def run(world: World, *args: Any) -> Any:
    """What computes is loaded only when the program's threads are known."""
    from mpillm.model.decoder import Decoder
    from mpillm.partition import grid
    from mpillm.run import balance

    balance.WINDOW, balance.TELL_EVERY, balance.COST = 0.5, 0.1, 0.0
    balance.SOON = progress.LINES = 0.2
    forward, steps, in_memory = Decoder.forward, 0, weakref.WeakSet[Any]()
    victim = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK")) == sys.argv[1]

    def slow(decoder: Decoder, batch: Any) -> Any:
        nonlocal steps
        steps += 1
        in_memory.update((decoder, decoder._kv, decoder._rank.weights))
        assert len(in_memory) == 3
        if steps > STEPS and victim:
            time.sleep(LAYER * len(grid.stage_layers(decoder.config.n_layers, decoder.place)))
        return forward(decoder, batch)

    Decoder.forward = slow  # type: ignore[method-assign]
    return threads(world, *args)


if __name__ == "__main__":
    threads = World.limit_threads
    World.limit_threads = run  # type: ignore[method-assign]
    sys.exit(main(sys.argv[2:]))
