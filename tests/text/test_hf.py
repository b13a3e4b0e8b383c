"""Tokenizers of Hugging Face directories against transformers (goldens; see make_goldens)."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Core

from mpillm.text import IncrementalDecoder, Tokenizer, load_tokenizer
from tests.text import vocabularies
from tests.text.asked import render_chat
from tests.text.digests import digest
from tests.text.strings import PLAIN, STRINGS
from tests.text.vocabularies import STYLES, write_directory

GOLDEN: dict[str, Any] = vocabularies.data("transformers.json")


def load(folder: Path) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize("style", STYLES)
def test_ids_and_texts_are_transformers(style: str, tmp_path: Path) -> None:
    tokenizer = load(write_directory(tmp_path, style))
    golden = GOLDEN["strings"][style]
    for text, ids, decoded in zip(STRINGS, golden["ids"], golden["texts"], strict=True):
        found = tokenizer.encode(text, parse_special=True)
        assert digest(found) == ids, text
        assert digest([ord(char) for char in tokenizer.decode(found)]) == decoded, text
    for text in PLAIN:
        assert tokenizer.encode(text) == tokenizer.encode(text, parse_special=True), text


@pytest.mark.parametrize("style", STYLES)
def test_special_tokens_in_text_stay_text(style: str, tmp_path: Path) -> None:
    tokenizer = load(write_directory(tmp_path, style))
    for text in ("<|im_end|>", "a <|im_start|>b</s><s>", "<|im_<|im_end|>end|>", "<|endoftext|>" * 3):
        for add in (True, False):
            ids = tokenizer.encode(text, add_special=add)
            around = tokenizer.encode("", add_special=add)
            assert [id for id in ids if tokenizer.is_control(id)] == around
            assert tokenizer.decode(ids) == text
    text = tokenizer.decode(tokenizer.encode("<think>a"))  # an added token, but a word
    assert text == ("<think> a" if style == "llama2" else "<think>a")


def change(folder: Path, name: str, **fields: Any) -> None:
    path = folder / name
    value = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(value | fields))


def test_what_ends_a_generation(tmp_path: Path) -> None:
    folder = write_directory(tmp_path, "qwen2")  # eos_token is <|im_end|>
    core = Core.from_file(str(folder / "tokenizer.json"))
    id = {name: core.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>", "</s>", "[INST]")}
    assert load(folder).end_ids == {id["<|im_end|>"], id["<|endoftext|>"]}  # by name, as nothing else is said
    change(folder, "config.json", eos_token_id=id["</s>"])
    assert load(folder).end_ids == {id["<|im_end|>"], id["<|endoftext|>"], id["</s>"]}
    change(folder, "generation_config.json", eos_token_id=[id["[INST]"], id["<|im_end|>"]])
    assert load(folder).end_ids == {id["[INST]"], id["<|im_end|>"]}
    change(folder, "generation_config.json", eos_token_id=id["</s>"])
    assert load(folder).end_ids == {id["</s>"], id["<|im_end|>"]}


def test_named_tokens_of_either_file(tmp_path: Path) -> None:
    folder = write_directory(tmp_path, "llama3")
    core = Core.from_file(str(folder / "tokenizer.json"))
    change(folder, "special_tokens_map.json", eos_token={"content": "</s>"}, bos_token="<s>")
    change(folder, "tokenizer_config.json", eos_token=None)
    tokenizer = load(folder)
    assert tokenizer.bos_id == core.token_to_id("<|endoftext|>")  # tokenizer_config.json wins
    assert tokenizer.eos_id is None  # and its null means none


def test_tokens_that_only_the_configuration_adds(tmp_path: Path) -> None:
    folder = write_directory(tmp_path, "qwen2")
    next_id = load(folder).vocab_size
    added = {"content": "<|extra|>", "special": True, "lstrip": False, "rstrip": False, "single_word": False}
    change(folder, "tokenizer_config.json", added_tokens_decoder={str(next_id): added})
    tokenizer = load(folder)
    assert tokenizer.encode("a<|extra|>", parse_special=True)[-1] == next_id
    assert next_id not in tokenizer.encode("a<|extra|>")
    assert tokenizer.vocab_size == next_id + 1


def test_control_tokens_that_are_not_marked_as_special(tmp_path: Path) -> None:
    """OpenHermes has an <|im_start|> that is an ordinary added token: its look says what it is."""
    folder = write_directory(tmp_path, "qwen2")
    state = json.loads((folder / "tokenizer.json").read_text())
    for token in state["added_tokens"]:
        token["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(state))
    tokenizer = load(folder)
    whole, text = (tokenizer.encode("<|im_start|>a", parse_special=parse) for parse in (True, False))
    assert len(whole) == 2
    assert len(text) > 5
    assert tokenizer.decode(whole) == "a"


def test_control_tokens_that_merges_reach(tmp_path: Path) -> None:
    """SentencePiece vocabularies hold "<s>" as a piece, too; a text that spells it gets its characters."""
    vocab = {piece: id for id, piece in enumerate(["<unk>", "<s>", "<", "s", ">", "<s", "a", "as"])}
    core = Core(models.BPE(vocab=vocab, merges=[("<", "s"), ("<s", ">"), ("a", "s")], unk_token="<unk>"))
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>")])
    core.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load(tmp_path)
    assert tokenizer.encode("as<s>a", parse_special=True) == [7, 1, 6]
    assert tokenizer.encode("as<s>a") == [7, 2, 3, 4, 6]
    assert tokenizer.encode("a?") == [6, 0], "what the vocabulary lacks is its unknown token all the same"


def test_a_pad_token_that_is_a_word(tmp_path: Path) -> None:
    tokenizer = load(write_directory(tmp_path / "a", "qwen2"))
    padded = load(write_directory(tmp_path / "b", "qwen2", pad_token="!", extra_special_tokens=7))
    assert padded.encode("Hi! All!") == tokenizer.encode("Hi! All!")
    assert padded.decode(padded.encode("Hi!")) == "Hi!"


def test_chat_templates_by_file_and_name(tmp_path: Path) -> None:
    folder = write_directory(tmp_path, "qwen2")
    hello = [{"role": "user", "content": "Hello"}]
    assert not load(folder).has_chat
    named = [
        {"name": "default", "template": "one"},
        {"name": "tool_use", "template": "two {{ tools | length }}"},
    ]
    change(folder, "tokenizer_config.json", chat_template=named)
    assert render_chat(load(folder), hello) == "one"
    assert render_chat(load(folder), hello, {"tools": [{}]}) == "two 1"
    (folder / "chat_template.jinja").write_text("three")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("four")
    assert render_chat(load(folder), hello) == "three"
    assert render_chat(load(folder), hello, {"tools": [{}]}) == "four"


def test_chat_templates_of_models_for_images(tmp_path: Path) -> None:
    """LLaVA 1.5 has its template in a file of the processor alone."""
    folder = write_directory(tmp_path, "qwen2")
    hello = [{"role": "user", "content": "Hello"}]
    (folder / "chat_template.json").write_text('{"chat_template": "five"}')
    assert render_chat(load(folder), hello) == "five"
    change(folder, "tokenizer_config.json", chat_template={"default": "six", "tool_use": "seven"})
    assert render_chat(load(folder), hello) == "six"
    assert render_chat(load(folder), hello, {"tools": [{}]}) == "seven"


def test_truncation_and_padding_are_not_for_us(tmp_path: Path) -> None:
    folder = write_directory(tmp_path, "qwen2")
    core = Core.from_file(str(folder / "tokenizer.json"))
    core.enable_truncation(3)
    core.enable_padding(length=500)
    core.save(str(folder / "tokenizer.json"))
    assert len(load(folder).encode("one two three four five")) in range(5, 100)


def test_a_tokenizer_whose_tokens_are_words(tmp_path: Path) -> None:
    """No bytes here: the library's own decoder serves, incrementally, too."""
    core = Core(models.WordLevel({"[UNK]": 0, "hello": 1, "world": 2, "again": 3}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken("[UNK]", special=True), AddedToken("<|end|>", special=True)])
    core.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load(tmp_path)
    ids = tokenizer.encode("hello world <|end|> again")
    assert ids == [1, 2, 0, 3]
    assert tokenizer.decode([1, 2, 4, 3]) == "hello world again"
    decoder = IncrementalDecoder(tokenizer)
    assert "".join([decoder.push(id) for id in [1, 2, 4, 3]] + [decoder.finish()]) == "hello world again"
    assert tokenizer.token_text(2) == "world"
    core.decoder = decoders.WordPiece()
    core.save(str(tmp_path / "tokenizer.json"))
    assert load(tmp_path).decode([1, 2]) == "hello world"


