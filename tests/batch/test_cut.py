"""`truncate_prompt_tokens` of a text that is far longer than what it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mpillm.text import encode, tokenizer
from mpillm.text.bounds import CHUNK, End
from tests.job_helpers import WITH_TEXT, works

TEXT = "the quick brown fox jumps over a lazy dog while seven wizards box " * 3000


@pytest.mark.parametrize(
    "body",
    [
        ({"prompt": TEXT, "max_tokens": 1}),
        ({"prompt": TEXT, "max_tokens": 1, "truncation_side": "right"}),
        ({"messages": [{"role": "user", "content": TEXT}], "max_tokens": 1}),
        ({"input": TEXT}),
    ],
)
def test_only_its_end_is_encoded(
    body: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left is the same as of the whole text."""
    lengths = []
    plain = encode.encoding

    def noted(core: Any, text: Any, *more: Any, **named: Any) -> Any:
        lengths.append(len(text))
        return plain(core, text, *more, **named)

    whole = WITH_TEXT.text
    assert whole is not None
    expected = whole.encode(TEXT, False)
    monkeypatch.setattr(encode, "encoding", noted)
    monkeypatch.setattr(tokenizer, "encoding", noted)
    (work,) = works(tmp_path, body | {"truncate_prompt_tokens": 40})
    (request,) = work.requests
    assert len(request.prompt) == 40
    assert max(lengths) < CHUNK + 1000
    inner, all_ids = (" ".join(map(str, ids)) for ids in (request.prompt[2:38], expected))
    assert ("messages" in body) or inner in all_ids


def test_an_end_of_pieces() -> None:
    pieces = [("<s>", True), ("abcdef", False), ("</s>", True), ("gh", False)]
    assert End(4, last=True).of_pieces(pieces) == [("</s>", True), ("gh", False)]
    assert End(8, last=True).of_pieces(pieces) == [("ef", False), ("</s>", True), ("gh", False)]
    assert End(5, last=False).of_pieces(pieces) == [("<s>", True), ("ab", False)]
    assert End(100, last=False).of_pieces(pieces) == pieces
