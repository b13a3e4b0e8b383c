"""/v1/classify: the probabilities of a classifier's labels for each input, as vLLM has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpillm.batch.endpoints.embeddings import JSON_BYTES
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
from mpillm.engine.pooled import decide, logits_of
from mpillm.engine.request import FinishedCompletion, Request
from mpillm.errors import UnsuitedError
from mpillm.spec import Spec


class ClassifyEndpoint(Endpoint, frozen=True, kw_only=True):
    """/v1/classify"""

    url: ClassVar[str] = "/v1/classify"
    aliases: ClassVar[tuple[str, ...]] = ("/classify",)
    key: ClassVar[str] = ""
    columns: ClassVar[tuple[ResultColumn, ...]] = (ResultColumn("probabilities", "values", "<f8"),)

    input: str | list[Any]
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Truncated | None = None
    truncation_side: Side | None = None
    use_activation: bool | None = None
    activation: bool | None = None

    def requests(self, custom_id: str, spec: Spec, model: Model) -> tuple[Request, ...]:
        classifier = model.classifier
        if classifier is None:
            raise UnsuitedError(
                "the model has no classifier; /v1/multiple_choice chooses among texts with any model"
            )
        cut = cut_of(self.truncate_prompt_tokens, 0, self.truncation_side or "right", spec, model)
        prompts = read_prompts("input", self.input, self.add_special_tokens, 1, spec, model, cut)
        check_answer(len(prompts) * len(classifier.labels) * JSON_BYTES)
        for index, ids in enumerate(prompts):
            check_length(ids, prompt_name(prompts, index), spec, model)
        return tuple(
            Request(
                id=custom_id,
                prompt=ids,
                choice=choice,
                kind="embed",
                max_tokens=0,
                pooling=classifier.pooling,
            )
            for choice, ids in enumerate(prompts)
        )

    def response(self, work: Work, completions: Sequence[FinishedCompletion], model: Model) -> dict[str, Any]:
        assert model.classifier is not None
        labels, shown = model.classifier.labels, []
        for index, completion in enumerate(completions):
            probabilities = self._probabilities(completion, model)
            label = labels[int(np.argmax(probabilities))]
            shown.append(
                {"index": index, "label": label, "probs": probabilities.tolist(), "num_classes": len(labels)}
            )
        return {
            "id": f"classify-{hashed_id(work.custom_id)}",
            "object": "list",
            "created": CREATED,
            "model": model.answering(self.model),
            "data": shown,
            "usage": {"prompt_tokens": work.prompt_tokens, "total_tokens": work.prompt_tokens},
        }

    def values(self, work: Work, completion: FinishedCompletion, model: Model) -> Mapping[str, ArrayLike]:
        return {"probabilities": self._probabilities(completion, model)}

    def _probabilities(self, completion: FinishedCompletion, model: Model) -> NDArray[np.float64]:
        assert model.classifier is not None
        assert completion.embedding is not None
        wanted = self.activation if self.use_activation is None else self.use_activation
        return decide(
            model.classifier, logits_of(model.classifier, completion.embedding), wanted is not False
        )
