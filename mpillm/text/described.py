"""Read from a tokenizer's own description how tokens become text, and how normalisation acts."""

from __future__ import annotations

import json
import re
from typing import Literal

import tokenizers

from mpillm.text.parts import or_model_error

Decoding = Literal["byte_level", "sentencepiece", "other"]  # how tokens become text

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def keeps_length(core: tokenizers.Tokenizer) -> bool:
    """Return whether normalisation leaves a text about as long as it is (it does not drop or collapse characters)."""
    if core.normalizer is None:
        return True
    state = json.loads(or_model_error(core.normalizer.__getstate__, "tokenizer.json"))
    steps = state.get("normalizers", [state])
    return all(
        step["type"] in {"NFC", "NFD", "NFKD", "NFKC", "Lowercase", "Prepend"}
        or (step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"])
        for step in steps
    )


def _byte_characters() -> dict[str, int]:
    """Return the byte for each character that byte-level BPE writes (the inverse of GPT-2's bytes_to_unicode)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


BYTE_OF = _byte_characters()


def decoding(core: tokenizers.Tokenizer) -> tuple[Decoding, bool]:
    """Return the conversion of tokens to text, and whether a text's first space is removed."""
    if core.decoder is None:
        return "other", False
    state = json.loads(or_model_error(core.decoder.__getstate__, "tokenizer.json"))
    steps = state.get("decoders", [state]) if state.get("type") == "Sequence" else [state]
    kinds = {step["type"]: step for step in steps}
    if "ByteLevel" in kinds:
        return "byte_level", False
    metaspace = kinds.get("Metaspace")
    if metaspace:
        return "sentencepiece", metaspace.get("prepend_scheme", "always") != "never"
    underline = kinds.get("Replace", {})
    if underline.get("content") == " " and underline.get("pattern") == {"String": "\u2581"}:
        strip = kinds.get("Strip", {})
        return "sentencepiece", strip.get("content") == " " and strip.get("start", 0) > 0
    return "other", False
