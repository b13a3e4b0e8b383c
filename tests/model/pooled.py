"""Models that classify or make vectors, and what transformers computes of them: pooled states and logits."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from mpillm.engine.pooled import logits_of
from mpillm.engine.request import FinishedCompletion, Request
from mpillm.model.opening import config_of, open_source
from mpillm.model.pooled import Classifier, read_classifier

FOLDER = Path(__file__).parents[1] / "fixtures/pooled"
NAMES = sorted(path.name for path in FOLDER.iterdir())
POOLINGS = ("cls", "last", "mean")
MOST = 1e-4  # of a pooled value; logits are held to the bound of log-probabilities
MOST_OF_LOGITS = 2e-4


def golden(name: str) -> list[dict[str, Any]]:
    """The prompts of a model with their reference values."""
    prompts: list[dict[str, Any]] = json.loads((FOLDER / name / "golden.json").read_text())["prompts"]
    return prompts


def classifier_of(model: Path) -> Classifier | None:
    """The model's classifier."""
    with closing(open_source(model)) as source:
        spec = config_of(source).classifier
        return None if spec is None else read_classifier(source, spec)


def requests_of(prompts: list[dict[str, Any]]) -> list[Request]:
    """Every pooling of every prompt."""
    return [
        Request(
            id=f"{index}-{pooling}",
            prompt=tuple(prompt["ids"]),
            kind="embed",
            max_tokens=0,
            pooling=pooling,  # type: ignore[arg-type]
            second=prompt["second"],
        )
        for index, prompt in enumerate(prompts)
        for pooling in POOLINGS
    ]


def check(
    prompts: list[dict[str, Any]], completions: list[FinishedCompletion], classifier: Classifier | None
) -> None:
    """Assert that completions of `requests_of(prompts)` are what the reference says."""
    found = {completion.request.id: completion.embedding for completion in completions}
    assert len(found) == len(POOLINGS) * len(prompts)
    for index, prompt in enumerate(prompts):
        for pooling in POOLINGS:
            np.testing.assert_allclose(found[f"{index}-{pooling}"], prompt[pooling], atol=MOST, rtol=0)
        assert (classifier is None) is ("logits" not in prompt)
        if classifier is not None:
            pooled = found[f"{index}-{classifier.pooling}"]
            assert pooled is not None
            np.testing.assert_allclose(
                logits_of(classifier, pooled), prompt["logits"], atol=MOST_OF_LOGITS, rtol=0
            )


def bits(completion: FinishedCompletion) -> bytes:
    """Every bit of a pooled state."""
    assert completion.embedding is not None
    return completion.embedding.tobytes()
