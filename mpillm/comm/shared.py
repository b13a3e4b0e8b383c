"""Memory that the shards of a stage share where they are on one host: rows go from one to the others without messages.

Each shard writes its part once, and all read it where it is. The memory has no name (memfd), so that nothing is left
behind however the ranks end, and freeing it needs nobody else.
"""

from __future__ import annotations

import importlib
import mmap
import os
import secrets
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from mpillm.comm.exchange import Exchange
from mpillm.comm.world import World
from mpillm.partition.grid import Place

F32 = npt.NDArray[np.float32]

FLAG_BYTES = 64  # bytes of each shard's flag: a cache line
LARGEST = 2**20  # bytes of a part; more rows go in several pieces, which stay in the caches
TOKEN = 16  # random bytes by which a rank knows the memory that another one offers
SLOTS = 2  # a shard may write the next piece while others still read this one


class SharedRows:
    """The memory of one stage's shards, and this shard's place in it.

    A piece is written to `slot`, `publish` says so, and after `wait` the slot has the pieces of all shards.
    """

    def __init__(self, memory: mmap.mmap, place: Place, flags: Any) -> None:
        """`flags` is the module `mpillm.kernels._flags`."""
        shards = place.shards
        words = np.frombuffer(memory, np.uint32, shards * FLAG_BYTES // 4).reshape(shards, -1)
        self._flags = flags.Flags(words, place.shard)
        values = np.frombuffer(memory, np.float32, offset=shards * FLAG_BYTES)
        self._slots = values.reshape(SLOTS, -1)
        self._shards, self._turn = shards, 0
        self._views: tuple[tuple[int, int], list[F32]] = (0, 0), []
        #: values that a piece has at most
        self.capacity = self._slots.shape[1] // shards

    def slot(self, m: int, d: int) -> F32:
        """Return the array for the next pieces, f32 [shards, m, d]; it overwrites the pieces before the last ones."""
        if self._views[0] != (m, d):
            views = [slot[: self._shards * m * d].reshape(self._shards, m, d) for slot in self._slots]
            self._views = (m, d), views
        self._turn ^= 1
        return self._views[1][self._turn]

    def publish(self, nbytes: int) -> None:
        """Tell the other shards that this shard has written its piece, of `nbytes`."""
        self._flags.raised(nbytes)

    def wait(self, spin: float, sleep: float) -> bool:
        """Poll for up to `spin` seconds and then sleep for up to `sleep`; return whether all shards have published."""
        found: bool = self._flags.wait(spin, sleep)
        return found

    def unlike(self) -> tuple[int, int] | None:
        """Return a shard that has published another number of bytes than this one, and that number."""
        found: tuple[int, int] | None = self._flags.unlike()
        return found


def shared_rows(world: World, team: Exchange, place: Place, nbytes: int) -> SharedRows | None:
    """Return memory for parts of up to `nbytes` of the stage's shards; None if they are on several hosts, or cannot.

    Collective over the `team` of the replica. Containers of one machine with names of their own count as hosts, as in
    the plan.
    """
    flags = None
    with suppress(ImportError):
        flags = importlib.import_module("mpillm.kernels._flags")
    capacity = -(-min(nbytes, LARGEST) // FLAG_BYTES) * FLAG_BYTES
    size = place.shards * (FLAG_BYTES + SLOTS * capacity)
    within = place.stage * place.shards  # the first of them in the replica
    first = place.first + within
    together = len(set(world.nodes.numbers[first : first + place.shards])) == 1
    own, offer = -1, None
    if place.shard == 0 and place.shards > 1 and together and flags is not None:
        with suppress(OSError, AttributeError):
            own = os.memfd_create("mpillm")
            os.posix_fallocate(own, 0, size)
            token = secrets.token_bytes(TOKEN)
            os.pwrite(own, token, 0)
            offer = f"/proc/{os.getpid()}/fd/{own}", token
    try:
        path = team.gather(offer)[within]
        memory = None if path is None or flags is None else _mapped(*path, size)
        stage = team.gather(memory is not None)[within : within + place.shards]
    finally:
        if own >= 0:
            os.close(own)
    if not all(stage):
        memory = None
    if memory is not None and place.shard == 0:
        memory[:TOKEN] = bytes(TOKEN)  # all have read it
    team.barrier()  # no flag may be raised before this
    return SharedRows(memory, place, flags) if memory is not None else None


def _mapped(path: str, token: bytes, size: int) -> mmap.mmap | None:
    """Return the memory that another rank offers; None if the path leads to another one, as it may in a container."""
    with suppress(OSError, ValueError):
        file = os.open(path, os.O_RDWR)
        try:
            if os.pread(file, len(token), 0) == token:
                return mmap.mmap(file, size)
        finally:
            os.close(file)
    return None
