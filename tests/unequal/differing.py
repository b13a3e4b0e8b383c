"""Makes the ranks of a program differ: constants, loaders, instructions, delays, and weights that are loaded anew."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import msgspec

from mpillm import kernels
from mpillm.comm import collectives, exchange, parts, shared, waiting
from mpillm.engine import reply
from mpillm.engine.worker import Worker
from mpillm.model.decoder import Decoder
from mpillm.run import session
from mpillm.run.session import Session

CONSTANTS: dict[tuple[Any, str], tuple[float, ...]] = {
    (parts, "LANES"): (0.0, 0.0, 0.8e-3),
    (parts, "LANE_ROWS"): (2, 3, 16),
    (parts, "EAGER"): (500, 4000, 60_000),
    (parts, "ADDER"): (1e-9, 1e-5, 25e-6),
    (shared, "LARGEST"): (2**9, 2**12, 2**20),
    (exchange, "HEAD"): (64, 512),
    (waiting, "SPIN"): (0.0, 2e-3),
    (reply, "TILE"): (3, 64),
}
SHARED_ROWS, MAKE_GROUP, MAKE_WORKER = session.shared_rows, collectives.Group.__init__, Session._make_worker
BEGIN, FORWARD, STEP = collectives.Group.begin, Decoder.forward, Worker.step


def differ(draw: random.Random, own: random.Random, each_step: Callable[[], object] = lambda: None) -> None:
    """Change the program in what all ranks have alike, from `draw`, and in what this one has alone.

    `each_step` is called before each step of a rank.
    """
    for (module, name), values in CONSTANTS.items():
        setattr(module, name, draw.choice(values))
    apart, rate, crowded = draw.random() < 0.6, draw.choice((0.0, 1e6, 1e8)), draw.random() < 0.5
    loader, renews, late = (
        own.choice(("auto", "mmap", "read")),
        own.choice((0.0, 0.1, 0.5)),
        own.choice((0.0, 0.02)),
    )
    kernels.set_path(own.choice([path for path in kernels.available() if path != "numpy"]))

    def make_group(self: Any, *args: Any) -> None:
        MAKE_GROUP(self, *args)
        self._rate, self._crowded = rate or self._rate, crowded

    def make_worker(self: Any) -> None:
        memory = msgspec.structs.replace(self.spec.memory, loader=loader)
        self.spec = msgspec.structs.replace(self.spec, memory=memory)
        MAKE_WORKER(self)

    def delayed(original: Any) -> Any:
        def call(self: Any, *args: Any) -> Any:
            time.sleep(own.choice((1e-4, 1e-3, 3e-3)) if own.random() < late else 0)
            return original(self, *args)

        return call

    def step(self: Any, *args: Any) -> Any:
        each_step()
        if own.random() < renews:  # as when the loader has packed weights
            self.decoder._forget_pages()
        return STEP(self, *args)

    for owner, name, made in (
        (Session, "_make_worker", make_worker),
        (collectives.Group, "__init__", make_group),
        (collectives.Group, "begin", delayed(BEGIN)),
        (Decoder, "forward", delayed(FORWARD)),
        (Worker, "step", step),
        (session, "shared_rows", (lambda *_: None) if apart else SHARED_ROWS),  # without: as between hosts
    ):
        setattr(owner, name, made)
