"""Tokenizers that are published as ranks of byte strings: Mistral's tekken.json, and tiktoken files.

Both become byte-level BPE of the `tokenizers` library, as in transformers' convert_slow_tokenizer.py: a token's merges
are all pairs of shorter tokens of which it is made, in the order of ranks.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from mpillm.errors import ModelError
from mpillm.text.described import BYTE_OF
from mpillm.text.parts import TokenizerParts, or_model_error

TEKKEN = "tekken.json"
CHARACTER_OF = {byte: char for char, byte in BYTE_OF.items()}

# By the name of the tiktoken file: the pattern that cuts texts into words. The pattern is in the code of the model's
# tokenizer, not in a file.
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_KIMI = "|".join(
    (
        r"[\p{Han}]+",
        _CASED + r"*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        _CASED + r"+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
SHARED = "tokenizer.model"  # other models have a SentencePiece file of this name
TIKTOKEN = {
    "tiktoken.model": _KIMI,
    "qwen.tiktoken": _CL100K % "",
    "tokenizer.tiktoken": _CL100K % "{1,3}",
    SHARED: _CL100K % "{1,3}",  # GLM-4
}
_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
_QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]


def file_in(folder: Path) -> Path | None:
    """Return the file with ranks in a directory."""
    found = next((folder / name for name in (TEKKEN, *TIKTOKEN) if (folder / name).exists()), None)
    if found is not None and found.name == SHARED:
        with found.open("rb") as file:
            return found if _LINE.match(file.read(256)) else None
    return found


def read(file: Path, config: dict[str, Any]) -> TokenizerParts:
    """Return the tokenizer of a file with ranks; `config` (tokenizer_config.json) has tiktoken files' special ones."""
    try:
        return _tekken(file) if file.name == TEKKEN else _tiktoken(file, config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"The tokenizer in {file} cannot be used: {error!r:.200}.") from error


def _tekken(file: Path) -> TokenizerParts:
    """Special tokens come first in the vocabulary, then as many of the listed ones as the file says to use."""
    value = json.loads(file.read_bytes())
    config: dict[str, Any] = value["config"]
    total, count = int(config["default_vocab_size"]), int(config["default_num_special_tokens"])
    listed = value.get("special_tokens")
    if listed is None:
        raise ModelError(f"{file} lists no special tokens, as versions before 7 did not; fetch a newer one.")
    special = {int(token["rank"]): str(token["token_str"]) for token in listed}
    names = [special.get(id, f"<SPECIAL_{id}>") for id in range(count)]
    ranks = {base64.b64decode(token["token_bytes"]): int(token["rank"]) for token in value["vocab"]}
    ranks = {token: rank for token, rank in ranks.items() if rank < total - count}
    core = _bpe(ranks, config["pattern"], first=count, special=dict(enumerate(names)), file=file)
    parts = TokenizerParts(
        core, str(file), named={"bos_token": "<s>", "eos_token": "</s>"}, control=set(names)
    )
    bos = core.token_to_id("<s>")
    if bos is not None:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
        )
    return parts


def _tiktoken(file: Path, config: dict[str, Any]) -> TokenizerParts:
    """Return a line has a token in base64 and its rank, which is its id; special tokens follow."""
    ranks = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ModelError(f"{file}, line {number}, is not a token in base64 with its rank.") from None
    first = max(ranks.values(), default=-1) + 1
    special = dict(enumerate(_QWEN_SPECIAL, first)) if file.name == "qwen.tiktoken" else {}
    listed = {int(id): token["content"] for id, token in (config.get("added_tokens_decoder") or {}).items()}
    for id in range(first, max(listed, default=-1) + 1):
        special.setdefault(id, listed.get(id, f"<|reserved_token_{id}|>"))
    core = _bpe(ranks, TIKTOKEN[file.name], first=0, special=special, file=file)
    named = {"eos_token": special[first]} if file.name == "qwen.tiktoken" else {}
    return TokenizerParts(core, str(file), named=named, control=set(special.values()))


def _bpe(
    ranks: dict[bytes, int], pattern: str, first: int, special: dict[int, str], file: Path
) -> tokenizers.Tokenizer:
    """Byte-level BPE: the id of a token is `first` + its rank, `special` are those of others."""
    text = {token: "".join(CHARACTER_OF[byte] for byte in token) for token in ranks}
    merges: list[tuple[tuple[int, int, int], tuple[str, str]]] = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                merges.append(((rank, ranks[left], ranks[right]), (text[left], text[right])))
    vocab = {text[token]: first + rank for token, rank in ranks.items()}
    vocab |= {name: id for id, name in special.items()}

    def make() -> tokenizers.Tokenizer:
        pairs = [pair for _, pair in sorted(merges)]
        core = tokenizers.Tokenizer(models.BPE(vocab, pairs, fuse_unk=False, ignore_merges=True))
        words = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_])
        core.decoder = decoders.ByteLevel()
        core.add_special_tokens(
            [AddedToken(name, special=True, normalized=False) for name in special.values()]
        )
        return core

    return or_model_error(make, str(file))
