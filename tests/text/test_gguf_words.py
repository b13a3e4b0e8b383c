"""WordPiece and unigrams from GGUF fields: the ids of the tokenizer.json that the fields were made of."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from mpillm.errors import ModelError
from mpillm.text import load_tokenizer
from tests.text.strings import STRINGS

SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL = 1, 2, 3
TEXT = """the quick brown fox jumps over the lazy dog, and then other foxes jump over the other dogs.
what is the capital of the country? the capital is a city. élan, naïve façade; 東京 is a city. один два
"""
MARKS = ("<s>", "</s>", "<unk>", "<pad>")
BRACKETED = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def word_pieces(lowercase: bool) -> Tokenizer:
    """A small tokenizer as BERT has it."""
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    text = TEXT if lowercase else TEXT + TEXT.title()
    core.train_from_iterator(
        [text], trainers.WordPieceTrainer(vocab_size=240, special_tokens=BRACKETED, show_progress=False)
    )
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, core.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return core


def fields_of_words(core: Tokenizer) -> dict[str, Any]:
    """What llama.cpp's converter writes of it."""
    tokens = sorted(core.get_vocab(), key=core.token_to_id)
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": [
            token if token in BRACKETED else token[2:] if token.startswith("##") else SPACE + token
            for token in tokens
        ],
        "tokenizer.ggml.token_type": [CONTROL if token in BRACKETED else NORMAL for token in tokens],
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.seperator_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.token_type_count": 2,
    }


def unigrams() -> Tokenizer:
    """A small tokenizer as XLM-RoBERTa has it."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    special = [AddedToken(token, special=True) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    core.train_from_iterator(
        [TEXT] * 3,
        trainers.UnigramTrainer(
            vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False
        ),
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return core


def fields_of_unigrams(core: Tokenizer) -> dict[str, Any]:
    pieces = core.get_vocab_size()
    tokens = [core.id_to_token(id) for id in range(pieces)]
    scores = dict(json.loads(core.to_str())["model"]["vocab"])
    kinds = {"<s>": CONTROL, "<pad>": CONTROL, "</s>": CONTROL, "<unk>": UNKNOWN}
    return {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [scores[token] for token in tokens],
        "tokenizer.ggml.token_type": [kinds.get(token, NORMAL) for token in tokens],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": True,
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.remove_extra_whitespaces": True,
    }


def check(core: Tokenizer, fields: Mapping[str, Any]) -> None:
    """Equal ids of texts and pairs, with and without what stands around them."""
    found = load_tokenizer(fields)
    assert found is not None
    core.encode_special_tokens = True
    texts = [TEXT, *TEXT.split("."), *(text for text in STRINGS if not any(mark in text for mark in MARKS))]
    for text in texts:
        for own in (True, False):
            assert found.encode(text, own) == core.encode(text, add_special_tokens=own).ids, text
    for one, other in itertools.pairwise(texts):
        pair = core.encode(one, other)
        second = pair.type_ids.index(1) if 1 in pair.type_ids else None
        assert found.encode_pair(one, other) == (pair.ids, second)
    for text in (mark for mark in MARKS if mark in core.get_vocab()):  # text is no control token
        around, bare = found.encode(text), found.encode(text, False)
        assert not set(bare) & (found.control_ids - {core.token_to_id("<unk>")})
        parsed = found.encode(text, False, parse_special=True)
        assert len(found.encode_pair(text, text)[0]) == 2 * len(parsed) + len(found.encode_pair("", "")[0])
        assert len(around) == len(bare) + 2


@pytest.mark.parametrize("lowercase", [True, False])
def test_word_pieces(lowercase: bool) -> None:
    core = word_pieces(lowercase)
    fields = fields_of_words(core)
    check(core, fields)
    if not lowercase:
        core.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
        more = {"normalizer.lowercase": True, "normalizer.strip_accents": False}
        check(core, fields | {f"tokenizer.ggml.{key}": value for key, value in more.items()})
    with pytest.raises(ModelError, match="has two tokens for one piece of a word"):
        load_tokenizer(
            fields | {"tokenizer.ggml.tokens": [*fields["tokenizer.ggml.tokens"][:-2], "[x]", SPACE + "[x]"]}
        )


def test_unigrams() -> None:
    core = unigrams()
    check(core, fields_of_unigrams(core))
    with pytest.raises(ModelError, match="cannot be used"):
        load_tokenizer({**fields_of_unigrams(core), "tokenizer.ggml.precompiled_charsmap": [1, 2, 3]})
