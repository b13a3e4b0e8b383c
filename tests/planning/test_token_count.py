"""How many tokens the texts of an input are, and the memory that they fill."""

from __future__ import annotations

import json
from pathlib import Path

from mpillm.model.spill import HUGE_PAGE, new_pool
from mpillm.planning.token_count import COUNTED, TokenCounter
from mpillm.text import load_tokenizer
from tests.text.vocabularies import write_directory


def test_texts_of_a_small_input_are_tokenized(tmp_path: Path) -> None:
    """Behind the first MiB their ratio is an estimate, and their bytes a bound."""
    tokenizer = load_tokenizer(write_directory(tmp_path, "qwen2"))
    assert tokenizer is not None
    text = "the a the a " * 800
    each = len(tokenizer.encode(text))
    assert each < len(text) // 2
    counter = TokenCounter(lambda: tokenizer)
    assert counter.count(json.dumps([text, {"content": text, "role": 5}]).encode())[:2] == (
        2 * each,
        2 * each,
    )
    assert counter.count(b'["\\ud800"]')[:2] == (0, 10), "an error of its line"
    for _ in range(COUNTED // len(text)):
        found = counter.count(json.dumps(text).encode())
    assert each * 0.9 < found.likely <= each < len(text) < found.maximum


def test_pools_in_huge_pages_begin_at_one() -> None:
    """So that what is touched is what `cache_in_memory` counts."""
    for pool in new_pool(600, (2**14, 2**13 + 32)):
        assert pool.ctypes.data % HUGE_PAGE == 0
        assert len(pool) == 600
        assert not pool.any()