@pytest.mark.parametrize("key", ["add_bos_token", "add_eos_token"])
@pytest.mark.parametrize(
    ("kind", "style", "said", "warns"),
    [
        # No post-processor: transformers 4 adds it, 5 does not.
        (
            "LlamaTokenizerFast",
            "mistral",
            True,
            True,
        ),
        ("LlamaTokenizer", "mistral", False, False),
        ("LlamaTokenizer", "mistral", None, False),  # as transformers 5 saves it
        ("PreTrainedTokenizerFast", "mistral", True, False),  # both versions pass over the key
        # A post-processor adds BOS: transformers 4 takes it away.
        (
            "GemmaTokenizerFast",
            "llama2",
            False,
            True,
        ),
        ("LlamaTokenizer", "llama2", True, False),
    ],
)
def test_tokenizer_json_decides_about_bos_and_eos(
    kind: str,
    style: str,
    said: bool | None,
    warns: bool,
    key: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As in transformers 5.24; where 4.57 does otherwise, that is said."""
    plain = load(write_directory(tmp_path / "plain", style, tokenizer_class="PreTrainedTokenizerFast"))
    says = {"add_bos_token": None, "add_eos_token": None, key: said}
    with caplog.at_level(logging.WARNING):
        tokenizer = load(write_directory(tmp_path / "said", style, tokenizer_class=kind, **says))
    assert tokenizer.encode("hello") == plain.encode("hello")
    if style == "llama2" and key == "add_eos_token":
        warns = not warns
    assert (f"says {key} = {str(said).lower()}, but tokenizer.json adds" in caplog.text) == warns


def test_no_tokenizer_json(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_tokenizer(tmp_path) is None
    assert caplog.text == ""
    (tmp_path / "tokenizer.model").touch()
    with caplog.at_level(logging.WARNING):
        assert load_tokenizer(tmp_path / "tokenizer.json") is None
    assert "has tokenizer.model but no tokenizer.json, so prompts must be token ids" in caplog.text
