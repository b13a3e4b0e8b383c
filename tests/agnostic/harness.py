"""A batch that uses every feature of the engine at once, and what must not change however it is run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mpillm.comm.world import World
from mpillm.engine.adjust import bits
from mpillm.engine.limits import Totals
from mpillm.engine.request import FinishedCompletion, PartialCompletion, Request
from mpillm.engine.worker import follow
from mpillm.kernels import KV_BLOCK
from mpillm.model.opening import config_of, open_source
from mpillm.run.session import Session
from mpillm.spec import DraftSection
from mpillm.spec.sections import Quantize
from mpillm.weights.paging.weights import minimum_budget
from tests.model.engine_harness import spec_of
from tests.model.golden import gguf_path, model_path
from tests.weights.build import Tiny, write_hf

Name = tuple[str, int]
Values = tuple[Any, ...]

# Dense, with experts, with a sliding window in all layers and in half of them, with latents, quantised (K-quants, and
# mixed): all decoders' code and KV of both types.
MODELS = ["llama3", "qwen3_moe", "mistral", "qwen2_window", "deepseek_v3", "llama_mixed.gguf"]


def path_of(model: str) -> Path:
    """Of a fixture, or of a directory that some test has made."""
    if "/" in model:
        return Path(model)
    return gguf_path(model.removesuffix(".gguf")) if model.endswith(".gguf") else model_path(model)


def write_mixed_windows(folder: Path) -> Path:
    """A model of twelve layers, of which every third sees all tokens: three groups of layers that share four pools."""
    tiny = Tiny(n_layers=12, vocab=300, qk_norm=True)
    kinds = ["full_attention" if layer % 3 == 2 else "sliding_attention" for layer in range(tiny.n_layers)]
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "layer_types": kinds}
    windows = {"use_sliding_window": True, "sliding_window": 20}
    return write_hf(folder, tiny.weights(), {**tiny.config(), **config, **windows})


def vocab_of(model: str) -> int:
    with closing(open_source(path_of(model))) as source:
        return config_of(source).vocab


def batch(vocab: int) -> list[Request]:
    """Requests of every kind, most of which begin with the same 70 tokens, in an order that mixes kinds."""
    rng = np.random.default_rng(5)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, vocab, count).tolist())

    system = ids(70)
    made = [Request(f"chat-{i}", system + ids(3 + 9 * i), max_tokens=8, logprobs=2) for i in range(4)]
    made += [
        Request("choices", system + ids(20), choice=i, max_tokens=10, temperature=1.0, logprobs=0)
        for i in range(3)
    ]
    made += [
        Request(f"score-{i}", system[: 70 - i] + ids(15), max_tokens=0, prompt_logprobs=3) for i in range(3)
    ]
    made += [
        Request("mean", system + ids(9), kind="embed", pooling="mean"),
        Request("last", system + ids(9), kind="embed", pooling="last"),
        Request("greedy", system, max_tokens=12),
        Request("twice", system[:64], max_tokens=4, logprobs=1),
        Request("twice", system[:64], choice=1, max_tokens=4, logprobs=1),
        Request("echo", ids(40), max_tokens=30, prompt_logprobs=1, logprobs=1, temperature=0.7, top_p=0.9),
        Request("penalty", ids(33), max_tokens=12, repetition_penalty=1.3, logprobs=4),
        Request("cold penalty", ids(31), max_tokens=6, repetition_penalty=1.3, temperature=0.4, min_p=0.05),
        Request("hot", system + ids(1), max_tokens=12, temperature=30.0, seed=3, logprobs=1),
        Request("top_k", ids(1), max_tokens=40, temperature=1.5, top_k=7),
        Request("stop", ids(5), max_tokens=40, temperature=2.0, stop_ids=frozenset(range(0, vocab, 9))),
    ]
    made += [Request(f"long-{i}", ids(20 + i), max_tokens=60) for i in range(4)]
    order = np.random.default_rng(6).permutation(len(made))
    adjusted = [
        Request("from", system + ids(30), max_tokens=0, prompt_logprobs=2, score_from=70),
        Request("from", system + ids(25), choice=1, max_tokens=0, prompt_logprobs=0, score_from=64),
        Request(
            "adjusted",
            system + ids(2),
            max_tokens=16,
            temperature=1.4,
            presence_penalty=0.7,
            frequency_penalty=0.4,
            logit_bias=((3, 4.0), (vocab - 1, 5.0)),
            bad_words=((3, 3), (vocab - 1, 3, 5)),
            logprobs=2,
        ),
        Request(
            "allowed",
            ids(12),
            max_tokens=16,
            temperature=2.0,
            top_p=0.9,
            repetition_penalty=1.2,
            frequency_penalty=-1.5,
            allowed=bits(frozenset(range(1, vocab, 3)), vocab),
            min_tokens=5,
            stop_ids=frozenset(range(0, vocab, 5)),
        ),
    ]
    return [*(made[i] for i in order), *adjusted]


def values(completion: FinishedCompletion) -> Values:
    """All that came out, every bit of it."""
    embedding = None if completion.embedding is None else completion.embedding.tobytes()
    return (
        completion.tokens, completion.finish_reason, completion.stop_id, completion.logprobs, completion.top,
        completion.prompt_logprobs, completion.prompt_top, embedding,
    )  # fmt: skip


@dataclass
class Outcome:
    """What a run gave, and what it took."""

    values: dict[Name, Values]
    totals: Totals
    rows: int  # in all steps
    uses: int  # of layers, by all steps
    session: Session  # rank 0's, closed


def run(
    world: World,
    model: Path,
    requests: Sequence[Request],
    kv_blocks: int = 0,
    streams: bool = False,
    draft: Quantize | None = None,
    **job: Any,
) -> Outcome:
    """Collective; the values are on rank 0.

    With `draft` the model drafts for itself, in that type.

    `kv_blocks` is the KV budget in blocks of all layers, 0 for a wide one; `streams` makes the weights' as small as it
    may be.
    """
    if draft is not None:
        job["draft"] = DraftSection(model=str(model), quantize=draft)
    if kv_blocks or streams:
        with closing(Session(world, spec_of(model, **job), model)) as session:
            if kv_blocks:
                job["kv"] = session.kv_token_nbytes * KV_BLOCK * kv_blocks
            if streams:
                job["weights"] = max(world.gather(minimum_budget(session.weights.pages)))
    with closing(Session(world, spec_of(model, **job), model)) as session:
        found: dict[Name, Values] = {}
        totals = Totals()
        rows = 0
        if world.rank > 0:
            follow(session.worker, session.channel)
        else:
            engine = session.engine()
            compute = session.worker.step

            def counted(step: Any) -> Any:
                nonlocal rows
                rows += sum(len(part.tokens) for part in step.chunks)
                return compute(step)

            session.worker.step = counted  # type: ignore[method-assign]
            for finished in engine.run(requests):
                found |= {(one.request.id, one.request.choice): values(one) for one in finished}
            engine.stop(0)
            totals = engine.totals
        world.barrier()
        cache = session.weights.cycle.counters
        return Outcome(found, totals, rows, cache.hits + cache.misses, session)


def run_in_pieces(
    world: World,
    model: Path,
    requests: Sequence[Request],
    seed: int,
    draft: Quantize | None = None,
    **job: Any,
) -> Outcome:
    """What `run` gives on one rank, where runs are broken off again and again and go on from what was saved."""
    if draft is not None:
        job["draft"] = DraftSection(model=str(model), quantize=draft)
    rng = np.random.default_rng(seed)
    found: dict[Name, Values] = {}
    saved: dict[Name, PartialCompletion] = {}
    totals = Totals()
    while todo := [one for one in requests if (one.id, one.choice) not in found]:
        resumed = [replace(one, resumed=saved.get((one.id, one.choice))) for one in todo]
        every = int(rng.integers(1, 9))
        with closing(Session(world, spec_of(model, **job), model)) as session:
            engine = session.engine(totals)
            for _, finished in zip(range(rng.integers(3, 25)), engine.run(resumed), strict=False):
                found |= {(one.request.id, one.request.choice): values(one) for one in finished}
                for request, start, more in engine.unsaved(every):
                    name = request.id, request.choice
                    saved[name] = saved.get(name, PartialCompletion(tokens=[])).continued(start, more)
    return Outcome(found, totals, 0, 0, session)
