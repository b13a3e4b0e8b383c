"""The memory of a draft model."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

from mpillm.engine.speculation import DRAWN_ROWS
from mpillm.kernels import KV_BLOCK
from mpillm.model.opening import config_of, open_source
from mpillm.planning import draft
from mpillm.planning.input_needs import NO_INPUT, InputNeeds
from mpillm.spec import DraftSection
from tests.job_helpers import CHAT


def test_the_cache_of_a_draft_model_has_no_more_blocks_than_the_input_can_use() -> None:
    """Those of all tokens, one for the last tokens of each sequence and one for drafts behind them; and no more than
    the longest sequences that can draft at once: each has a row of its own in a step, and a row for a draft."""
    section = DraftSection(model=str(CHAT))
    with closing(open_source(CHAT, "none")) as source:
        config = config_of(source)
        layout = draft.layout_of(section, source, config)
    groups = len(layout.windows)

    def blocks(asked: InputNeeds, stages: int = 1) -> int:
        return draft.blocks_of(section, config.max_position, layout, asked, stages)

    two = InputNeeds(lines=2, sequences=2, blocks=3, tokens=3 * KV_BLOCK)
    assert blocks(two) == groups * (3 + 2 * 2)
    many = InputNeeds(lines=9, sequences=10**6, blocks=10**9, tokens=10**9)
    assert blocks(many) == blocks(NO_INPUT) > blocks(two)
    assert blocks(InputNeeds(lines=2, sequences=2, blocks=None)) == blocks(NO_INPUT), "it is not known"
    short = replace(many, longest=KV_BLOCK + 1)
    assert blocks(short) == groups * DRAWN_ROWS // 2 * 2 < blocks(many)
    assert blocks(short, stages=3) == 3 * blocks(short)
