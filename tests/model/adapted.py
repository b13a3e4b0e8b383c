"""Requests with and without an adapter, for one rank or many."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mpillm.engine.request import FinishedCompletion, Request
from tests.digests import recorded
from tests.model.checks import EXACT, RECURRENT, RECURRENT_MODELS, check, digest, requests_of
from tests.model.golden import FIXTURES, adapted_model, golden


def folder(name: str) -> str:
    """A tiny adapter's directory."""
    return str(FIXTURES / "adapters" / name)


def numbered(requests: list[Request], number: int, prefix: str = "") -> list[Request]:
    """The same with an adapter of this number."""
    return [replace(one, adapter=number, id=prefix + one.id) for one in requests]


def both(name: str) -> tuple[list[Request], dict[str, Any]]:
    """What an adapter's reference values can check, in turn with the adapter and without; and settings for it."""
    requests = requests_of(golden(f"{name}.adapter"))
    pairs = zip(numbered(requests, 1), numbered(requests, 0, "base-"), strict=True)
    job = {"activations": "f32", "kv_type": "f32", "threads": 1, "adapters": {"one": folder(name)}}
    return [one for pair in pairs for one in pair], job


def check_both(name: str, completions: list[FinishedCompletion]) -> None:
    """Assert that those of `both` are PEFT's, with the bits that they had when they were recorded."""
    bounds = RECURRENT if adapted_model(name).startswith(RECURRENT_MODELS) else EXACT
    check(golden(f"{name}.adapter"), completions[::2], bounds)
    with_adapter, without = digest(completions[::2]), digest(completions[1::2])
    assert with_adapter != without
    recorded.check({f"{name} adapter": with_adapter, f"{name} adapter base": without})
