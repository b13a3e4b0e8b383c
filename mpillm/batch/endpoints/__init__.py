"""The endpoints: one module and one line of the table for each URL."""

from __future__ import annotations

from mpillm.batch.endpoints.chat import ChatCompletions
from mpillm.batch.endpoints.choices import MultipleChoice
from mpillm.batch.endpoints.classify import Classify
from mpillm.batch.endpoints.completions import Completions
from mpillm.batch.endpoints.embeddings import Embeddings
from mpillm.batch.endpoints.rerank import Rerank
from mpillm.batch.endpoints.score import Score
from mpillm.batch.work import Column, Endpoint

ENDPOINTS: tuple[type[Endpoint], ...] = (
    ChatCompletions,
    Completions,
    Embeddings,
    MultipleChoice,
    Score,
    Rerank,
    Classify,
)

# What choices leave in results.h5, in the order of its groups.
COLUMNS: tuple[Column, ...] = tuple(
    dict.fromkeys(column for endpoint in ENDPOINTS for column in endpoint.columns)
)
