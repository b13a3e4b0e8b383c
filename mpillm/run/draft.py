"""The job's draft model (`[draft]`): what it takes on the leader of each replica, and opening it there."""

from __future__ import annotations

from contextlib import ExitStack, closing
from functools import lru_cache

from mpillm.comm.collectives import Group, Pipe
from mpillm.comm.counters import MessageCounters
from mpillm.comm.world import World
from mpillm.engine.draft_model import ROWS, DraftModel
from mpillm.engine.engine import Worker
from mpillm.engine.speculation import DRAWN_ROWS
from mpillm.errors import JobError
from mpillm.kernels import KV_BLOCK
from mpillm.model.activations import activations_of
from mpillm.model.cache_layout import CacheLayout, blocks_needed, rank_layouts
from mpillm.model.cache_spec import SequenceState
from mpillm.model.config import ModelConfig
from mpillm.model.decoder import Decoder
from mpillm.model.kv import KVCache
from mpillm.model.opening import config_of, open_described, open_source
from mpillm.partition.grid import Place
from mpillm.run import catalogue, memory
from mpillm.spec import DraftSection, Spec, shown_bytes
from mpillm.text import load_tokenizer
from mpillm.weights.paging.weights import Weights
from mpillm.weights.source import Source, rank_plans

WHOLE = Place(0, 1, 1)
KV_TYPE = "f16"


def drafts(spec: Spec, config: ModelConfig) -> bool:
    """Whether a job has a draft model, and its model can use one."""
    usable = spec.batch.speculation in ("auto", "always") and config.generates
    return spec.draft.model is not None and usable and not _has_states(config)


def nbytes(spec: Spec, config: ModelConfig) -> int:
    """Bytes that the draft model of a job takes at most on each rank that leads a replica."""
    return _planned(spec.draft, spec.memory.max_context) if drafts(spec, config) else 0


@lru_cache(maxsize=1)
def _planned(section: DraftSection, max_context: int) -> int:
    """The same; a plan asks for it again and again."""
    assert section.model is not None
    with closing(open_described(catalogue.described(section.model), section.quantize)) as source:
        return _nbytes(section, max_context, source, config_of(source))


def open_draft_model(
    spec: Spec, large: Source, config: ModelConfig, world: World, threads: int, stack: ExitStack
) -> DraftModel | None:
    """The draft model beside a model and its source; None if the job has none. What must be closed goes to `stack`.

    JobError if it cannot draft for the model.
    """
    if not drafts(spec, config):
        return None
    assert spec.draft.model is not None
    source = open_source(catalogue.resolve(spec.draft.model), spec.draft.quantize)
    stack.callback(source.close)
    own = config_of(source)
    layout = _layout(spec.draft, source, own)
    _check_vocabularies(source, own.vocab, large, config.vocab)
    weights = Weights(
        rank_plans(own, WHOLE, source),
        lambda pages, streamed: source.open_loader(spec.memory.loader, threads, pages, streamed),
        chosen=own.expert_share,
    )
    stack.callback(weights.close)
    n_blocks = _blocks(spec.draft, spec.memory.max_context, layout)
    kv = KVCache(layout, n_blocks)
    stack.callback(kv.close)
    counters = MessageCounters()
    group, pipe = Group(world, WHOLE, "f32", counters, threads), Pipe(world, WHOLE, "f32", counters, threads)
    worker = Worker(Decoder(own, WHOLE, source, weights, kv, group, pipe, threads), 1, threads)
    return DraftModel(worker.step, own.vocab, config.vocab, own.max_position, n_blocks, len(layout.windows))


def _has_states(config: ModelConfig) -> bool:
    return any(isinstance(kept, SequenceState) for layer in config.cache(WHOLE) for kept in layer)


def _layout(section: DraftSection, source: Source, config: ModelConfig) -> CacheLayout:
    layout = rank_layouts(config, [WHOLE], KV_TYPE)[0]
    if not config.generates or _has_states(config) or not layout.windows:
        raise JobError(
            f"draft.model {source.path} cannot draft: only models that generate text and keep no states can; "
            "name another one, or none."
        )
    if section.kv_bytes // layout.block_nbytes < len(layout.windows):
        block = shown_bytes(len(layout.windows) * layout.block_nbytes)
        raise JobError(f"draft.kv = {section.kv} is too small: {KV_BLOCK} tokens take {block}; raise it.")
    return layout


def _blocks(section: DraftSection, max_context: int, layout: CacheLayout) -> int:
    """Of the KV cache: as many as draft.kv holds, or all sequences can use that are drafted for at once."""
    useful = DRAWN_ROWS * blocks_needed(max_context, [0] * len(layout.windows))
    return min(section.kv_bytes // layout.block_nbytes, useful)


def _nbytes(section: DraftSection, max_context: int, source: Source, config: ModelConfig) -> int:
    layout, held = (
        _layout(section, source, config),
        [page.nbytes for page in rank_plans(config, WHOLE, source)],
    )
    rows = memory.activations(activations_of(source, config), WHOLE, ROWS)
    cache = _blocks(section, max_context, layout) * layout.block_nbytes
    return sum(held) + cache + rows + memory.loaded_model(source, held)


def _check_vocabularies(draft: Source, draft_vocab: int, large: Source, large_vocab: int) -> None:
    """JobError unless both models mean the same by each token that both have."""
    one, other = load_tokenizer(draft.tokenizer), load_tokenizer(large.tokenizer)
    if one is None or other is None:
        if (one is None) != (other is None) or draft_vocab != large_vocab:
            raise JobError(
                f"draft.model {draft.path} has {'no tokenizer' if one is None else 'a tokenizer'} and a vocabulary of "
                f"{draft_vocab}, {large.path} {'none' if other is None else 'one'} and {large_vocab}; a draft model "
                "must have the model's own tokenizer."
            )
        return
    mine, its = one.vocabulary(), other.vocabulary()
    differ = [id for id in mine.keys() & its.keys() if mine[id] != its[id]]
    if differ or not mine.keys() & its.keys():
        first = min(differ, default=0)
        raise JobError(
            f"draft.model {draft.path} has another vocabulary than {large.path}: the token {first} is "
            f"{mine.get(first)!r} there and {its.get(first)!r} here; a draft model must have the model's own tokenizer."
        )
