"""/v1/rerank: documents in the order of their relevance to a query, as Jina, Cohere and vLLM have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from mpillm.batch.endpoints.pairs import Pairs
from mpillm.batch.work import Model, Work, hashed_id
from mpillm.engine.request import FinishedCompletion
from mpillm.errors import RequestError

Document = str | dict[str, Any]


class RerankEndpoint(Pairs, frozen=True, kw_only=True):
    """/v1/rerank"""

    url: ClassVar[str] = "/v1/rerank"
    aliases: ClassVar[tuple[str, ...]] = ("/rerank", "/v2/rerank")
    key: ClassVar[str] = "query"

    query: str
    documents: str | Annotated[list[Document], Meta(min_length=1)]
    top_n: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None  # 0: all
    return_documents: bool | None = None

    def pairs(self) -> tuple[list[str], list[str]]:
        texts = []
        documents = [self.documents] if isinstance(self.documents, str) else self.documents
        for index, document in enumerate(documents):
            text = document if isinstance(document, str) else document.get("text")
            if not isinstance(text, str):
                raise RequestError(f'documents[{index}] must be a string, or an object with a "text"')
            texts.append(text)
        return [self.query], texts

    def response(self, work: Work, completions: Sequence[FinishedCompletion], model: Model) -> dict[str, Any]:
        scores, (_, texts) = self.scores(completions, model), self.pairs()
        ranked = sorted(range(len(scores)), key=lambda index: -scores[index])[: self.top_n or None]
        shown = self.return_documents is not False
        return {
            "id": f"rerank-{hashed_id(work.custom_id)}",
            "model": model.answering(self.model),
            "usage": {"prompt_tokens": work.prompt_tokens, "total_tokens": work.prompt_tokens},
            "results": [
                {
                    "index": index,
                    **({"document": {"text": texts[index]}} if shown else {}),
                    "relevance_score": scores[index],
                }
                for index in ranked
            ],
        }
