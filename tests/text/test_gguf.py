"""Tokenizers built from GGUF fields against llama.cpp's ids (goldens; see make_goldens)."""

from __future__ import annotations

import logging
import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from mpillm.text import Tokenizer, load_tokenizer
from tests.text import vocabularies
from tests.text.digests import digest
from tests.text.strings import STRINGS

GOLDEN: dict[str, list[str]] = vocabularies.data("llamacpp_ids.json")

# llama.cpp approximates these expressions without \p{M}; we split as the models' own tokenizers do.
WITHOUT_MARKS = {"tekken", "gpt-4o", "kimi-k2"}


def load(fields: dict[str, Any]) -> Tokenizer:
    tokenizer = load_tokenizer(fields)
    assert tokenizer is not None
    return tokenizer


def has_mark(text: str) -> bool:
    return any(unicodedata.category(char).startswith("M") for char in text)


@pytest.mark.parametrize("special", [False, True], ids=["text", "special"])
@pytest.mark.parametrize("name", vocabularies.ALL)
def test_ids_are_llama_cpps(name: str, special: bool) -> None:
    tokenizer = load(vocabularies.ALL[name]())
    golden = GOLDEN[name + ("+special" if special else "")]
    wrong = [
        text
        for text, ids in zip(STRINGS, golden, strict=True)
        if digest(tokenizer.encode(text, parse_special=special)) != ids
        and not (name in WITHOUT_MARKS and has_mark(text))
        # The other digits depend on the locale.
        and not (name == "tiny_aya" and re.search("[^\\D0-9]", text))
    ]
    assert wrong == []


def test_qwen35_differs_from_qwen2_in_marks_alone() -> None:
    newer, older = (load(vocabularies.byte_level_fields(pre)) for pre in ("qwen35", "qwen2"))
    for text in STRINGS:
        assert newer.decode(newer.encode(text)) == text
        if not has_mark(text):
            assert newer.encode(text) == older.encode(text)


@pytest.mark.parametrize("special", [False, True], ids=["text", "special"])
def test_ids_of_the_default_model(smollm2: Tokenizer, special: bool) -> None:
    golden = GOLDEN["smollm2" + ("+special" if special else "")]
    found = [digest(smollm2.encode(text, parse_special=special)) for text in STRINGS]
    assert found == golden
    assert smollm2.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert smollm2.vocab_size == 49152
    assert (smollm2.bos_id, smollm2.eos_id) == (1, 2)
    assert smollm2.end_ids == {0, 2, 4}  # <|endoftext|>, <|im_end|>, <reponame>: llama.cpp's list


def test_sentencepiece_itself_agrees() -> None:
    tokenizer = load(vocabularies.sentencepiece_fields(True))
    golden = vocabularies.data("sentencepiece_ids.json")
    wrong = [
        text
        for text, ids in zip(STRINGS, golden, strict=True)
        if digest(tokenizer.encode(text, add_special=False)) != ids
    ]
    # SentencePiece puts its space before a user-defined token, too; llama.cpp and transformers do not.
    assert wrong == ["<think>\nhm\n</think>\n\nyes"]


@pytest.mark.parametrize("name", ["llama-bpe", "llama"])
def test_fields_of_a_file(name: str, tmp_path: Path) -> None:
    """The gguf library's own field objects give what plain values give."""
    fields = vocabularies.ALL[name]() | {"tokenizer.chat_template": "{{ messages[0].content }}"}
    vocabularies.write_gguf(tmp_path / "m.gguf", fields)
    read, plain = load(dict(GGUFReader(tmp_path / "m.gguf").fields)), load(fields)
    assert read.encode_chat([{"role": "user", "content": "Hello"}]) == plain.encode(
        "Hello", add_special=False
    )
    for text in STRINGS[:40]:
        assert read.encode(text) == plain.encode(text)
        assert read.decode(read.encode(text)) == plain.decode(plain.encode(text))


