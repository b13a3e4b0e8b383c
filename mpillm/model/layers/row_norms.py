"""Norms over rows whose heads lie on several shards (OLMo 2, OLMoE, MiniMax-M2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mpillm import kernels
from mpillm.model.layers.rank import Floats, Rank


class HeadRows(NamedTuple):
    """This shard's heads of rows: x [m, own heads * dim], the norm of whole rows, and the heads of each shard."""

    x: Floats
    norm: kernels.Norm
    dim: int
    shards: Sequence[range]


def normalise_rows(rank: Rank, parts: Sequence[HeadRows]) -> None:
    """RMS norms of whole rows, in place, with the bits that one shard makes.

    The squares of each head are summed apart. All shards get all heads' sums and add them in the order of heads, as
    `kernels.rms_norm` does with as many groups.
    """
    m = len(parts[0].x)
    widths = [max(map(len, part.shards)) for part in parts]  # shards may have unequal numbers of heads
    firsts = np.cumsum([0, *widths])
    own = np.zeros((m, firsts[-1]), np.float32)
    for part, first in zip(parts, firsts, strict=False):
        sums = np.empty(m * (part.x.shape[1] // part.dim), np.float32)
        kernels.square_sums(part.x.reshape(-1, part.dim), sums, rank.threads)
        own[:, first : first + len(sums) // m] = sums.reshape(m, -1)
    gathered = rank.group.all_gather(own)
    for part, first in zip(parts, firsts, strict=False):
        total, head = np.zeros(m, np.float32), 0
        for shard, heads in enumerate(part.shards):
            for column, number in enumerate(heads):
                if number == head:  # not one that an earlier shard has too
                    total += gathered[shard, :, first + column]
                    head += 1
        mine, weight = part.shards[rank.place.shard], part.norm.weight
        assert weight is not None
        assert not part.norm.centred
        with np.errstate(all="ignore"):
            mean = total / np.float32(part.norm.width)
            part.x[:] *= (np.float32(1) / np.sqrt(mean + np.float32(part.norm.eps)))[:, None]
            part.x[:] *= weight[mine.start * part.dim : mine.stop * part.dim]
