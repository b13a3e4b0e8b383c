"""The relevance of documents to queries: the common part of /v1/score and /v1/rerank.

A model with a classifier reads a query and a document together. Of one that makes embeddings the score is the cosine of
the two vectors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated

import numpy as np
from msgspec import Meta
from numpy.typing import ArrayLike, NDArray

from mpillm.batch.endpoints.embeddings import EmbeddingsEndpoint
from mpillm.batch.endpoints.prompts import (
    MAX_PROMPT_TOKENS,
    Cut,
    Side,
    TokenIds,
    Truncated,
    check_length,
    check_sequences,
    cut_of,
    encoded,
)
from mpillm.batch.work import Endpoint, Model, ResultColumn, Work
from mpillm.engine.pooled import logits_of, relevance, through
from mpillm.engine.request import FinishedCompletion, Request
from mpillm.errors import RequestError, UnsuitedError
from mpillm.model.pooled import Classifier
from mpillm.spec import Spec

Texts = Annotated[list[str], Meta(min_length=1)]
RELEVANCE = ResultColumn("relevance", "values", "<f8")


class Pairs(Endpoint, frozen=True, kw_only=True):
    """A body that has pairs of a query and a document scored."""

    columns = (RELEVANCE, *EmbeddingsEndpoint.columns)

    instruction: str | None = None
    use_activation: bool | None = None
    activation: bool | None = None
    truncate_prompt_tokens: Truncated | None = None
    truncation_side: Side | None = None

    def pairs(self) -> tuple[list[str], list[str]]:
        """Return the queries and the documents, as many as each other or one query; RequestError for anything else."""
        raise NotImplementedError

    def requests(self, custom_id: str, spec: Spec, model: Model) -> tuple[Request, ...]:
        queries, documents = self.pairs()
        check_sequences("the line", max(len(queries), len(documents)), 1)
        classifier = model.classifier
        if classifier is None:
            if self.instruction is not None or self.use_activation is not None or self.activation is not None:
                raise RequestError(
                    "instruction and use_activation are for models that read both texts together"
                )
            texts = EmbeddingsEndpoint(
                input=[*queries, *documents],
                truncate_prompt_tokens=self.truncate_prompt_tokens,
                truncation_side=self.truncation_side,
            )
            return texts.requests(custom_id, spec, model)
        if classifier.relevant is None:
            shown = ", ".join(classifier.labels[:4])
            raise RequestError(
                f"the model has {len(classifier.labels)} labels ({shown}), and none for the relevance of a "
                "document; use /v1/classify"
            )
        if self.truncation_side == "left":
            raise RequestError(
                "truncation_side 'left' is not supported: a pair is cut at the end of its document"
            )
        cut = cut_of(self.truncate_prompt_tokens, 0, "right", spec, model)
        made, total = [], 0
        for index, document in enumerate(documents):
            which = f"pair {index + 1} of {len(documents)}" if len(documents) > 1 else "the pair"
            ids, second = self._cut(cut, queries[index % len(queries)], document, which, spec, model)
            check_length(ids, which, spec, model)
            total += len(ids)
            if index and total > MAX_PROMPT_TOKENS:
                raise RequestError(f"its pairs have more than {MAX_PROMPT_TOKENS} tokens; split the line")
            made.append(
                Request(
                    id=custom_id,
                    prompt=ids,
                    choice=index,
                    kind="embed",
                    max_tokens=0,
                    pooling=classifier.pooling,
                    second=second,
                )
            )
        return tuple(made)

    def scores(self, completions: Sequence[FinishedCompletion], model: Model) -> list[float]:
        """Return the score of each pair."""
        if model.classifier is not None:
            return [self._score(completion, model.classifier) for completion in completions]
        queries, _ = self.pairs()
        vectors = [self._embedding(completion, model) for completion in completions]
        return [
            cosine(vectors[index % len(queries)], vector)
            for index, vector in enumerate(vectors[len(queries) :])
        ]

    def values(self, work: Work, completion: FinishedCompletion, model: Model) -> Mapping[str, ArrayLike]:
        if model.classifier is not None:
            return {"relevance": [self._score(completion, model.classifier)]}
        return {"embeddings": self._embedding(completion, model)}

    def _score(self, completion: FinishedCompletion, classifier: Classifier) -> float:
        assert completion.embedding is not None
        wanted = self.activation if self.use_activation is None else self.use_activation
        return relevance(classifier, logits_of(classifier, completion.embedding), wanted is not False)

    def _embedding(self, completion: FinishedCompletion, model: Model) -> NDArray[np.float32]:
        assert completion.embedding is not None
        return through(model.embedding.layers, completion.embedding)

    def _cut(
        self, cut: Cut | None, query: str, document: str, which: str, spec: Spec, model: Model
    ) -> tuple[TokenIds, int | None]:
        """Return a pair's tokens, of which there are no more than `cut` says: the document is cut for that."""
        if cut is None or model.text is None:
            return self._tokens(query, document, which, spec, model)
        around, _ = self._tokens(query, "", which, spec, model)
        capacity = cut.count - len(around)
        while capacity > 0:
            beginning = model.text.beginning(document, capacity)
            ids, second = self._tokens(query, beginning, which, spec, model)
            if len(ids) <= cut.count:
                return ids, second
            capacity -= len(ids) - cut.count  # tokens are other ones beside other text
        raise RequestError(f"truncate_prompt_tokens {cut.count} leaves nothing of the document in {which}")

    def _tokens(
        self, query: str, document: str, which: str, spec: Spec, model: Model
    ) -> tuple[TokenIds, int | None]:
        """Return a pair's tokens, and where the second segment begins."""
        if model.text is None:
            raise UnsuitedError("the model has no tokenizer, which pairs of texts need")
        template = spec.scoring.template or model.pair_template
        instruction = self.instruction or spec.scoring.instruction
        if template is not None:
            if instruction is None:
                instruction = INSTRUCTION
            values = {"instruction": instruction, "query": query, "document": document}
            return encoded(partial(model.text.encode_template, template, values), which, spec, model), None
        roles = {"system": instruction, "query": query, "document": document}
        if model.text.chat_reads("query") and model.text.chat_reads("document"):
            messages = [{"role": role, "content": text} for role, text in roles.items() if text is not None]
            encode = partial(model.text.encode_chat, messages, {"add_generation_prompt": True})
            return encoded(encode, which, spec, model), None
        if instruction is not None:
            raise RequestError("the model takes no instruction with a query and a document")
        seconds: list[int | None] = []

        def pair(max_tokens: int) -> list[int]:
            assert model.text is not None
            ids, second = model.text.encode_pair(query, document, max_tokens)
            seconds.append(second)
            return ids

        return encoded(pair, which, spec, model), seconds[0]


# What Qwen3-Reranker's authors publish for pairs without an instruction.
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


def cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Return the cosine of two vectors [n], 0 if one is zero; sums are exactly rounded, so equal everywhere."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    lengths = math.sqrt(math.fsum(x * x)) * math.sqrt(math.fsum(y * y))
    return math.fsum(x * y) / lengths if lengths else 0.0
