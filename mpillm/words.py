"""Numbers of things in sentences."""

from __future__ import annotations


def count_of(number: int | str, kind: str) -> str:
    """`1 rank`, `2 ranks`: a number, which may be formatted already, and the plural where it is not one."""
    return f"{number} {kind}{'' if str(number) == '1' else 's'}"
