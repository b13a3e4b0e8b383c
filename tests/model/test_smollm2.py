"""SmolLM2-135M against llama.cpp, on one rank. Skipped where the model is neither at hand nor to be had."""

from __future__ import annotations

import functools
import json
import math
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpillm.bench.speculation import TEXTS
from mpillm.catalogue.models import resolve
from mpillm.engine.request import FinishedCompletion, Request
from mpillm.engine.speculation import Mode
from mpillm.errors import MpillmError
from mpillm.run.session import Session
from mpillm.spec import DraftSection
from tests.model.engine_harness import _alone, run_engine, spec_of

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent.parent / "data/smollm2.json").read_text())
MODES: tuple[Mode, ...] = ("off", "prompt-lookup", "always")
SURE = 0.5  # llama.cpp quantises activations its own way: a smaller lead may turn


@functools.cache
def smollm2() -> Path:
    """The GGUF file, pulled if need be."""
    try:
        return resolve("smollm2-135m")
    except MpillmError as error:
        pytest.skip(f"SmolLM2 is not at hand: {error}")


def requests() -> list[Request]:
    """The chunks to score and the prompts to continue."""
    scored = [
        Request(id=f"chunk-{i}", prompt=tuple(chunk["ids"]), max_tokens=0, prompt_logprobs=0)
        for i, chunk in enumerate(GOLDEN["chunks"])
    ]
    continued = [
        Request(
            id=f"greedy-{i}",
            prompt=tuple(greedy["prompt_ids"]),
            max_tokens=len(greedy["out_ids"]),
            logprobs=0,
        )
        for i, greedy in enumerate(GOLDEN["greedy"])
    ]
    return scored + continued


def check_smollm2(completions: list[FinishedCompletion]) -> dict[str, float]:
    """Assert what the reference promises, for any layout and wire; returns how far off the run was."""
    by_id = {completion.request.id: completion for completion in completions}
    theirs = np.concatenate([chunk["logprob"][1:] for chunk in GOLDEN["chunks"]])
    ours = np.concatenate([by_id[f"chunk-{i}"].prompt_logprobs for i in range(len(GOLDEN["chunks"]))])
    assert ours.shape == theirs.shape
    perplexity = math.exp(-ours.mean()) / math.exp(-theirs.mean()) - 1
    difference = float(np.abs(ours - theirs).mean())
    assert abs(perplexity) < 0.01, f"perplexity is off by {100 * perplexity:.2f} %"
    assert difference < 0.12, f"log-probabilities differ by {difference:.3f} on average"
    for i, greedy in enumerate(GOLDEN["greedy"]):
        margins = greedy["top1_minus_top2_logit"]
        sure = next((n for n, margin in enumerate(margins) if margin < SURE), len(margins))
        assert by_id[f"greedy-{i}"].tokens[:sure] == greedy["out_ids"][:sure]
    return {"perplexity": perplexity, "logprob": difference}


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["f32", "q8_0"])
def test_against_llama_cpp(activations: str) -> None:
    check_smollm2(run_engine(smollm2(), requests(), activations=activations))


@pytest.mark.slow
def test_copied_texts_take_few_passes() -> None:
    """The counts behind the tokens of a pass that a real model's answers reach, with their bytes unchanged."""
    path = smollm2()
    job = {"draft": DraftSection(model=str(path), quantize="q4_0"), "max_num_seqs": 1, "max_context": 512}
    with closing(Session(_alone(), spec_of(path, **job), path)) as session:
        assert session.tokenizer is not None
        per_pass = {}
        for name in ("summary", "extraction"):
            asked = Request("a", tuple(session.tokenizer.encode(TEXTS[name])), max_tokens=96)
            answers = set()
            for mode in MODES:
                engine = session.engine(speculation=mode)
                answers |= {tuple(one.tokens) for done in engine.run([asked]) for one in done}
                per_pass[name, mode] = engine.totals.generated_tokens / engine.totals.turns
            assert len(answers) == 1, name
            assert per_pass[name, "off"] == 1.0
            assert per_pass[name, "prompt-lookup"] >= 2.0, per_pass
            assert per_pass[name, "always"] >= 3.0, per_pass  # with a copy of the model in fewer bits
