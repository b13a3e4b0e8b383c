"""A plain mutator, for machines without atheris and for tests: the same seed gives the same cases."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

EDGES = (0, 1, 0x7F, 0x80, 0xFF)
MOST = 6  # changes in a case


def cases(seeds: Sequence[bytes], words: Sequence[bytes], count: int, seed: int) -> Iterator[bytes]:
    """So many cases: the seeds themselves, then what becomes of them."""
    draw = random.Random(seed)
    for number in range(count):
        data = bytearray(seeds[number % len(seeds)])
        if number >= len(seeds):
            for _ in range(draw.randint(1, MOST)):
                _change(data, seeds, words, draw)
        yield bytes(data)


def _change(data: bytearray, seeds: Sequence[bytes], words: Sequence[bytes], draw: random.Random) -> None:
    """Change something, most often near the beginning, where headers are."""
    reach = min(len(data), draw.choice((16, 200, 4000, len(data) + 1)))
    at = draw.randrange(reach + 1)
    many = draw.choice((1, 2, 4, 8, 64))
    match draw.randrange(7):
        case 0 if at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        case 1 if at < len(data):
            data[at] = draw.choice(EDGES)
        case 2:
            data[at : at + many] = draw.randbytes(many)
        case 3:
            del data[at : at + many]
        case 4:
            data[at:at] = data[at : at + many] * draw.randint(1, 3)
        case 5 if words:
            word = draw.choice(words)
            data[at : at + draw.choice((0, len(word)))] = word
        case 6:
            other = draw.choice(seeds)
            begin = draw.randrange(len(other) + 1)
            data[at : at + many] = other[begin : begin + many]
        case _:
            del data[at:]
