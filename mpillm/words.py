"""Numbers of things, sizes and names in sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence


def count_of(number: int | str, kind: str) -> str:
    """`1 rank`, `2 ranks`: a number, which may be formatted already, and the plural where it is not one."""
    return f"{number} {kind}{'' if str(number) == '1' else 's'}"


def tokens_of(prompt: int, generated: int, shared: str = "") -> str:
    """`7 prompt and 2 generated tokens`, or `7 prompt tokens` if nothing was generated; `shared` follows `prompt`."""
    if not generated:
        return f"{count_of(prompt, 'prompt token')}{shared}"
    return f"{prompt} prompt{shared} and {count_of(generated, 'generated token')}"


def enough(count: int) -> str:
    """Return a size that can be typed, rounded up from `count` bytes: "29.3MiB"."""
    power = max(0, count.bit_length() - 1) // 10
    return f"{math.ceil(count * 10 / 1024**power) / 10:g}{'_KMGT'[power]}iB" if power else f"{count}B"


def some_of(names: Sequence[str], kind: str) -> str:
    """`a`, `a, b and c`, or `a, b and 5 other hosts`: at most three names, of things of one kind."""
    if len(names) > 3:
        names = [*names[:2], count_of(len(names) - 2, f"other {kind}")]
    return listed(names, "and")


def on_one_line(error: Exception) -> str:
    """Return what a library says of an error as a part of a sentence: on one line, without a full stop."""
    return " ".join(str(error).split()).rstrip(".")


def listed(names: Sequence[str], word: str) -> str:
    """`a`, `a and b`, `a, b and c`: names, with `word` before the last."""
    return f" {word} ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
