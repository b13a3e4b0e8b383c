"""/v1/score: how relevant texts are to one another, pair by pair, as vLLM has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from mpillm.batch.endpoints.generate import CREATED
from mpillm.batch.endpoints.pairs import Pairs, Texts
from mpillm.batch.work import Model, Work, hashed_id
from mpillm.engine.request import FinishedCompletion
from mpillm.errors import RequestError

# What vLLM calls the queries and the documents.
PAIRS = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))


class ScoreEndpoint(Pairs, frozen=True, kw_only=True):
    """/v1/score"""

    url: ClassVar[str] = "/v1/score"
    aliases: ClassVar[tuple[str, ...]] = ("/score",)
    key: ClassVar[str] = "text_1"

    text_1: str | Texts | None = None
    text_2: str | Texts | None = None
    queries: str | Texts | None = None
    documents: str | Texts | None = None
    items: str | Texts | None = None
    data_1: str | Texts | None = None
    data_2: str | Texts | None = None

    def pairs(self) -> tuple[list[str], list[str]]:
        given = {name for names in PAIRS for name in names if getattr(self, name) is not None}
        names = next((names for names in PAIRS if given == set(names)), None)
        if names is None:
            raise RequestError("the line needs text_1 and text_2, or queries and documents")
        first, second = (getattr(self, name) for name in names)
        queries, documents = ([one] if isinstance(one, str) else one for one in (first, second))
        if len(queries) not in (1, len(documents)):
            raise RequestError(
                f"{names[0]} has {len(queries)} texts and {names[1]} {len(documents)}; give as many of one "
                "as of the other, or a single text of the first"
            )
        return queries, documents

    def response(self, work: Work, completions: Sequence[FinishedCompletion], model: Model) -> dict[str, Any]:
        return {
            "id": f"score-{hashed_id(work.custom_id)}",
            "object": "list",
            "created": CREATED,
            "model": model.answering(self.model),
            "data": [
                {"index": index, "object": "score", "score": score}
                for index, score in enumerate(self.scores(completions, model))
            ],
            "usage": {"prompt_tokens": work.prompt_tokens, "total_tokens": work.prompt_tokens},
        }
