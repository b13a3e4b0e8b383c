"""A client's body becomes work for the engine."""

from __future__ import annotations

import uuid
from typing import Any

from mpillm.batch import bodies
from mpillm.batch.work import Line, Model, Work, work_of
from mpillm.spec import Spec


def prepare(url: str, content: dict[str, Any], spec: Spec, model: Model) -> Work:
    """Return the work of a body; RequestError says what is wrong with it."""
    endpoint = bodies.read_body({"url": url, "body": content})
    # Draws are keyed by the name: a seed in the body names it, so that the same body gives the same answer.
    seed = getattr(endpoint, "seed", None)
    name = uuid.uuid4().hex if seed is None else f"seed {seed}"
    return work_of(Line(1, 0, 0, name, b""), endpoint, spec, model)
