"""A job's draft model (`[draft]`): whether it is of use, and what it takes on the leader of each replica."""

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
    """Whether a job has a draft model, and its model can use one."""
    usable = spec.batch.speculation in ("auto", "always") and config.generates
    return spec.draft.model is not None and usable and not _has_states(config)


def nbytes(spec: Spec, config: ModelConfig, asked: InputNeeds, stages: int) -> int:
    """Bytes that the draft model of a job takes at most on each rank that leads a replica of so many stages, for what
    its input asks."""
    return _planned(spec.draft, spec.memory.max_context, asked, stages) if drafts(spec, config) else 0


@lru_cache(maxsize=8)
def _planned(section: DraftSection, max_context: int, asked: InputNeeds, stages: int) -> int:
    """Compute `nbytes`, which a plan asks for again and again."""
    assert section.model is not None
    with closing(open_described(models.path_to_plan(section.model), section.quantize, again=True)) as source:
        return _nbytes(section, max_context, source, config_of(source), asked, stages)


def _has_states(config: ModelConfig) -> bool:
    return any(isinstance(kept, SequenceState) for layer in config.cache(WHOLE) for kept in layer)


def layout_of(section: DraftSection, source: Source, config: ModelConfig) -> CacheLayout:
    """The layout of a draft model's cache; JobError if it cannot draft."""
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
    """Return the blocks of the KV cache: as many as draft.kv holds, as all sequences with drafts use at once, or as all
    of the input's fill, with one each for the last tokens and one for drafts behind them.

    A sequence has a row of its own beside each draft, and there are steps under way for each of the stages.
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