def test_texts_come_back(smollm2: Tokenizer) -> None:
    byte_level, spm = (
        load(vocabularies.byte_level_fields("qwen2")),
        load(vocabularies.sentencepiece_fields(True)),
    )
    for text in STRINGS:
        assert byte_level.decode(byte_level.encode(text)) == text
        if (
            "\u2581" not in text and "<think>" not in text
        ):  # the one it cannot tell from a space, one is put after the other
            assert spm.decode(spm.encode(text)) == text
    for text in STRINGS[:17]:
        assert smollm2.decode(smollm2.encode(text)) == text


def test_a_hundred_thousand_characters() -> None:
    for fields in (vocabularies.byte_level_fields("smollm"), vocabularies.sentencepiece_fields(True)):
        tokenizer = load(fields)
        for text in ("ab c1 " * 16_700, "x" * 100_000, " " * 100_000, "\u4f60\u597d" * 50_000):
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bos_and_eos() -> None:
    fields = vocabularies.byte_level_fields("qwen2")
    plain = load(fields).encode("Hi")
    bos, eos = fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]
    both = load(fields | {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True})
    assert both.encode("Hi") == [bos, *plain, eos]
    assert both.encode("Hi", add_special=False) == plain
    del fields["tokenizer.ggml.add_bos_token"]
    assert load(fields).encode("Hi") == plain
    assert load(fields | {"tokenizer.ggml.pre": "llama3"}).encode("") == [bos]
    del fields["tokenizer.ggml.bos_token_id"]
    assert load(fields | {"tokenizer.ggml.pre": "llama3"}).encode("") == []


def test_names_and_ids_that_end() -> None:
    fields = vocabularies.byte_level_fields("qwen2")
    tokens = fields["tokenizer.ggml.tokens"]
    types = list(fields["tokenizer.ggml.token_type"])
    types[tokens.index("<|im_end|>")] = 1  # some converters leave it a normal token
    fields |= {"tokenizer.ggml.token_type": types, "tokenizer.ggml.eot_token_id": tokens.index("[INST]")}
    fields["tokenizer.ggml.eos_token_id"] = tokens.index("</s>")
    tokenizer = load(fields)
    names = {tokens[id] for id in tokenizer.end_ids}
    assert names == {"</s>", "<|im_end|>", "<|endoftext|>", "[INST]"}
    assert tokenizer.is_control(tokens.index("<|im_end|>"))


@pytest.mark.parametrize("unset", [-1, 2**32 - 1, np.int32(-1), np.uint32(2**32 - 1)])
def test_ids_that_are_not_set(unset: Any) -> None:
    """-1, as signed and as unsigned, means that there is no such token."""
    fields = vocabularies.byte_level_fields("qwen2")
    without = {key: value for key, value in fields.items() if not key.endswith("_token_id")}
    names = ("bos", "eos", "eot", "eom", "unknown", "padding", "seperator")
    tokenizer = load(without | {f"tokenizer.ggml.{name}_token_id": unset for name in names})
    assert tokenizer.end_ids == load(without).end_ids
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, None)
    small = vocabularies.sentencepiece_fields(True)
    assert load(small | {"tokenizer.ggml.eos_token_id": unset}).eos_id == 2, "llama.cpp's default"


def test_ids_that_nobody_uses() -> None:
    fields = vocabularies.byte_level_fields("qwen2")
    tokenizer = load(
        fields | {"tokenizer.ggml.padding_token_id": 710, "tokenizer.ggml.seperator_token_id": 2**31}
    )
    assert tokenizer.encode("Hi") == load(fields).encode("Hi")


def test_a_file_without_a_pre_tokenizer_says_so(caplog: pytest.LogCaptureFixture) -> None:
    fields = vocabularies.byte_level_fields("default")
    del fields["tokenizer.ggml.pre"]
    with caplog.at_level(logging.WARNING):
        tokenizer = load(fields)
    assert "names no pre-tokenizer (tokenizer.ggml.pre): 'default' is used" in caplog.text
    assert tokenizer.encode("a1234!") == load(vocabularies.byte_level_fields("default")).encode("a1234!")


def test_no_tokenizer() -> None:
    assert load_tokenizer(None) is None
    assert load_tokenizer({"general.architecture": "llama"}) is None
    assert load_tokenizer({"tokenizer.ggml.model": "no_vocab"}) is None
