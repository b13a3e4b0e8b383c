"""Files that are missing, broken or hostile end in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpillm.errors import ModelError, RequestError
from mpillm.text import load_tokenizer
from tests.text.vocabularies import byte_level_fields, sentencepiece_fields, write_directory


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be used"),
        ("{", "cannot be used"),
        ("[]", "cannot be used"),
        ("null", "cannot be used"),
        ('{"model": {"type": "Oracle"}}', "cannot be used"),
        (
            '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}',
            "has no tokens",
        ),
        ('{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', "cannot be used"),
        (
            '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}',
            "cannot be used",
        ),
        ("[" * 100_000, "cannot be used"),
        ("\xff\xfe", "is UTF-16; save it as UTF-8"),
        ("\xff\xff", "cannot be read"),
        ("version https://git-lfs.example/spec/v1\n", "is a Git LFS pointer instead of the file; fetch it"),
    ],
)
def test_tokenizer_json(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text, encoding="latin-1")
    with pytest.raises(ModelError, match=rf"tokenizer\.json.* {words}"):
        load_tokenizer(tmp_path)


def test_an_added_token_that_would_get_another_id(tmp_path: Path) -> None:
    write_directory(tmp_path, "qwen2", added_tokens_decoder={"5": {"content": "new"}})
    with pytest.raises(ModelError, match="gives 'new' the id 5, but it would be 710"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("tokenizer_config.json", "{", "is not JSON"),
        ("tokenizer_config.json", "[" * 100_000, "is not JSON"),
        ("tokenizer_config.json", "[]", "is not a JSON object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "is malformed"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "is malformed"),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "default"}]}',
            "chat_template in .* is malformed",
        ),
        (
            "generation_config.json",
            '{"eos_token_id": "2"}',
            r"eos_token_id in .* is '2', which is not a token id",
        ),
        ("config.json", '{"eos_token_id": [1, -2]}', r"eos_token_id in .*config\.json is -2"),
        ("special_tokens_map.json", '"x"', "is not a JSON object"),
    ],
)
def test_files_beside_it(tmp_path: Path, name: str, text: str, words: str) -> None:
    write_directory(tmp_path, "qwen2")
    (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=words):
        load_tokenizer(tmp_path)


def test_more_tokens_than_the_model(tmp_path: Path) -> None:
    write_directory(tmp_path, "qwen2")
    assert load_tokenizer(tmp_path, vocab=2000) is not None
    with pytest.raises(
        ModelError, match="a token of id 699, but the model's vocabulary has 512; they do not belong"
    ):
        load_tokenizer(tmp_path, vocab=512)
    with pytest.raises(ModelError, match="of id 709, but the model's vocabulary has 699"):
        load_tokenizer(byte_level_fields("qwen2"), vocab=699)


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda fields: fields.pop(f"tokenizer.ggml.{key}")


def put(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda fields: fields.__setitem__(f"tokenizer.ggml.{key}", value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("model", "rwkv"), "is of the type 'rwkv'; gpt2, llama, gemma4, bert and t5 are known"),
        (put("model", 7), "is of the type 7"),
        (
            put("pre", "gpt-17"),
            r"tokenizer\.ggml\.pre in .* is 'gpt-17', which is not known; known are .*qwen2",
        ),
        (without("tokens"), r"tokenizer\.ggml\.tokens in the GGUF file is missing"),
        (without("merges"), r"tokenizer\.ggml\.merges in the GGUF file is missing"),
        (put("tokens", [1, 2]), "tokens in .* is not a list of strings"),
        (put("tokens", "abc"), "tokens in .* is not a list"),
        (put("tokens", 5), "tokens in .* is not a list"),
        (put("tokens", []), "token_type in .* one value for each of the 0 tokens"),
        (put("tokens", ["a", "b", "a"]), "lists the token 'a' twice"),
        (put("merges", ["ab"]), "holds 'ab', which is not a pair"),
        (put("merges", ["qqq zzz"]), "cannot be used: .*qqq"),
        (put("token_type", [1, 2]), "does not have one value for each of the 710 tokens"),
        (put("token_type", 3), "token_type in .* is not a list"),
        (put("token_type", ["x"] * 710), "contains something that is not a number"),
        (put("eos_token_id", 710), "eos_token_id in .* is 710, but there are 710 tokens"),
        (put("bos_token_id", -2), "bos_token_id in .* is -2"),
        (put("bos_token_id", "x"), "bos_token_id in .* is x"),
        (put("eot_token_id", 2**40), "eot_token_id in"),
    ],
)
def test_gguf_byte_level(change: Callable[[dict[str, Any]], Any], words: str) -> None:
    fields = byte_level_fields("qwen2")
    change(fields)
    with pytest.raises(ModelError, match=words):
        load_tokenizer(fields)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("scores", [0.0]), "scores in .* does not have one value for each"),
        (put("scores", ["x"] * 900), "contains something that is not a number"),
        (put("unknown_token_id", 900), "unknown_token_id in .* is 900"),
    ],
)
def test_gguf_sentencepiece(change: Callable[[dict[str, Any]], Any], words: str) -> None:
    fields = sentencepiece_fields(True)
    change(fields)
    with pytest.raises(ModelError, match=words):
        load_tokenizer(fields)


def test_empty_tokens_get_names() -> None:
    fields = byte_level_fields("qwen2")
    fields["tokenizer.ggml.tokens"] += ["", ""]
    fields["tokenizer.ggml.token_type"] += [5, 5]
    tokenizer = load_tokenizer(fields)
    assert tokenizer is not None
    assert tokenizer.token_text(711) == "[EMPTY_711]"


def test_lone_surrogates() -> None:
    tokenizer = load_tokenizer(byte_level_fields("qwen2"))
    assert tokenizer is not None
    with pytest.raises(RequestError, match=r"lone surrogate, U\+D800, at 2"):
        tokenizer.encode("ab\ud800c")
