"""/v1/embeddings: a vector for each input, pooled from the final hidden states."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpillm.batch.endpoints.generate import CREATED
from mpillm.batch.endpoints.prompts import (
    Side,
    Truncated,
    check_answer,
    check_length,
    cut_of,
    prompt_name,
    read_prompts,
)
from mpillm.batch.work import Endpoint, Model, ResultColumn, Work, hashed_id
from mpillm.engine.pooled import through
from mpillm.engine.request import FinishedCompletion, Request
from mpillm.errors import RequestError
from mpillm.model.embedding import EmbeddingSettings
from mpillm.spec import Pooling, Spec

Dimensions = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]

JSON_BYTES, BASE64_BYTES = 22, 6  # maximum bytes of a value in an answer


class EmbeddingsEndpoint(Endpoint, frozen=True, kw_only=True):
    """/v1/embeddings"""

    url: ClassVar[str] = "/v1/embeddings"
    key: ClassVar[str] = "input"
    columns: ClassVar[tuple[ResultColumn, ...]] = (ResultColumn("embeddings", "values", "<f4"),)

    input: str | list[Any]
    encoding_format: Literal["float", "base64"] | None = None
    pooling: Pooling | None = None
    normalize: bool | None = None
    use_activation: bool | None = None  # vLLM's name of `normalize` now
    dimensions: Dimensions | None = None
    prompt_name: str | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Truncated | None = None
    truncation_side: Side | None = None

    def requests(self, custom_id: str, spec: Spec, model: Model) -> tuple[Request, ...]:
        settings, dimensions = model.embedding, self.dimensions
        pooling = self.pooling or spec.embeddings.pooling
        if pooling == "auto":
            if settings.unsupported:
                raise RequestError(
                    f"the model's embeddings need {settings.unsupported}, which is not supported; pooling "
                    "'mean' or 'last' gives different embeddings"
                )
            pooling = settings.pooling
        width = settings.width or model.hidden
        if dimensions is not None and width and dimensions > width:
            raise RequestError(f"dimensions {dimensions} is more than the model's {width}")
        cut = cut_of(self.truncate_prompt_tokens, 0, self.truncation_side or "right", spec, model)
        texts = self._texts(spec, settings)
        if texts != self.input and pooling != "last" and not settings.pools_prompts:
            raise RequestError(
                "the model's files exclude prompts from pooling (include_prompt), which is not supported; "
                "embed texts without a prompt, or with a prompt_name whose prompt is empty"
            )
        prompts = read_prompts("input", texts, self.add_special_tokens, 1, spec, model, cut)
        each = width * (BASE64_BYTES if self.encoding_format == "base64" else JSON_BYTES)
        check_answer(len(prompts) * each)
        for index, ids in enumerate(prompts):
            check_length(ids, prompt_name(prompts, index), spec, model)
        return tuple(
            Request(id=custom_id, prompt=ids, choice=choice, kind="embed", max_tokens=0, pooling=pooling)
            for choice, ids in enumerate(prompts)
        )

    def response(self, work: Work, completions: Sequence[FinishedCompletion], model: Model) -> dict[str, Any]:
        usage = {"prompt_tokens": work.prompt_tokens, "total_tokens": work.prompt_tokens}
        return {
            "id": f"embd-{hashed_id(work.custom_id)}",
            "object": "list",
            "created": CREATED,
            "model": model.answering(self.model),
            "data": [
                msgspec.Raw(msgspec.json.encode(self._embedding(work, completion, model)))
                for completion in completions
            ],
            "usage": usage,
        }

    def values(self, work: Work, completion: FinishedCompletion, model: Model) -> Mapping[str, ArrayLike]:
        return {"embeddings": self._vector(work, completion, model)}

    def _texts(self, spec: Spec, settings: EmbeddingSettings) -> str | list[Any]:
        """Return the inputs, with the model's prompt before each text; token ids are as they are given."""
        name = self.prompt_name or spec.embeddings.prompt_name or settings.default_prompt
        if name is None:
            return self.input
        if name not in settings.prompts:
            known = ", ".join(map(repr, settings.prompts)) or "none"
            raise RequestError(f"prompt_name: the model has no prompt {name[:100]!r}; it has {known}")
        prompt = settings.prompts[name]
        if isinstance(self.input, str):
            return prompt + self.input
        return [prompt + text if isinstance(text, str) else text for text in self.input]

    def _vector(self, work: Work, completion: FinishedCompletion, model: Model) -> NDArray[np.float32]:
        """Return the vector of the answer: its first `dimensions` values, at length 1 if that is asked for."""
        assert completion.embedding is not None
        vector = through(model.embedding.layers, completion.embedding)[: self.dimensions]
        asked = self.use_activation if self.normalize is None else self.normalize
        wanted = work.spec.embeddings.normalize if asked is None else asked
        return normalized(vector) if (model.embedding.normalize if wanted == "auto" else wanted) else vector

    def _embedding(self, work: Work, completion: FinishedCompletion, model: Model) -> dict[str, Any]:
        little_endian = np.ascontiguousarray(self._vector(work, completion, model), "<f4")
        shown = (
            base64.b64encode(little_endian.tobytes()).decode()
            if self.encoding_format == "base64"
            else little_endian.tolist()
        )
        return {"object": "embedding", "index": completion.request.choice, "embedding": shown}


def normalized(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the vector [n] at length 1 (a zero vector as it is); the sum is exactly rounded, so equal everywhere."""
    length = math.sqrt(math.fsum(float(value) ** 2 for value in vector))
    return vector if length == 0.0 else (vector.astype(np.float64) / length).astype(np.float32)
