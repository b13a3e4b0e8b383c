"""A new endpoint is a class and a line of a table: nothing else knows which endpoints there are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import h5py
import numpy as np
import pytest
from numpy.typing import ArrayLike

from mpillm.batch.endpoints import COLUMNS, ENDPOINTS
from mpillm.batch.endpoints.prompts import read_prompts
from mpillm.batch.work import Endpoint, Model, ResultColumn, Work
from mpillm.engine.request import FinishedCompletion, Request
from mpillm.spec import Spec
from mpillm.store import results
from mpillm.store.journal import Journal
from mpillm.store.output import Claim
from tests.job_helpers import WITH_TEXT, checked, completion


class Choose(Endpoint, frozen=True, kw_only=True):
    """Which of several continuations of a prompt is the likeliest."""

    url: ClassVar[str] = "/v1/choose"
    key: ClassVar[str] = "question"
    columns: ClassVar[tuple[ResultColumn, ...]] = (ResultColumn("scores", "values", "<f8"),)

    question: str
    choices: list[str]
    suffix: str | None = None  # which the other endpoints refuse

    def requests(self, custom_id: str, spec: Spec, model: Model) -> tuple[Request, ...]:
        prompts = read_prompts(
            "choices", [self.question + text for text in self.choices], True, 1, spec, model
        )
        return tuple(
            Request(id=custom_id, prompt=ids, choice=choice, max_tokens=0, prompt_logprobs=0)
            for choice, ids in enumerate(prompts)
        )

    def response(self, work: Work, completions: Sequence[FinishedCompletion], model: Model) -> dict[str, Any]:
        scores = [sum(completion.prompt_logprobs) for completion in completions]
        return {"model": model.name, "best": self.choices[int(np.argmax(scores))]}

    def values(self, work: Work, completion: FinishedCompletion, model: Model) -> Mapping[str, ArrayLike]:
        return {"scores": [sum(completion.prompt_logprobs)]}


def test_a_new_endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpillm.batch.bodies.ENDPOINTS", (*ENDPOINTS, Choose))
    monkeypatch.setattr("mpillm.store.results.COLUMNS", (*COLUMNS, *Choose.columns))
    body = {"question": "the ", "choices": ["fox", "dog", "end"], "suffix": "x"}
    batch = checked(
        tmp_path,
        [body, {"url": "/v1/choose", "body": body}, {"prompt": "a"}, {"url": "/v1/choose", "body": {}}],
    )
    assert [line.error for line in batch.lines] == [
        None,
        None,
        None,
        "Line 4: the key 'question' is missing.",
    ]
    with Claim(tmp_path / "out") as claim, Journal(claim, {}, batch.lines) as journal:
        for work in batch.works():
            made = [completion(request, [], seed) for seed, request in enumerate(work.requests)]
            journal.append(results.finished_record(work, made, WITH_TEXT))
        journal.flush()
        results.write_jsonl(claim.directory, batch.lines, journal)
        results.write_hdf5(claim.directory, batch.lines, journal, {})
    first = json.loads((tmp_path / "out/results.jsonl").read_text().splitlines()[0])
    with h5py.File(tmp_path / "out/results.h5") as h5:
        assert h5["requests/choices"][:].tolist() == [0, 3, 6, 7, 7]
        assert np.diff(h5["scores/offsets"][:]).tolist() == [1] * 6 + [0]
        scores = h5["scores/values"][:3]
    assert scores.dtype == np.float64
    assert first["response"]["body"]["best"] == body["choices"][int(np.argmax(scores))]
