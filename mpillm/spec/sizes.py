"""Numbers of bytes as people write and read them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", 1):
    _UNITS[f"{_letter}iB".upper()] = 1024**_power
    _UNITS[f"{_letter}B"] = 1000**_power


def byte_size(value: str | int) -> int:
    """Return the bytes of 1073741824, "2GiB" (powers of 1024) or "500MB" (of 1000); ValueError says what is wrong."""
    if isinstance(value, int):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ValueError(f"{shown_value(value)} is not a size; write bytes as 2GiB, 512MiB or 500MB")
    size = float(match[1]) * unit
    if size < 1:
        raise ValueError(f"{value!r} is not a size; it must be at least one byte")
    if size >= 2**63:
        raise ValueError(f"{shown_value(value)} is not a size; it must be less than 8 EiB")
    return int(size)


def unit_meant(value: object) -> str:
    """Return a remark on a size that is too small: that a number without a unit counts bytes; empty for other sizes."""
    return (
        f" ({value} is {value} bytes; write {value}GiB for more)"
        if re.fullmatch(r"\d{1,4}", str(value))
        else ""
    )


def shown_bytes(count: float) -> str:
    """Return bytes for people: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def shown_value(value: object) -> str:
    """Return a value in a message, not at its whole length."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"
