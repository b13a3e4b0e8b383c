"""A job's draft model (`[draft]`): whether the job uses it, and the memory that it takes on each replica's leader."""

from __future__ import annotations

from contextlib import closing
from functools import lru_cache

from mpillm.catalogue import models
from mpillm.engine.draft_model import ROWS
from mpillm.engine.speculation import DRAWN_ROWS
from mpillm.errors import JobError
from mpillm.kernels import KV_BLOCK
from mpillm.model.activations import activations_of
from mpillm.model.cache_layout import CacheLayout, blocks_needed, rank_layouts
from mpillm.model.cache_spec import SequenceState
from mpillm.model.config import ModelConfig
from mpillm.model.opening import config_of, open_described
from mpillm.partition.grid import Place
from mpillm.planning import memory
from mpillm.planning.input_needs import InputNeeds
from mpillm.spec import DraftSection, Spec, shown_bytes, unit_meant
from mpillm.weights.source import Source, rank_plans

WHOLE = Place(0, 1, 1)
KV_TYPE = "f16"


def drafts(spec: Spec, config: ModelConfig) -> bool:
    """Return whether a job has a draft model that its model can use."""
    usable = spec.batch.speculation in ("auto", "always") and config.generates
    return spec.draft.model is not None and usable and not _has_states(config)


def nbytes(spec: Spec, config: ModelConfig, asked: InputNeeds, stages: int) -> int:
    """Return the maximum bytes of a job's draft model on each rank that leads a replica of `stages` stages."""
    return _planned(spec.draft, spec.memory.max_context, asked, stages) if drafts(spec, config) else 0


@lru_cache(maxsize=8)
def _planned(section: DraftSection, max_context: int, asked: InputNeeds, stages: int) -> int:
    """Compute `nbytes`. A plan asks for the same value many times, so it is cached."""
    assert section.model is not None
    with closing(open_described(models.path_to_plan(section.model), section.quantize, again=True)) as source:
        return _nbytes(section, max_context, source, config_of(source), asked, stages)


def _has_states(config: ModelConfig) -> bool:
    return any(isinstance(kept, SequenceState) for layer in config.cache(WHOLE) for kept in layer)


def layout_of(section: DraftSection, source: Source, config: ModelConfig) -> CacheLayout:
    """Return the layout of a draft model's cache; JobError if the model cannot draft."""
    layout = rank_layouts(config, [WHOLE], KV_TYPE)[0]
    if not config.generates or _has_states(config) or not layout.windows:
        raise JobError(
            f"draft.model {source.path} cannot be a draft model: it must generate text and have no recurrent "
            "states; give another model, or none."
        )
    if section.kv_bytes // layout.block_nbytes < len(layout.windows):
        block = shown_bytes(len(layout.windows) * layout.block_nbytes)
        raise JobError(
            f"draft.kv = {section.kv} is too small: {KV_BLOCK} tokens take {block}; raise it{unit_meant(section.kv)}."
        )
    return layout


def blocks_of(
    section: DraftSection, max_context: int, layout: CacheLayout, asked: InputNeeds, stages: int
) -> int:
    """Return the number of blocks of the draft model's KV cache.

    It is the smallest of: the blocks that draft.kv holds, those that all sequences with drafts use at once, and those
    that all sequences of the input fill, with a block for the last tokens of each and one for the drafts after them.
    Half of DRAWN_ROWS can be sequences, because each has a row beside its draft, and each stage has a step under way.
    """
    groups, sequences = len(layout.windows), DRAWN_ROWS // 2 * stages
    useful = sequences * blocks_needed(min(max_context, asked.longest), [0] * groups)
    if asked.lines and asked.blocks is not None:
        useful = min(useful, groups * (asked.tokens // KV_BLOCK + 2 * asked.sequences))
    return max(min(section.kv_bytes // layout.block_nbytes, useful), groups)


def _nbytes(
    section: DraftSection,
    max_context: int,
    source: Source,
    config: ModelConfig,
    asked: InputNeeds,
    stages: int,
) -> int:
    layout = layout_of(section, source, config)
    held = [page.nbytes for page in rank_plans(config, WHOLE, source)]
    rows = memory.activations(
        activations_of(source, config), WHOLE, memory.Rows(ROWS, positions=max_context, copies=1)
    )
    cache = blocks_of(section, max_context, layout, asked, stages) * layout.block_nbytes
    return sum(held) + cache + rows + memory.loaded_model(source, held)
