"""Makes draws.json: of each body the distribution from which transformers draws the next token, on the tiny chat model.

python -m tests.batch.make_draws      where torch and transformers are installed
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("draws.json")
MODEL = Path(__file__).parent.parent / "fixtures/models/chat"
PROMPT = [5, 40, 17, 40, 9, 33]
# What a body asks for, by its keys.
BODIES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.4},
    {"temperature": 2.5},
    {"top_k": 5},
    {"top_p": 0.5},
    {"temperature": 0.5, "min_p": 0.2},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"repetition_penalty": 1.8},
    {"logit_bias": {"40": 5.0, "7": 4.0, "11": -100}},
    {"allowed_token_ids": [3, 7, 11, 40]},
    {"temperature": 0.6, "repetition_penalty": 0.7, "allowed_token_ids": list(range(5, 60, 2))},
]


def main() -> None:
    import torch
    import transformers
    from transformers.generation import logits_process as of

    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ids = torch.tensor([PROMPT])
    found = []
    for body in BODIES:
        steps: list[Any] = []
        if "repetition_penalty" in body:
            steps.append(of.RepetitionPenaltyLogitsProcessor(body["repetition_penalty"]))
        if "logit_bias" in body:
            biases = {(int(token),): float(bias) for token, bias in body["logit_bias"].items()}
            steps.append(of.SequenceBiasLogitsProcessor(biases))
        if "allowed_token_ids" in body:
            others = set(range(model.config.vocab_size)) - set(body["allowed_token_ids"])
            steps.append(of.SuppressTokensLogitsProcessor(sorted(others)))
        if "temperature" in body:
            steps.append(of.TemperatureLogitsWarper(body["temperature"]))
        if "top_k" in body:
            steps.append(of.TopKLogitsWarper(body["top_k"]))
        if "top_p" in body:
            steps.append(of.TopPLogitsWarper(body["top_p"]))
        if "min_p" in body:
            steps.append(of.MinPLogitsWarper(body["min_p"]))
        with torch.no_grad():
            logits = model(ids).logits[:, -1]
        p = torch.softmax(of.LogitsProcessorList(steps)(ids, logits).double(), -1)[0]
        found.append({str(token): round(float(p[token]), 7) for token in p.nonzero()[:, 0].tolist()})
    FILE.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
