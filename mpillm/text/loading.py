"""The tokenizer of a model, whatever its files are: Hugging Face's, a GGUF file's, or Distributed-Llama's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpillm.errors import ModelError
from mpillm.text import from_dllama, from_gguf, hf
from mpillm.text.tokenizer import Tokenizer


def load_tokenizer(
    source: Path | str | Mapping[str, Any] | None, vocab: int | None = None
) -> Tokenizer | None:
    """Return the tokenizer of a Hugging Face directory (or its tokenizer.json), a GGUF file's metadata, or a `.t` file.

    Return None if there is none; prompts must then be token ids. `vocab` is the number of rows of the model's
    embedding, and a ModelError says that a token of the vocabulary lies beyond it.
    """
    if source is None:
        return None
    if isinstance(source, Mapping):
        parts = from_gguf.read(source)
    else:
        path = Path(source)
        parts = from_dllama.read(path) if path.suffix == ".t" else hf.read(path)
    if parts is None:
        return None
    largest = max(parts.core.get_vocab(with_added_tokens=False).values(), default=-1)
    if largest < 0:
        raise ModelError(f"The tokenizer in {parts.where} has no tokens.")
    if vocab is not None and largest >= vocab:
        raise ModelError(
            f"The tokenizer in {parts.where} has a token of id {largest}, but the model's vocabulary has {vocab}; "
            "they do not belong together."
        )
    return Tokenizer(parts)


def token_id_text(id: int) -> str:
    """Return the text of a token if there is no tokenizer."""
    return f"token_id:{id}"
