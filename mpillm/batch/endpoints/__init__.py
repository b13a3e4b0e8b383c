"""The endpoints: one module and one line of the table for each URL."""

from __future__ import annotations

from mpillm.batch.endpoints.chat import ChatCompletionsEndpoint
from mpillm.batch.endpoints.choices import ChoicesEndpoint
from mpillm.batch.endpoints.classify import ClassifyEndpoint
from mpillm.batch.endpoints.completions import CompletionsEndpoint
from mpillm.batch.endpoints.embeddings import EmbeddingsEndpoint
from mpillm.batch.endpoints.rerank import RerankEndpoint
from mpillm.batch.endpoints.score import ScoreEndpoint
from mpillm.batch.work import Endpoint, ResultColumn

ENDPOINTS: tuple[type[Endpoint], ...] = (
    ChatCompletionsEndpoint,
    CompletionsEndpoint,
    EmbeddingsEndpoint,
    ChoicesEndpoint,
    ScoreEndpoint,
    RerankEndpoint,
    ClassifyEndpoint,
)

# What choices leave in results.h5, in the order of its groups.
COLUMNS: tuple[ResultColumn, ...] = tuple(
    dict.fromkeys(column for endpoint in ENDPOINTS for column in endpoint.columns)
)

# What to use instead of URLs of OpenAI, Anthropic, Ollama and llama.cpp that there are not.
OTHERS = dict.fromkeys(("/v1/responses", "/v1/messages", "/api/chat"), "/v1/chat/completions")
OTHERS |= dict.fromkeys(("/api/generate", "/completion"), "/v1/completions")
OTHERS |= dict.fromkeys(("/api/embed", "/embedding"), "/v1/embeddings")
