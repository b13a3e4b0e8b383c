"""A draft model: what it keeps of sequences, and that it draws what the large model would."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from mpillm.engine.draft_model import DraftModel
from mpillm.engine.request import Request
from mpillm.engine.sequence import Sequence
from mpillm.engine.worker import Worker
from mpillm.errors import JobError
from mpillm.run.session import Session
from mpillm.run.statistics import rank_statistics
from mpillm.spec import DraftSection
from tests.model.engine_harness import _alone, run_engine, spec_of
from tests.model.golden import model_path
from tests.weights.build import Tiny, write_hf

MODEL = "qwen2_window"  # some layers have a window, so there are two groups


def requests() -> list[Request]:
    rng = np.random.default_rng(4)
    system = tuple(rng.integers(0, 100, 70).tolist())
    made = [Request(f"greedy-{i}", system + tuple(range(i)), max_tokens=40) for i in range(1, 4)]
    made += [
        Request("drawn", system, max_tokens=40, temperature=0.8, seed=5, logprobs=2),
        Request("filtered", system[:33], max_tokens=40, temperature=1.3, top_p=0.9, repetition_penalty=1.2),
        Request("counted", system[:5], max_tokens=40, temperature=1.0, top_k=20, frequency_penalty=0.5),
    ]
    return made


@pytest.mark.parametrize("n_blocks", [200, 14, 3])
def test_the_same_model_drafts_what_is_drawn(n_blocks: int) -> None:
    """Sequences grow by what a run has drawn, and at times by less than what was drafted, like by a wrong draft."""
    rng = np.random.default_rng(n_blocks)
    model, asked = model_path(MODEL), requests()
    answers = [one.tokens for one in run_engine(model, asked, speculation="off", kv_type="f32")]
    with closing(Session(_alone(), spec_of(model, kv_type="f32"), model)) as session:
        worker = Worker(session.worker.decoder, 1, session.threads)
        limits, vocab = session.limits, session.config.vocab
        draft = DraftModel(worker.step, vocab, vocab, 4096, n_blocks, len(limits.windows))
        drafted = _grow(draft, asked, answers, rng)
        assert drafted > (300 if n_blocks == 200 else 20)
        draft.clear()
        assert draft._pool.free == n_blocks


def _grow(draft: DraftModel, asked: list[Request], answers: list[list[int]], rng: Any) -> int:
    sequences, drafted = [Sequence(one) for one in asked], 0
    while going := [
        (one, answer) for one, answer in zip(sequences, answers, strict=True) if not one.finish_reason
    ]:
        part = [going[i] for i in rng.permutation(len(going))[: rng.integers(1, len(going) + 1)]]
        capacities = [(one, min(int(rng.integers(1, 9)), 40 - one.generated)) for one, _ in part]
        for (one, answer), (_, capacity), tokens in zip(
            part, capacities, draft.draft(capacities), strict=True
        ):
            assert len(tokens) in (0, capacity)
            assert tokens == answer[one.generated :][: len(tokens)]
            drafted += len(tokens)
            for token in answer[one.generated :][: rng.integers(1, capacity + 2)]:
                one.append(token)
            if one.finish_reason:
                draft.forget(one)
    return drafted


def test_nothing_is_drafted_of_what_the_model_cannot_read() -> None:
    draft = DraftModel(lambda step: pytest.fail("nothing is to be computed"), 50, 50, 20, 100, 1)
    request = Request("a", (1, 2, 60), max_tokens=5)
    long = replace(request, prompt=tuple(range(18)))
    assert draft.draft([(Sequence(request), 3), (Sequence(long), 3)]) == [[], []]


def test_a_draft_model_must_have_the_models_tokens(tmp_path: Path) -> None:
    """The same tiny models with tokenizers of their own; one that has only more tokens behind them will do."""
    tiny = Tiny(vocab=300)
    models = {
        name: write_hf(tmp_path / name, tiny.weights(), tiny.config())
        for name in ("large", "same", "more", "other")
    }
    for name, words in (
        ("large", ["a", "b"]), ("same", ["a", "b"]), ("more", ["a", "b", "c"]), ("other", ["a", "c"])
    ):  # fmt: skip
        vocabulary = {word: id for id, word in enumerate(["<unk>", *words])}
        core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
        core.save(str(models[name] / "tokenizer.json"))

    def opened(name: str, **job: Any) -> int:
        spec = spec_of(models["large"], draft=DraftSection(model=str(models[name]), **job))
        with closing(Session(_alone(), spec, models["large"])) as session:
            assert session.draft_model is not None
            return rank_statistics(session).memory["draft"]

    assert opened("same") == opened("more") > 0
    with pytest.raises(JobError, match=r"different vocabulary .* token 2 is 'c' there and 'b' here"):
        opened("other")
    (models["same"] / "tokenizer.json").unlink()
    with pytest.raises(JobError, match="has no tokenizer and a vocabulary of 300"):
        opened("same")
    with pytest.raises(JobError, match=r"draft.kv = 100 is too small: 32 tokens take .*; raise it"):
        opened("more", kv=100)
    models["states"] = model_path("qwen3_next")
    with pytest.raises(JobError, match="no recurrent states"):
        opened("states")
