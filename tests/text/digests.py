"""Ids as a few characters, so that goldens of thousands of texts stay small."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def digest(ids: Sequence[int]) -> str:
    """How many ids, and a hash of them."""
    return f"{len(ids)}:{hashlib.blake2b(repr(list(ids)).encode(), digest_size=5).hexdigest()}"
