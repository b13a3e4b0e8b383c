"""Opening the job's draft model on the leader of a replica."""

from __future__ import annotations

from contextlib import ExitStack

from mpillm.catalogue import models
from mpillm.comm.channel import Pipe
from mpillm.comm.collectives import Group
from mpillm.comm.counters import MessageCounters
from mpillm.comm.world import World
from mpillm.engine.draft_model import DraftModel
from mpillm.engine.worker import Worker
from mpillm.errors import JobError
from mpillm.model.config import ModelConfig
from mpillm.model.decoder import Decoder
from mpillm.model.kv import KVCache
from mpillm.model.opening import config_of, open_source
from mpillm.planning.draft import WHOLE, blocks_of, drafts, layout_of
from mpillm.planning.input_needs import InputNeeds
from mpillm.spec import Spec
from mpillm.text import load_tokenizer
from mpillm.weights.paging.weights import Weights
from mpillm.weights.source import Source, rank_plans


def open_draft_model(
    spec: Spec,
    large: Source,
    config: ModelConfig,
    world: World,
    threads: int,
    stack: ExitStack,
    asked: InputNeeds,
    stages: int,
) -> DraftModel | None:
    """Open the job's draft model for the model `large`; return None if the job has none.

    `stack` closes what must be closed; `asked` are the needs of the input, `stages` those of the replica. Raises
    JobError if the draft model cannot draft for the model.
    """
    if not drafts(spec, config):
        return None
    assert spec.draft.model is not None
    source = open_source(models.resolve(spec.draft.model), spec.draft.quantize, again=True)
    stack.callback(source.close)
    own = config_of(source)
    layout = layout_of(spec.draft, source, own)
    _check_vocabularies(source, own.vocab, large, config.vocab)
    weights = Weights(
        rank_plans(own, WHOLE, source),
        lambda pages, streamed: source.open_loader(spec.memory.loader, threads, pages, streamed),
        chosen=own.expert_share,
    )
    stack.callback(weights.close)
    n_blocks = blocks_of(spec.draft, spec.memory.max_context, layout, asked, stages)
    kv = KVCache(layout, n_blocks)
    stack.callback(kv.close)
    counters = MessageCounters()
    group, pipe = Group(world, WHOLE, "f32", counters, threads), Pipe(world, WHOLE, "f32", counters, threads)
    worker = Worker(Decoder(own, WHOLE, source, weights, kv, group, pipe, threads), 1, threads)
    return DraftModel(worker.step, own.vocab, config.vocab, own.max_position, n_blocks, len(layout.windows))


def _check_vocabularies(draft: Source, draft_vocab: int, large: Source, large_vocab: int) -> None:
    """Raise JobError unless the tokens that both models have are the same."""
    one, other = load_tokenizer(draft.tokenizer), load_tokenizer(large.tokenizer)
    if one is None or other is None:
        if (one is None) != (other is None) or draft_vocab != large_vocab:
            raise JobError(
                f"draft.model {draft.path} has {'no tokenizer' if one is None else 'a tokenizer'} and a "
                f"vocabulary of {draft_vocab}, {large.path} {'none' if other is None else 'one'} and "
                f"{large_vocab}; a draft model must have the same tokenizer as the model."
            )
        return
    mine, its = one.vocabulary(), other.vocabulary()
    differ = [id for id in mine.keys() & its.keys() if mine[id] != its[id]]
    if differ or not mine.keys() & its.keys():
        first = min(differ, default=0)
        raise JobError(
            f"draft.model {draft.path} has a different vocabulary from {large.path}: the token {first} is "
            f"{mine.get(first)!r} there and {its.get(first)!r} here; a draft model must have the same "
            "tokenizer as the model."
        )
