"""Numbers and names in sentences."""

from __future__ import annotations

import pytest

from mpillm.words import some_of, tokens_of


@pytest.mark.parametrize(
    ("prompt", "generated", "text"),
    [
        (7, 2, "7 prompt (3 shared) and 2 generated tokens"),
        (1, 1, "1 prompt (3 shared) and 1 generated token"),
        (7, 0, "7 prompt tokens (3 shared)"),
        (1, 0, "1 prompt token (3 shared)"),
        (0, 0, "0 prompt tokens (3 shared)"),
    ],
)
def test_scores_and_embeddings_have_no_generated_tokens(prompt: int, generated: int, text: str) -> None:
    assert tokens_of(prompt, generated, " (3 shared)") == text
    assert tokens_of(prompt, generated) == text.replace(" (3 shared)", "")


@pytest.mark.parametrize(
    ("names", "text"),
    [("a", "a"), ("ab", "a and b"), ("abc", "a, b and c"), ("abcd", "a, b and 2 other hosts")],
)
def test_a_list_of_names_is_short(names: str, text: str) -> None:
    assert some_of(list(names), "host") == text
