"""Tokenizers of tekken.json and of tiktoken files, beside an encoder that merges by ranks as tiktoken does."""

from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from mpillm.errors import ModelError
from mpillm.text import Tokenizer, load_tokenizer
from tests.text.strings import STRINGS

TEXT = (
    "the then there, 12345 tokens of a text; l'autre été déjà vu 你好世界 🙂 \n\n  and the rest of the texts"
)


def trained(words: str, count: int) -> dict[bytes, int]:
    """Ranks: all bytes, then what the most frequent pairs make, one after the other."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    pieces = [[bytes([byte]) for byte in word.encode()] for word in words.split(" ")]
    while len(ranks) < count:
        pairs = [pair for piece in pieces for pair in itertools.pairwise(piece)]
        best = max(sorted(set(pairs)), key=pairs.count)
        ranks.setdefault(b"".join(best), len(ranks))
        pieces = [merged(piece, {**ranks}) for piece in pieces]
    return ranks


def merged(piece: list[bytes], ranks: dict[bytes, int]) -> list[bytes]:
    """Merge, again and again, the first of the pairs whose token has the lowest rank."""
    while True:
        found = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(piece)) if a + b in ranks]
        if not found:
            return piece
        at = min(found)[1]
        piece = [*piece[:at], piece[at] + piece[at + 1], *piece[at + 2 :]]


RANKS = trained(TEXT, 290)


def expected(tokenizer: Tokenizer, text: str, first: int) -> list[int]:
    """Ids of a text, whose words the tokenizer's pattern cuts."""
    cut = tokenizer._core.pre_tokenizer.pre_tokenize_str(text)
    words = [text[begin:end].encode() for _, (begin, end) in cut]
    return [
        first + RANKS[token]
        for word in words
        for token in ([word] if word in RANKS else merged([bytes([byte]) for byte in word], RANKS))
    ]


def lines() -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in RANKS.items())


def tekken(folder: Path, **change: Any) -> Path:
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for token, rank in [*RANKS.items(), (b"beyond the vocabulary", len(RANKS))]
    ]
    special = [
        {"rank": i, "token_str": token, "is_control": True}
        for i, token in enumerate(("<unk>", "<s>", "</s>"))
    ]
    config = {"pattern": pattern, "default_vocab_size": len(RANKS) + 10, "default_num_special_tokens": 10}
    value = {"config": config, "vocab": vocab, "special_tokens": special, **change}
    (folder / "tekken.json").write_text(json.dumps(value))
    return folder


def check(tokenizer: Tokenizer, first: int) -> None:
    for text in (TEXT, *STRINGS):
        ids = tokenizer.encode(text, add_special=False)
        assert ids == expected(tokenizer, text, first), text
        assert tokenizer.decode(ids) == text


def test_tekken(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tekken(tmp_path))
    assert tokenizer is not None
    check(tokenizer, 10)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, len(RANKS) + 10)
    assert tokenizer.encode("the")[0] == 1
    assert tokenizer.encode("</s>", parse_special=True) == [1, 2]
    assert 2 not in tokenizer.encode("</s>")
    assert tokenizer.end_ids == {2}


def test_tekken_that_lists_no_special_tokens(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="lists no special tokens, as versions before 7 did not"):
        load_tokenizer(tekken(tmp_path, special_tokens=None))
    with pytest.raises(ModelError, match="cannot be used: KeyError"):
        load_tokenizer(tekken(tmp_path, config={}))


@pytest.mark.parametrize("name", ["tiktoken.model", "tokenizer.tiktoken", "tokenizer.model"])
def test_tiktoken(name: str, tmp_path: Path) -> None:
    """Special tokens are those of the configuration, and reserved ones between them."""
    (tmp_path / name).write_bytes(lines())
    first = len(RANKS)
    listed = {
        str(first): {"content": "[BOS]", "special": True},
        str(first + 3): {"content": "[EOS]", "special": True},
    }
    config = {"added_tokens_decoder": listed, "bos_token": "[BOS]", "eos_token": "[EOS]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    check(tokenizer, 0)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (first, first + 3)
    assert tokenizer.control_ids == set(range(first, first + 4))
    assert tokenizer.encode("the[EOS]", parse_special=True)[-1] == first + 3


def test_qwen(tmp_path: Path) -> None:
    (tmp_path / "qwen.tiktoken").write_bytes(lines())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    check(tokenizer, 0)
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (len(RANKS), len(RANKS) + 208)
    assert tokenizer.encode("<|im_end|>", parse_special=True) == [len(RANKS) + 2]


def test_a_line_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "tiktoken.model").write_bytes(lines() + b"oops\n")
    with pytest.raises(ModelError, match=f"line {len(RANKS) + 1}, is not a token in base64 with its rank"):
        load_tokenizer(tmp_path)
