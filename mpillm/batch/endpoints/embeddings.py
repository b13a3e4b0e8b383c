"""/v1/embeddings: a vector for each input, pooled from the final hidden states."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpillm.batch.endpoints.generate import CREATED
from mpillm.batch.endpoints.prompts import check_answer, check_length, prompt_name, read_prompts
from mpillm.batch.work import Column, Endpoint, Model, Work, hashed_id
from mpillm.engine.sequence import Completion, Request
from mpillm.spec import Pooling, Spec

JSON_BYTES, BASE64_BYTES = 22, 6  # of a value in an answer, at most


class Embeddings(Endpoint, frozen=True, kw_only=True):
    """/v1/embeddings"""

    url: ClassVar[str] = "/v1/embeddings"
    key: ClassVar[str] = "input"
    columns: ClassVar[tuple[Column, ...]] = (Column("embeddings", "values", "<f4"),)

    input: str | list[Any]
    encoding_format: Literal["float", "base64"] | None = None
    pooling: Pooling | None = None
    normalize: bool | None = None
    add_special_tokens: bool | None = None

    def requests(self, custom_id: str, spec: Spec, model: Model) -> tuple[Request, ...]:
        prompts = read_prompts("input", self.input, self.add_special_tokens, 1, spec, model)
        each = model.hidden * (BASE64_BYTES if self.encoding_format == "base64" else JSON_BYTES)
        check_answer(len(prompts) * each)
        for index, ids in enumerate(prompts):
            check_length(ids, prompt_name(prompts, index), spec, model)
        pooling = self.pooling or spec.embeddings.pooling
        return tuple(
            Request(id=custom_id, prompt=ids, choice=choice, kind="embed", max_tokens=0, pooling=pooling)
            for choice, ids in enumerate(prompts)
        )

    def response(self, work: Work, completions: Sequence[Completion], model: Model) -> dict[str, Any]:
        usage = {"prompt_tokens": work.prompt_tokens, "total_tokens": work.prompt_tokens}
        return {
            "id": f"embd-{hashed_id(work.custom_id)}",
            "object": "list",
            "created": CREATED,
            "model": model.name,
            "data": [
                msgspec.Raw(msgspec.json.encode(self._embedding(work, completion)))
                for completion in completions
            ],
            "usage": usage,
        }

    def values(self, completion: Completion) -> Mapping[str, ArrayLike]:
        assert completion.embedding is not None
        return {"embeddings": completion.embedding}

    def _embedding(self, work: Work, completion: Completion) -> dict[str, Any]:
        assert completion.embedding is not None
        vector = completion.embedding
        if work.spec.embeddings.normalize if self.normalize is None else self.normalize:
            vector = normalized(vector)
        little_endian = np.ascontiguousarray(vector, "<f4")
        shown = (
            base64.b64encode(little_endian.tobytes()).decode()
            if self.encoding_format == "base64"
            else little_endian.tolist()
        )
        return {"object": "embedding", "index": completion.request.choice, "embedding": shown}


def normalized(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    """The vector at length 1 (a zero vector as it is); the sum is exactly rounded, so it is the same everywhere."""
    length = math.sqrt(math.fsum(float(value) ** 2 for value in vector))
    return vector if length == 0.0 else (vector.astype(np.float64) / length).astype(np.float32)
